"""The arms of the paper, and what all presets are made with.

Rates are multiples of the one dial, which is 0.02 by default; "LOG" is recipes/LOG.md, by the date of an entry.
"""

from dataclasses import replace
from typing import Any

from symlm.roles.role import Role
from symlm.routing.table import ADAMW, HEADS_APART, LONG_MEANS, NESTEROV, Route, Table, make_table, with_shifted_logits

ENDS = (Role.EMBEDDING, Role.TIED_EMBEDDING, Role.LM_HEAD)


SHIFTED = (Role.CAPPED_LM_HEAD, Role.SIGMOID_ROUTER)  # made from the head's and the router's routes


MLP = (Role.MLP_IN, Role.MLP_OUT, Role.EXPERT_IN, Role.EXPERT_OUT)


ATTENTION = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_O)


INNER = tuple(role for role in Role if role not in (*ENDS, *SHIFTED, Role.ROUTER, Role.VECTOR))


def changed(table: Table, roles: tuple[Role, ...], **changes: Any) -> dict[Role, Route]:
    """Return the routes of some roles, changed alike.

    Args:
        table: Routes, of these roles among them.
        roles: The roles.
        changes: Fields of `Route`.
    """
    return {role: replace(table[role], **changes) for role in roles}


def preset(routes: Table, baseline: bool = False) -> dict[Role, Route]:
    """Check a table whose capped heads and sigmoid routers follow from its head and router.

    Args:
        routes: The route of every other role.
        baseline: Whether it breaks symmetries on purpose, see `make_table`.
    """
    return make_table(with_shifted_logits(routes), baseline)


# arXiv 2605.18106, the Qwen3 runs (README of the code): Muon on each head and on the MLP, row norms at the ends. The
# dial is the matrices' rate, 2e-2, so their multiple is 1. Momentum is 0.95, the optimizer's default; Nesterov momentum
# is Muon's alone. Weight decay is 0 for embedding, head and router, and the matrices' for the rest.
_PAPER_ROW = preset(
    {
        **LONG_MEANS,
        **changed(LONG_MEANS, INNER, lr=1.0, options=NESTEROV),
        **dict.fromkeys(
            (Role.ATTENTION_V, Role.ATTENTION_O, Role.ATTENTION_QKV), replace(HEADS_APART, lr=1.0, options=NESTEROV)
        ),
        **changed(LONG_MEANS, MLP, rule="polar", view="whole", lr=1.0, options=NESTEROV, why="Muon, whole"),
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
_PAPER_HYBRID = preset(
    {
        **_PAPER_ROW,
        **changed(_PAPER_ROW, ENDS, rule="row_then_polar", why="hybrid, alpha = 0"),
        **changed(LONG_MEANS, MLP, rule="row_then_polar", scale="unit", lr=1.0, options={}, why="hybrid, alpha = 0"),
        Role.LM_HEAD: replace(_PAPER_ROW[Role.LM_HEAD], rule="centered_row_then_polar", why="hybrid, alpha = 0"),
    }
)


# 1e-1 and 1e-3 over 2e-2: the README's rates of AdamW at the ends; a tied weight goes to the head's optimizer there.
_ADAMW_ENDS = {
    Role.EMBEDDING: replace(ADAMW, lr=5.0, why="the paper's AdamW arm"),
    Role.TIED_EMBEDDING: replace(ADAMW, lr=0.05, why="the paper's AdamW arm"),
    Role.LM_HEAD: replace(ADAMW, lr=0.05, why="the paper's AdamW arm"),
}


def _of(table: Table, roles: tuple[Role, ...]) -> dict[Role, Route]:
    """Return the routes of some roles."""
    return {role: table[role] for role in roles}


def _router(rule: str, why: str) -> dict[Role, Route]:
    """Return the row arm with another rule for the router."""
    return {**_PAPER_ROW, Role.ROUTER: replace(_PAPER_ROW[Role.ROUTER], rule=rule, why=why)}


PAPER: dict[str, dict[Role, Route]] = {
    # Ends by MLP, rows of the grid by columns: {row, hybrid, AdamW} by {Muon, hybrid}; Muon a head in attention.
    "paper-row": _PAPER_ROW,
    "paper-hybrid-ends": preset({**_PAPER_ROW, **_of(_PAPER_HYBRID, ENDS)}),
    "paper-adamw-ends": preset({**_PAPER_ROW, **_ADAMW_ENDS}, baseline=True),
    "paper-hybrid-mlp": preset({**_PAPER_ROW, **_of(_PAPER_HYBRID, MLP)}),
    "paper-hybrid": _PAPER_HYBRID,
    "paper-adamw-ends-hybrid-mlp": preset({**_PAPER_HYBRID, **_ADAMW_ENDS}, baseline=True),
    # The router study, at one rate as there.
    "paper-left-router": preset(_router("centered_polar", "left-spectral")),
    # The scripts of the source have alpha = 1: the step is as long as the momentum's nuclear norm.
    "paper-left-router-alpha-1": preset(_router("centered_polargrad", "left-spectral, alpha = 1")),
    "paper-hybrid-router": preset(_router("centered_row_then_polar", "hybrid, alpha = 0")),
    # The ablation: it feels the shift that a top-k softmax ignores.
    "paper-uncentered-router": preset(_router("left_spectral", "left-spectral, not centered"), baseline=True),
    # The router's baseline of the paper: AdamW at the README's rate of every arm, 7.5e-4 / 2e-2.
    "paper-row-adamw-router": preset(
        {**_PAPER_ROW, Role.ROUTER: replace(ADAMW, lr=0.0375, why="the paper's router baseline")}, baseline=True
    ),
}
