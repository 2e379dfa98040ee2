"""Presets beside the default table: the paper's arms, related systems and the baselines.

Rates are multiples of the one dial, which is 0.02 by default; "LOG" is recipes/LOG.md, by the date of an entry.
"""

from dataclasses import replace
from typing import Any

from symlm.roles.role import Role
from symlm.routing.table import ADAMW, HEADS_APART, NESTEROV, ROUTES, Route, Table, make_table, with_shifted_logits

_ENDS = (Role.EMBEDDING, Role.TIED_EMBEDDING, Role.LM_HEAD)


_SHIFTED = (Role.CAPPED_LM_HEAD, Role.SIGMOID_ROUTER)  # made from the head's and the router's routes


_MLP = (Role.MLP_IN, Role.MLP_OUT, Role.EXPERT_IN, Role.EXPERT_OUT)


_ATTENTION = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_O)


_INNER = tuple(role for role in Role if role not in (*_ENDS, *_SHIFTED, Role.ROUTER, Role.VECTOR))


def _changed(table: Table, roles: tuple[Role, ...], **changes: Any) -> dict[Role, Route]:
    """Return the routes of some roles, changed alike."""
    return {role: replace(table[role], **changes) for role in roles}


def _preset(routes: Table, baseline: bool = False) -> dict[Role, Route]:
    """Check a table whose capped heads and sigmoid routers follow from its head and router."""
    return make_table(with_shifted_logits(routes), baseline)


# arXiv 2605.18106, the Qwen3 runs (README of the code): Muon on each head and on the MLP, row norms at the ends. The
# dial is the matrices' rate, 2e-2, so their multiple is 1. Momentum is 0.95, the optimizer's default; Nesterov momentum
# is Muon's alone. Weight decay is 0 for embedding, head and router, and the matrices' for the rest.
_PAPER_ROW = _preset(
    {
        **ROUTES,
        **_changed(ROUTES, _INNER, lr=1.0, options=NESTEROV),
        **dict.fromkeys(
            (Role.ATTENTION_V, Role.ATTENTION_O, Role.ATTENTION_QKV), replace(HEADS_APART, lr=1.0, options=NESTEROV)
        ),
        **_changed(ROUTES, _MLP, rule="polar", view="whole", lr=1.0, options=NESTEROV, why="Muon, whole"),
        # 5e-1 / 2e-2, the README's rate of the embedding in the row arm.
        Role.EMBEDDING: Route("row_norm", scale="unit", lr=25.0, weight_decay=0.0, why="a row is a token"),
        # The head's rate, as the code routes a tied weight to the head. The code also centers it.
        Role.TIED_EMBEDDING: Route("row_norm", scale="unit", lr=0.25, weight_decay=0.0, why="tied: not centered"),
        # 5e-3 / 2e-2, the README's rate of the head in the row arm.
        Role.LM_HEAD: Route("centered_row_norm", scale="unit", lr=0.25, weight_decay=0.0, why="softmax, shared shift"),
        # 7.5e-4 / 2e-2: the README's rate of the router in every arm of OLMoE and gpt-oss. Their matrices' rates are
        # 5e-3 and 1e-3, so the multiple gives 7.5e-4 at the dial 0.02 alone.
        Role.ROUTER: Route("centered_row_norm", scale="unit", lr=0.0375, weight_decay=0.0, why="a row is an expert"),
        # 5e-2 / 2e-2, the README's rate of the role "other".
        Role.VECTOR: Route("adamw", scale="unit", lr=2.5, why="not a matrix: elementwise"),
    }
)


# Rows first, then the polar factor, alpha = 0: alpha = 1 makes a step of norm sqrt(m) to sqrt(m n), and its published
# rates (embedding 1e0, head 1e-2) depend on a defect of the code. The ends have the row arm's rates: chosen here; no
# record. In LOG 2026-11-21, "the paper's tables", twice the rates are better. The MLP's 2e-2 is the README's.
_PAPER_HYBRID = _preset(
    {
        **_PAPER_ROW,
        **_changed(_PAPER_ROW, _ENDS, rule="row_then_polar", why="hybrid, alpha = 0"),
        **_changed(ROUTES, _MLP, rule="row_then_polar", scale="unit", lr=1.0, options={}, why="hybrid, alpha = 0"),
        Role.LM_HEAD: replace(_PAPER_ROW[Role.LM_HEAD], rule="centered_row_then_polar", why="hybrid, alpha = 0"),
    }
)


