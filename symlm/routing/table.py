"""THE table: which view, rule, scale and rate each role gets. A row that claims too much is refused at import."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from symlm.roles.role import Role
from symlm.rules import get_rule
from symlm.rules.scaling import SCALES
from symlm.symmetry import Symmetry, permutations, rotations, trivial

GRANULARITIES = ("whole", "heads", "qk_heads", "transposed", "pair")


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
    Role.ATTENTION_QKV: Symmetry(rotations, rotations),
    Role.MLP_IN: Symmetry(permutations, rotations),
    Role.MLP_OUT: Symmetry(permutations, rotations),
    Role.EXPERT_IN: Symmetry(permutations, rotations),
    Role.EXPERT_OUT: Symmetry(permutations, rotations),
    # An adapter's factors have GL(r) between them; this is its orthogonal part.
    Role.LORA: Symmetry(rotations, rotations),
    Role.MATRIX: Symmetry(rotations, rotations),
    Role.VECTOR: Symmetry(trivial, trivial),
}


@dataclass(frozen=True)
class Route:
    """One row of the table: `lr` and `weight_decay` multiply the optimizer's own; `why` is for the reader.

    `options` are the optimizer's own, as this route wants them; what the user gives comes first.
    """

    rule: str
    view: str = "whole"
    scale: str = "keller"
    lr: float = 1.0
    weight_decay: float = 1.0
    why: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


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
                f"route of {role}: view {route.view!r} is one of {GRANULARITIES}, "
                f"scale {route.scale!r} of {list(SCALES)}"
            )
        if not baseline and not SYMMETRIES[role] <= claim:
            raise ValueError(
                f"route of {role}: its symmetry {SYMMETRIES[role]} is larger than what {route.rule!r} keeps, {claim}"
            )
    return dict(routes)


# Rates, momenta and Nesterov's look-ahead were chosen at width 128 (recipes/LOG.md); rows' scales carry them to others.
NESTEROV = {"nesterov": True}


_INNER_MEAN = {"nesterov": True, "momentum": 0.85}


HEADS_APART = Route("polar", view="heads", lr=0.5, why="each head is a matrix of its own", options=_INNER_MEAN)


_SUMMED_HEADS = replace(HEADS_APART, view="whole", why="the heads' outputs are summed: one matrix")


_IN = Route("left_spectral", lr=0.5, why="rows are neurons", options=_INNER_MEAN)


_OUT = replace(_IN, view="transposed", why="rows are neurons, permuted with gate and up")


_TOKENS = Route(
    "row_adam", "whole", "row_rms", 0.75, 0.0, "a row is a token, rare or frequent", {"nesterov": True, "momentum": 0.7}
)


_LOGITS = Route(
    "centered_whitened_row_adam",
    "whole",
    "inverse_row_rms",
    15.0,
    0.0,
    "softmax ignores a shared shift",
    {"nesterov": True, "momentum": 0.8, "betas": (0.9, 0.98)},
)


_EXPERTS = Route("centered_row_norm", "whole", "inverse_row_rms", 5.6, 0.0, "top-k softmax ignores it too", NESTEROV)


ADAMW = Route("adamw", scale="unit", lr=0.5, weight_decay=0.0, why="no matrix: elementwise")


ROUTES: dict[Role, Route] = make_table(
    {
        Role.EMBEDDING: _TOKENS,
        Role.TIED_EMBEDDING: replace(
            _LOGITS, rule="whitened_row_adam", why="a row is a token; tied, so no shared shift"
        ),
        Role.LM_HEAD: _LOGITS,
        Role.ROUTER: _EXPERTS,
        **dict.fromkeys((Role.ATTENTION_Q, Role.ATTENTION_K), HEADS_APART),
        **dict.fromkeys((Role.ATTENTION_V, Role.ATTENTION_O), _SUMMED_HEADS),
        Role.ATTENTION_QKV: replace(HEADS_APART, view="qk_heads", why="as q, k and v apart: v's heads are summed"),
        Role.MLP_IN: _IN,
        Role.MLP_OUT: _OUT,
        Role.EXPERT_IN: replace(_IN, why="rows are neurons, one matrix an expert"),
        Role.EXPERT_OUT: replace(_OUT, why="rows are neurons, one matrix an expert"),
        Role.LORA: Route("polar", lr=0.5, why="a low-rank adapter's factor", options=_INNER_MEAN),
        Role.MATRIX: Route("polar", lr=0.5, why="a dense matrix", options=_INNER_MEAN),
        Role.VECTOR: ADAMW,
    }
)
