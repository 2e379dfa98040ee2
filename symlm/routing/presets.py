"""Presets beside the default table: the paper's arms, related systems and the baselines.

Rates are multiples of the one dial, which is 0.02 by default; "LOG" is recipes/LOG.md, by the date of an entry.
"""

from dataclasses import replace

from symlm.roles.role import Role
from symlm.routing.paper import ATTENTION, ENDS, INNER, MLP, PAPER, changed, preset
from symlm.routing.table import ADAMW, LONG_MEANS, NESTEROV, ROUTES, Route, make_table

# Jordan et al. 2024: the dial is the hidden matrices' rate, 0.02; Nesterov momentum of 0.95, the optimizer's default.
# The rest has the default table's ADAMW. The screened rates of LOG 2026-11-22 are in recipes/configs/muon.yaml.
_MUON: dict[Role, Route] = {
    **dict.fromkeys(INNER, Route("polar", options=NESTEROV, why="Muon: hidden matrices, whole")),
    **dict.fromkeys((*ENDS, Role.ROUTER, Role.VECTOR), ADAMW),
}


# A rule with a state needs matrices of one shape, which fused q, k and v are not.
_EQUAL = tuple(role for role in INNER if role is not Role.ATTENTION_QKV)


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
    **dict.fromkeys(INNER, Route("polar", scale="rms_to_rms", options={"momentum": 0.9}, why="spectral norm")),
    **dict.fromkeys((Role.TIED_EMBEDDING, Role.LM_HEAD, Role.ROUTER), replace(_SCION_SIGN, options={"momentum": 0.9})),
    Role.EMBEDDING: Route("row_norm", scale="row_rms", options={"momentum": 0.9}, why="column norm, transposed"),
    Role.VECTOR: Route("row_norm", scale="row_rms", options={"momentum": 0.9}, why="RMS norm of a bias"),
}


def _constrained(route: Route) -> Route:
    """Return Scion's constrained step, `W <- (1 − η)W − η·ρ·lmo`: a rate of ηρ and a decay of 1/ρ, ρ = 50·multiple."""
    return replace(route, options={**route.options, "weight_decay": 1 / (50 * route.lr)})


PRESETS: dict[str, dict[Role, Route]] = {
    "default": ROUTES,
    "long-means": LONG_MEANS,  # the default of dense models until 2026-11-29
    # LOG 2026-11-28, "SOAP before the polar factor": with the long means, ahead of them on rung 1, at more state than
    # AdamW's. MLPs have the side that rotates alone, whose basis is a quarter of both.
    "soap": preset(
        {
            **LONG_MEANS,
            **changed(LONG_MEANS, ATTENTION, rule="soap_polar", view="whole", why="whitened in its eigenbases first"),
            **changed(LONG_MEANS, MLP[:2], rule="soap_rows_polar", why="rows are neurons, columns in their eigenbasis"),
        }
    ),
    **PAPER,
    # Every hidden matrix whole, AdamW for the rest.
    "muon": preset(_MUON, baseline=True),
    # Zhang et al., arXiv 2602.21545: as Muon, rows and columns of the factor normalized; rate .04 of its scripts.
    "muon-plus": preset(
        {
            **_MUON,
            **changed(_MUON, INNER, rule="muon_plus", scale="rms_to_rms", lr=2.0, why="Muon, then rows and columns"),
        },
        baseline=True,
    ),
    # As Muon, whitened before the polar factor in the eigenbases of the momentum; Jordan's rate.
    "soap-muon": preset({**_MUON, **changed(_MUON, _EQUAL, rule="soap_polar", why="SOAP, then Muon")}, baseline=True),
    # Lin et al., arXiv 2509.03378, with the betas of its code; 3e-3 of SOAP's code at the dial 0.02.
    "kl-soap": preset(
        {**_MUON, **dict.fromkeys(_EQUAL, replace(_OWN_MEAN, rule="kl_soap", lr=0.15, why="Adam in KL eigenbases"))},
        baseline=True,
    ),
    # Ahn et al., arXiv 2504.05295: rate .01 and μ .95 of its code, full rank; the fraction 1/4 by name.
    **{
        name: preset({**_MUON, **changed(dict.fromkeys(_EQUAL, _DION), _EQUAL, rule=rule)}, baseline=True)
        for name, rule in (("dion", "dion"), ("dion-quarter", "dion_quarter"))
    },
    # Lau, Long & Su, arXiv 2505.21799: as Muon, times the nuclear norm; rate .02 and momentum .95 of its code.
    "polargrad": preset(
        {**_MUON, **dict.fromkeys(INNER, Route("polargrad", scale="unit", why="polar factor times nuclear norm"))},
        baseline=True,
    ),
    # Gong et al., arXiv 2602.09006, hybrid mode: AdamW for embeddings, head, router, vectors; updates at AdamW's RMS.
    "aro": preset(
        {
            **_MUON,
            **changed(_MUON, INNER, scale="match_adamw_rms", lr=0.25, why="no side is known to be the stream's"),
            **dict.fromkeys(_READERS, _READS),
            **dict.fromkeys(_WRITERS, replace(_READS, view="whole")),
        },
        baseline=True,
    ),
    # Full-model mode: both ends too, whose columns are the stream's; their multiples of the rate are those inside.
    "aro-full": preset(
        {
            **_MUON,
            **changed(_MUON, INNER, scale="match_adamw_rms", lr=0.25, why="no side is known to be the stream's"),
            **dict.fromkeys((*_READERS, *ENDS), _READS),
            **dict.fromkeys(_WRITERS, replace(_READS, view="whole")),
        },
        baseline=True,
    ),
    # Maity, arXiv 2509.24320: the normalized momentum over a divisor that is nearly 1, at AdamW's RMS and not at the
    # paper's size. 0.25 as for ARO: chosen here; no record.
    "auon": preset(
        {
            **_MUON,
            **changed(_MUON, INNER, rule="auon", scale="match_adamw_rms_of_matrix", lr=0.25, why="braked momentum"),
        },
        baseline=True,
    ),
    "scion": preset(_SCION, baseline=True),
    "scion-constrained": preset({role: _constrained(route) for role, route in _SCION.items()}, baseline=True),
    # Loshchilov & Hutter, arXiv 1711.05101: one rule, rate and weight decay for everything.
    "adamw": make_table({role: replace(ADAMW, lr=1.0, weight_decay=1.0) for role in Role}, baseline=True),
    # The default's rules at an update RMS of 0.2, as Liu et al. (arXiv 2502.16982) match Muon: give it AdamW's rate, of
    # which every multiple is 1.
    "adamw-compatible": preset(
        {
            **changed(LONG_MEANS, INNER, scale="match_adamw_rms", lr=1.0),
            **changed(LONG_MEANS, (*ENDS, Role.ROUTER), scale="match_adamw_rms_of_rows", lr=1.0),
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