# Jordan et al. 2024: the dial is the hidden matrices' rate, 0.02; Nesterov momentum of 0.95, the optimizer's default.
# The rest has the default table's ADAMW. The screened rates of LOG 2026-11-22 are in recipes/configs/muon.yaml.
_MUON: dict[Role, Route] = {
    **dict.fromkeys(_INNER, Route("polar", options=NESTEROV, why="Muon: hidden matrices, whole")),
    **dict.fromkeys((*_ENDS, Role.ROUTER, Role.VECTOR), ADAMW),
}


# A rule with a state needs matrices of one shape, which fused q, k and v are not.
_EQUAL = tuple(role for role in _INNER if role is not Role.ATTENTION_QKV)


# Rules that store a mean of gradients themselves: the optimizer's momentum is the gradient.
_OWN_MEAN = Route("kl_soap", scale="unit", options={"momentum": 0.0, "nesterov": False, "betas": (0.9, 0.98)})


_DION = replace(
    _OWN_MEAN,
    rule="dion",
    scale="rms_to_rms",
    lr=0.5,
    options={**_OWN_MEAN.options, "betas": (0.95, 0.95)},
    why="low rank, the rest fed back",
)


# ARO takes AdamW's rate: 0.25 is 5e-3 at the dial 0.02, near AdamW's best (4e-3; LOG 2026-11-21, "the embedded
# default") and the rate of the one run of ARO-Adam there (LOG 2026-11-21, "rows with a second moment"). Momentum 0.95
# is the paper's.
_READS = Route("aro_sinkhorn", "transposed", "adamw_rms", lr=0.25, why="rows are the residual stream's, rotated")


_READERS = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.MLP_IN, Role.EXPERT_IN)


_WRITERS = (Role.ATTENTION_O, Role.MLP_OUT, Role.EXPERT_OUT)


# 60.0 is 3000 / 50, the paper's radii of the sign norm and of the spectral norm (arXiv 2502.07529).
_SCION_SIGN = Route("sign", scale="inverse_inputs", lr=60.0, why="Scion: sign norm, radius 3000 against 50")


# Pethick et al., arXiv 2502.07529: operator norms by layer, momentum 0.9. The dial is the spectral radius times the
# rate, 50 · 4e-4 = 0.02.
_SCION: dict[Role, Route] = {
    **dict.fromkeys(_INNER, Route("polar", scale="rms_to_rms", options={"momentum": 0.9}, why="spectral norm")),
    **dict.fromkeys((Role.TIED_EMBEDDING, Role.LM_HEAD, Role.ROUTER), replace(_SCION_SIGN, options={"momentum": 0.9})),
    Role.EMBEDDING: Route("row_norm", scale="row_rms", options={"momentum": 0.9}, why="column norm, transposed"),
    Role.VECTOR: Route("row_norm", scale="row_rms", options={"momentum": 0.9}, why="RMS norm of a bias"),
}


def _constrained(route: Route) -> Route:
    """Return Scion's constrained step, `W <- (1 − η)W − η·ρ·lmo`: a rate of ηρ and a decay of 1/ρ, ρ = 50·multiple."""
    return replace(route, options={**route.options, "weight_decay": 1 / (50 * route.lr)})


