"""THE table: which view, rule, scale and rate each role gets. A row that claims too much is refused at import."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from symlm.roles import Role
from symlm.rules import get_rule
from symlm.scaling import SCALES
from symlm.symmetry import Symmetry, permutations, rotations, trivial

GRANULARITIES = ("whole", "heads", "transposed", "pair")

SYMMETRIES: dict[Role, Symmetry] = {
    Role.EMBEDDING: Symmetry(permutations, rotations),
    Role.TIED_EMBEDDING: Symmetry(permutations, rotations),
    Role.LM_HEAD: Symmetry(permutations, rotations, shift=True),
    Role.ROUTER: Symmetry(permutations, rotations, shift=True),
    # RoPE leaves q and k only one rotation per frequency pair; the group here is that of the head without it.
    Role.ATTENTION_Q: Symmetry(rotations, rotations),
    Role.ATTENTION_K: Symmetry(rotations, rotations),
    Role.ATTENTION_V: Symmetry(rotations, rotations),
    Role.ATTENTION_O: Symmetry(rotations, rotations),
    Role.MLP_IN: Symmetry(permutations, rotations),
    Role.MLP_OUT: Symmetry(permutations, rotations),
    Role.EXPERT_IN: Symmetry(permutations, rotations),
    Role.EXPERT_OUT: Symmetry(permutations, rotations),
    Role.MATRIX: Symmetry(rotations, rotations),
    Role.VECTOR: Symmetry(trivial, trivial),
}


@dataclass(frozen=True)
class Route:
    """One row of the table: `lr` and `weight_decay` multiply the optimizer's own; `why` is for the reader."""

    rule: str
    view: str = "whole"
    scale: str = "keller"
    lr: float = 1.0
    weight_decay: float = 1.0
    why: str = ""


Table = Mapping[Role, Route]


def make_table(routes: Mapping[Role, Route], baseline: bool = False) -> dict[Role, Route]:
    """Check a table and return it.

    Raises: ValueError for a missing role, an unknown view or scale, or a rule whose claim does not cover the role's
    symmetry. A `baseline` breaks symmetry on purpose (Adam is one) and skips that last question alone.
    """
    missing = [str(role) for role in Role if role not in routes]
    if missing:
        raise ValueError(f"the table has no route for {missing}")
    for role, route in routes.items():
        claim = get_rule(route.rule).symmetry
        if route.view not in GRANULARITIES or route.scale not in SCALES:
            raise ValueError(
                f"route of {role}: view {route.view!r} is one of {GRANULARITIES}, scale {route.scale!r} of {list(SCALES)}"
            )
        if not baseline and not SYMMETRIES[role] <= claim:
            raise ValueError(
                f"route of {role}: its symmetry {SYMMETRIES[role]} is larger than what {route.rule!r} keeps, {claim}"
            )
    return dict(routes)


_HEADS = Route("polar", view="heads", why="each head is a matrix of its own")
_OUT = Route("left_spectral", view="transposed", why="rows are neurons, permuted with gate and up")
_ADAMW = Route("adamw", scale="unit", lr=0.5, weight_decay=0.0, why="no matrix: elementwise")

ROUTES: dict[Role, Route] = make_table(
    {
        Role.EMBEDDING: Route("row_norm", scale="unit", lr=25.0, weight_decay=0.0, why="a row is a token"),
        Role.TIED_EMBEDDING: Route(
            "row_norm", scale="unit", lr=1.0, weight_decay=0.0, why="a row is a token; tied, so no shared shift"
        ),
        Role.LM_HEAD: Route(
            "centered_row_norm", scale="unit", lr=0.5, weight_decay=0.0, why="softmax ignores a shared shift"
        ),
        Role.ROUTER: Route(
            "centered_row_norm", scale="unit", lr=0.5, weight_decay=0.0, why="top-k softmax ignores a shared shift"
        ),
        Role.ATTENTION_Q: _HEADS,
        Role.ATTENTION_K: _HEADS,
        Role.ATTENTION_V: _HEADS,
        Role.ATTENTION_O: _HEADS,
        Role.MLP_IN: Route("left_spectral", why="rows are neurons"),
        Role.MLP_OUT: _OUT,
        Role.EXPERT_IN: Route("left_spectral", why="rows are neurons, one matrix an expert"),
        Role.EXPERT_OUT: replace(_OUT, why="rows are neurons, one matrix an expert"),
        Role.MATRIX: Route("polar", why="a dense matrix"),
        Role.VECTOR: _ADAMW,
    }
)


_ENDS = (Role.EMBEDDING, Role.TIED_EMBEDDING, Role.LM_HEAD)
_INNER = tuple(role for role in Role if role not in (*_ENDS, Role.ROUTER, Role.VECTOR))

PRESETS: dict[str, dict[Role, Route]] = {
    "default": ROUTES,
    # arXiv 2605.18106, the hybrid arm with alpha = 0: rows first, then the polar factor.
    "paper-hybrid": make_table(
        {
            **ROUTES,
            Role.EMBEDDING: Route("row_then_polar", lr=25.0, weight_decay=0.0, why="hybrid, alpha = 0"),
            Role.TIED_EMBEDDING: Route("row_then_polar", lr=1.0, weight_decay=0.0, why="hybrid, alpha = 0"),
            Role.LM_HEAD: Route("centered_row_then_polar", lr=0.5, weight_decay=0.0, why="hybrid, alpha = 0"),
        }
    ),
    # Jordan et al. 2024: every hidden matrix whole, AdamW for the rest.
    "muon": make_table(
        {
            **dict.fromkeys(_INNER, Route("polar", why="Muon: hidden matrices, whole")),
            **dict.fromkeys((*_ENDS, Role.ROUTER, Role.VECTOR), _ADAMW),
        },
        baseline=True,
    ),
    # Loshchilov & Hutter, arXiv 1711.05101: one rule for everything.
    "adamw": make_table({role: replace(_ADAMW, lr=1.0, weight_decay=1.0) for role in Role}, baseline=True),
}


def get_preset(name: str) -> dict[Role, Route]:
    """Return the named table.  Raises: ValueError, listing the names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {sorted(PRESETS)}")
    return PRESETS[name]
