"""THE table: which view, rule, scale and rate each role gets. A row that claims too much is refused at import."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from symlm.groups import DEFAULTS, ROUTED, refuse_unknown
from symlm.roles import Role, place
from symlm.rules import get_rule
from symlm.scaling import SCALES
from symlm.symmetry import Symmetry, permutations, rotations, trivial
from symlm.views import view_of

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
_NESTEROV = {"nesterov": True}
_INNER_MEAN = {"nesterov": True, "momentum": 0.85}
_HEADS = Route("polar", view="heads", lr=0.5, why="each head is a matrix of its own", options=_INNER_MEAN)
_SUMMED_HEADS = replace(_HEADS, view="whole", why="the heads' outputs are summed: one matrix")
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
_EXPERTS = Route("centered_row_norm", "whole", "inverse_row_rms", 5.6, 0.0, "top-k softmax ignores it too", _NESTEROV)
_ADAMW = Route("adamw", scale="unit", lr=0.5, weight_decay=0.0, why="no matrix: elementwise")

ROUTES: dict[Role, Route] = make_table(
    {
        Role.EMBEDDING: _TOKENS,
        Role.TIED_EMBEDDING: replace(
            _LOGITS, rule="whitened_row_adam", why="a row is a token; tied, so no shared shift"
        ),
        Role.LM_HEAD: _LOGITS,
        Role.ROUTER: _EXPERTS,
        **dict.fromkeys((Role.ATTENTION_Q, Role.ATTENTION_K), _HEADS),
        **dict.fromkeys((Role.ATTENTION_V, Role.ATTENTION_O), _SUMMED_HEADS),
        Role.ATTENTION_QKV: replace(_HEADS, view="qk_heads", why="as q, k and v apart: v's heads are summed"),
        Role.MLP_IN: _IN,
        Role.MLP_OUT: _OUT,
        Role.EXPERT_IN: replace(_IN, why="rows are neurons, one matrix an expert"),
        Role.EXPERT_OUT: replace(_OUT, why="rows are neurons, one matrix an expert"),
        Role.LORA: Route("polar", lr=0.5, why="a low-rank adapter's factor", options=_INNER_MEAN),
        Role.MATRIX: Route("polar", lr=0.5, why="a dense matrix", options=_INNER_MEAN),
        Role.VECTOR: _ADAMW,
    }
)


_ENDS = (Role.EMBEDDING, Role.TIED_EMBEDDING, Role.LM_HEAD)
_MLP = (Role.MLP_IN, Role.MLP_OUT, Role.EXPERT_IN, Role.EXPERT_OUT)
_INNER = tuple(role for role in Role if role not in (*_ENDS, Role.ROUTER, Role.VECTOR))


def _changed(table: Table, roles: tuple[Role, ...], **changes: Any) -> dict[Role, Route]:
    return {role: replace(table[role], **changes) for role in roles}


# arXiv 2605.18106, the Qwen3 runs (code, README): Muon a head and for the MLP, rows for tokens, base rate 2e-2.
_PAPER_ROW = make_table(
    {
        **ROUTES,
        **_changed(ROUTES, _INNER, lr=1.0, options=_NESTEROV),
        **dict.fromkeys(
            (Role.ATTENTION_V, Role.ATTENTION_O, Role.ATTENTION_QKV), replace(_HEADS, lr=1.0, options=_NESTEROV)
        ),
        **_changed(ROUTES, _MLP, rule="polar", view="whole", lr=1.0, options=_NESTEROV, why="Muon, whole"),
        Role.EMBEDDING: Route("row_norm", scale="unit", lr=25.0, weight_decay=0.0, why="a row is a token"),
        Role.TIED_EMBEDDING: Route("row_norm", scale="unit", lr=0.25, weight_decay=0.0, why="tied: not centered"),
        Role.LM_HEAD: Route("centered_row_norm", scale="unit", lr=0.25, weight_decay=0.0, why="softmax, shared shift"),
        Role.ROUTER: Route("centered_row_norm", scale="unit", lr=0.0375, weight_decay=0.0, why="a row is an expert"),
        Role.VECTOR: Route("adamw", scale="unit", lr=2.5, why="no matrix: elementwise"),
    }
)
# Rows first, then the polar factor, alpha = 0: alpha = 1 makes a step of norm sqrt(m) to sqrt(m n), and its published
# rates are bound to a defect of the code.
_PAPER_HYBRID = make_table(
    {
        **_PAPER_ROW,
        **_changed(_PAPER_ROW, _ENDS, rule="row_then_polar", why="hybrid, alpha = 0"),
        **_changed(ROUTES, _MLP, rule="row_then_polar", lr=1.0, options={}, why="hybrid, alpha = 0; rows are neurons"),
        Role.LM_HEAD: replace(_PAPER_ROW[Role.LM_HEAD], rule="centered_row_then_polar", why="hybrid, alpha = 0"),
    }
)
_MUON: dict[Role, Route] = {
    **dict.fromkeys(_INNER, Route("polar", options=_NESTEROV, why="Muon: hidden matrices, whole")),
    **dict.fromkeys((*_ENDS, Role.ROUTER, Role.VECTOR), _ADAMW),
}
_READS = Route(
    "aro_sinkhorn", "transposed", "adamw_rms", lr=0.25, why="rows are the residual stream's, rotated", options=_NESTEROV
)
_READERS = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.MLP_IN, Role.EXPERT_IN)
_WRITERS = (Role.ATTENTION_O, Role.MLP_OUT, Role.EXPERT_OUT)
_SCION_SIGN = Route("sign", scale="inverse_inputs", lr=60.0, why="Scion: sign norm, radius 3000 against 50")

PRESETS: dict[str, dict[Role, Route]] = {
    "default": ROUTES,
    "paper-row": _PAPER_ROW,
    "paper-hybrid": _PAPER_HYBRID,
    "paper-left-router": make_table(
        {**_PAPER_ROW, Role.ROUTER: replace(_PAPER_ROW[Role.ROUTER], rule="centered_polar", why="left-spectral")}
    ),
    "paper-row-adamw-router": make_table(
        {**_PAPER_ROW, Role.ROUTER: replace(_ADAMW, lr=0.0375, why="the paper's router baseline")}, baseline=True
    ),
    # Jordan et al. 2024: every hidden matrix whole, AdamW for the rest.
    "muon": make_table(_MUON, baseline=True),
    # Lau, Long & Su, arXiv 2505.21799: as Muon, times the nuclear norm.
    "polargrad": make_table(
        {**_MUON, **dict.fromkeys(_INNER, Route("polargrad", scale="unit", why="polar factor times nuclear norm"))},
        baseline=True,
    ),
    # Gong et al., arXiv 2602.09006, hybrid mode: AdamW for what does not both read and write vectors; AdamW's sizes.
    "aro": make_table(
        {
            **_MUON,
            **_changed(_MUON, _INNER, scale="match_adamw_rms", lr=0.25, why="no side is known to be the stream's"),
            **dict.fromkeys(_READERS, _READS),
            **dict.fromkeys(_WRITERS, replace(_READS, view="whole")),
        },
        baseline=True,
    ),
    # Maity, arXiv 2509.24320: the normalized momentum under a brake that is nearly 1; AdamW's sizes, not the paper's.
    "auon": make_table(
        {
            **_MUON,
            **_changed(_MUON, _INNER, rule="auon", scale="match_adamw_rms_of_matrix", lr=0.25, why="braked momentum"),
        },
        baseline=True,
    ),
    # Pethick et al., arXiv 2502.07529: operator norms by layer, beta = 0.9, base rate 50 · 4e-4.
    "scion": make_table(
        {
            **dict.fromkeys(_INNER, Route("polar", scale="rms_to_rms", options={"momentum": 0.9}, why="spectral norm")),
            **dict.fromkeys(
                (Role.TIED_EMBEDDING, Role.LM_HEAD, Role.ROUTER), replace(_SCION_SIGN, options={"momentum": 0.9})
            ),
            Role.EMBEDDING: Route(
                "row_norm", scale="row_rms", options={"momentum": 0.9}, why="column norm, transposed"
            ),
            Role.VECTOR: Route("row_norm", scale="row_rms", options={"momentum": 0.9}, why="RMS norm of a bias"),
        },
        baseline=True,
    ),
    # Loshchilov & Hutter, arXiv 1711.05101: one rule for everything.
    "adamw": make_table({role: replace(_ADAMW, lr=1.0, weight_decay=1.0) for role in Role}, baseline=True),
    # The default's rules, every update's RMS at 0.2 as Liu et al. (arXiv 2502.16982) match Muon: takes AdamW's rate.
    "adamw-compatible": make_table(
        {
            **_changed(ROUTES, _INNER, scale="match_adamw_rms", lr=1.0),
            **_changed(ROUTES, (*_ENDS, Role.ROUTER), scale="match_adamw_rms_of_rows", lr=1.0),
            Role.VECTOR: replace(_ADAMW, lr=1.0),
        }
    ),
}


def get_preset(name: str) -> dict[Role, Route]:
    """Return the named table.  Raises: ValueError, listing the names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {sorted(PRESETS)}")
    return PRESETS[name]


