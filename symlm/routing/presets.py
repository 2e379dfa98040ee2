"""The default table's companions: the paper's arms, related systems and the baselines."""

from dataclasses import replace
from typing import Any

from symlm.roles.role import Role
from symlm.routing.table import ADAMW, HEADS_APART, NESTEROV, ROUTES, Route, Table, make_table

_ENDS = (Role.EMBEDDING, Role.TIED_EMBEDDING, Role.LM_HEAD)


_MLP = (Role.MLP_IN, Role.MLP_OUT, Role.EXPERT_IN, Role.EXPERT_OUT)


_INNER = tuple(role for role in Role if role not in (*_ENDS, Role.ROUTER, Role.VECTOR))


def _changed(table: Table, roles: tuple[Role, ...], **changes: Any) -> dict[Role, Route]:
    return {role: replace(table[role], **changes) for role in roles}


# arXiv 2605.18106, the Qwen3 runs (code, README): Muon a head and for the MLP, rows for tokens, base rate 2e-2.
_PAPER_ROW = make_table(
    {
        **ROUTES,
        **_changed(ROUTES, _INNER, lr=1.0, options=NESTEROV),
        **dict.fromkeys(
            (Role.ATTENTION_V, Role.ATTENTION_O, Role.ATTENTION_QKV), replace(HEADS_APART, lr=1.0, options=NESTEROV)
        ),
        **_changed(ROUTES, _MLP, rule="polar", view="whole", lr=1.0, options=NESTEROV, why="Muon, whole"),
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
    **dict.fromkeys(_INNER, Route("polar", options=NESTEROV, why="Muon: hidden matrices, whole")),
    **dict.fromkeys((*_ENDS, Role.ROUTER, Role.VECTOR), ADAMW),
}


_READS = Route(
    "aro_sinkhorn", "transposed", "adamw_rms", lr=0.25, why="rows are the residual stream's, rotated", options=NESTEROV
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
        {**_PAPER_ROW, Role.ROUTER: replace(ADAMW, lr=0.0375, why="the paper's router baseline")}, baseline=True
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
    "adamw": make_table({role: replace(ADAMW, lr=1.0, weight_decay=1.0) for role in Role}, baseline=True),
    # The default's rules, every update's RMS at 0.2 as Liu et al. (arXiv 2502.16982) match Muon: takes AdamW's rate.
    "adamw-compatible": make_table(
        {
            **_changed(ROUTES, _INNER, scale="match_adamw_rms", lr=1.0),
            **_changed(ROUTES, (*_ENDS, Role.ROUTER), scale="match_adamw_rms_of_rows", lr=1.0),
            Role.VECTOR: replace(ADAMW, lr=1.0),
        }
    ),
}


def get_preset(name: str) -> dict[Role, Route]:
    """Return the named table.  Raises: ValueError, listing the names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {sorted(PRESETS)}")
    return PRESETS[name]