PRESETS: dict[str, dict[Role, Route]] = {
    "default": ROUTES,
    # LOG 2026-11-28, "SOAP before the polar factor": ahead of the default on both seeds of rung 1, at more state than
    # AdamW's. MLPs have the side that rotates alone, whose basis is a quarter of both.
    "soap": _preset(
        {
            **ROUTES,
            **_changed(ROUTES, _ATTENTION, rule="soap_polar", view="whole", why="whitened in its eigenbases first"),
            **_changed(ROUTES, _MLP[:2], rule="soap_rows_polar", why="rows are neurons, columns in their eigenbasis"),
        }
    ),
    "paper-row": _PAPER_ROW,
    "paper-hybrid": _PAPER_HYBRID,
    "paper-left-router": _preset(
        {**_PAPER_ROW, Role.ROUTER: replace(_PAPER_ROW[Role.ROUTER], rule="centered_polar", why="left-spectral")}
    ),
    # The scripts of the source have alpha = 1: the step is as long as the momentum's nuclear norm.
    "paper-left-router-alpha-1": _preset(
        {
            **_PAPER_ROW,
            Role.ROUTER: replace(_PAPER_ROW[Role.ROUTER], rule="centered_polargrad", why="left-spectral, alpha = 1"),
        }
    ),
    # The router's baseline of the paper: AdamW at the README's rate of every arm, 7.5e-4 / 2e-2.
    "paper-row-adamw-router": _preset(
        {**_PAPER_ROW, Role.ROUTER: replace(ADAMW, lr=0.0375, why="the paper's router baseline")}, baseline=True
    ),
    # Every hidden matrix whole, AdamW for the rest.
    "muon": _preset(_MUON, baseline=True),
    # Zhang et al., arXiv 2602.21545: as Muon, rows and columns of the factor normalized; rate .04 of its scripts.
    "muon-plus": _preset(
        {
            **_MUON,
            **_changed(_MUON, _INNER, rule="muon_plus", scale="rms_to_rms", lr=2.0, why="Muon, then rows and columns"),
        },
        baseline=True,
    ),
    # As Muon, whitened before the polar factor in the eigenbases of the momentum; Jordan's rate.
    "soap-muon": _preset({**_MUON, **_changed(_MUON, _EQUAL, rule="soap_polar", why="SOAP, then Muon")}, baseline=True),
    # Lin et al., arXiv 2509.03378, with the betas of its code; 3e-3 of SOAP's code at the dial 0.02.
    "kl-soap": _preset(
        {**_MUON, **dict.fromkeys(_EQUAL, replace(_OWN_MEAN, rule="kl_soap", lr=0.15, why="Adam in KL eigenbases"))},
        baseline=True,
    ),
    # Ahn et al., arXiv 2504.05295: rate .01 and μ .95 of its code, full rank; the fraction 1/4 by name.
    **{
        name: _preset({**_MUON, **_changed(dict.fromkeys(_EQUAL, _DION), _EQUAL, rule=rule)}, baseline=True)
        for name, rule in (("dion", "dion"), ("dion-quarter", "dion_quarter"))
    },
    # Lau, Long & Su, arXiv 2505.21799: as Muon, times the nuclear norm; rate .02 and momentum .95 of its code.
    "polargrad": _preset(
        {**_MUON, **dict.fromkeys(_INNER, Route("polargrad", scale="unit", why="polar factor times nuclear norm"))},
        baseline=True,
    ),
    # Gong et al., arXiv 2602.09006, hybrid mode: AdamW for embeddings, head, router, vectors; updates at AdamW's RMS.
    "aro": _preset(
        {
            **_MUON,
            **_changed(_MUON, _INNER, scale="match_adamw_rms", lr=0.25, why="no side is known to be the stream's"),
            **dict.fromkeys(_READERS, _READS),
            **dict.fromkeys(_WRITERS, replace(_READS, view="whole")),
        },
        baseline=True,
    ),
    # Maity, arXiv 2509.24320: the normalized momentum over a divisor that is nearly 1, at AdamW's RMS and not at the
    # paper's size. 0.25 as for ARO: chosen here; no record.
    "auon": _preset(
        {
            **_MUON,
            **_changed(_MUON, _INNER, rule="auon", scale="match_adamw_rms_of_matrix", lr=0.25, why="braked momentum"),
        },
        baseline=True,
    ),
    "scion": _preset(_SCION, baseline=True),
    "scion-constrained": _preset({role: _constrained(route) for role, route in _SCION.items()}, baseline=True),
    # Loshchilov & Hutter, arXiv 1711.05101: one rule, rate and weight decay for everything.
    "adamw": make_table({role: replace(ADAMW, lr=1.0, weight_decay=1.0) for role in Role}, baseline=True),
    # The default's rules at an update RMS of 0.2, as Liu et al. (arXiv 2502.16982) match Muon: give it AdamW's rate, of
    # which every multiple is 1.
    "adamw-compatible": _preset(
        {
            **_changed(ROUTES, _INNER, scale="match_adamw_rms", lr=1.0),
            **_changed(ROUTES, (*_ENDS, Role.ROUTER), scale="match_adamw_rms_of_rows", lr=1.0),
            Role.VECTOR: replace(ADAMW, lr=1.0),
        }
    ),
}


def get_preset(name: str) -> dict[Role, Route]:
    """Return the named table.

    Args:
        name: A key of `PRESETS`.

    Returns:
        The route of every role.

    Raises:
        ValueError: There is no preset of that name; the message lists the names.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {sorted(PRESETS)}")
    return PRESETS[name]