def param_groups(
    model: nn.Module,
    lr: float | Tensor = 0.02,
    preset: str = "default",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    roles: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for `SymOptimizer`, one for each role and view, all metadata plain values.

    lr: the one dial; a group's rate is `lr` times its route's multiplier.
    overrides: `{role: {key: value}}`, absolute values for the groups of a role, e.g. `{"lm_head": {"lr": 5e-3}}`.
    roles: ordered `{pattern: role}` for parameters that the structure does not tell, see `assign_roles`.

    Raises: ValueError for lr <= 0, complex parameters, an unknown preset, role, rule, scale or view.
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    settings = check_overrides(overrides or {})
    table = overridden(get_preset(preset), settings)
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for site, role in place(model, roles):
        if site.parameter.is_complex():
            raise ValueError(f"{site}: complex parameters have no route")
        view = str(view_of(site, role, table[role].view))
        group = groups.setdefault((role, view), _group(role, view, table[role], lr, settings.get(role, {})))
        group["params"].append((site.name, site.parameter))
    if not groups:
        raise ValueError("the model has no trainable parameter")
    return list(groups.values())


ROUTE_KEYS = ("rule", "view", "scale")
OVERRIDABLE = {*DEFAULTS, *ROUTED} - {"nonfinite"}  # what a bad gradient does is the optimizer's to say


def check_overrides(overrides: Mapping[str, Mapping[str, Any]]) -> dict[Role, dict[str, Any]]:
    """Return overrides by role.  Raises: ValueError for a role, key, rule, scale, view or rate that is none."""
    names = [str(role) for role in Role]
    for role, values in overrides.items():
        if role not in names:
            raise ValueError(f"overrides name an unknown role {role!r}; choose one of {names}")
        for key in values:
            refuse_unknown(f"overrides[{role!r}] key", key, OVERRIDABLE)
        if "rule" in values:
            get_rule(values["rule"])
        for key, allowed in (("scale", list(SCALES)), ("view", list(GRANULARITIES))):
            if values.get(key, allowed[0]) not in allowed:
                raise ValueError(f"overrides[{role!r}]: unknown {key} {values[key]!r}; choose one of {allowed}")
        if not values.get("lr", 1.0) > 0:
            raise ValueError(f"overrides[{role!r}]: lr must be positive, got {values['lr']}")
    return {Role(role): dict(values) for role, values in overrides.items()}


def overridden(table: Table, settings: Mapping[Role, Mapping[str, Any]]) -> dict[Role, Route]:
    """Return the table with the rules, views and scales that a user set."""
    own = {role: {k: v for k, v in values.items() if k in ROUTE_KEYS} for role, values in settings.items()}
    return {role: _changed_route(route, own.get(role, {})) for role, route in table.items()}


def _changed_route(route: Route, changes: Mapping[str, Any]) -> Route:
    """Change a route; what becomes elementwise leaves the rates behind that its scale gave a meaning."""
    becomes = get_rule(changes.get("rule", route.rule)).elementwise and not get_rule(route.rule).elementwise
    return replace(replace(_ADAMW, view=route.view) if becomes else route, **changes)


def _group(role: Role, view: str, route: Route, lr: float | Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    free = {key: value for key, value in settings.items() if key not in ROUTE_KEYS}
    return {
        "params": [],
        "lr": lr * route.lr,
        "role": str(role),
        "view": view,
        "outputs": "columns" if route.view == "transposed" else "rows",
        "rule": route.rule,
        "scale": route.scale,
        "weight_decay_multiplier": 1.0 if "weight_decay" in free else route.weight_decay,
        **route.options,
        **free,
    }
