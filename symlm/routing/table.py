"""The default table: the view, rule, scale and rate of each role. A route that claims too much is refused at import.

Rates are multiples of the one dial, which is 0.02 by default. "LOG" is recipes/LOG.md, by the date of an entry; the
runs that chose these numbers have widths 64 and 128 and 300 to 2,000 steps; the scales carry the rates to other widths.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from symlm.roles.role import Role
from symlm.rules import get_rule
from symlm.sizes.constraints import get_constraint
from symlm.sizes.scaling import SCALES
from symlm.symmetry import Symmetry, permutations, rotations, trivial

GRANULARITIES = ("whole", "heads", "qk_heads", "transposed", "pair")


SYMMETRIES: dict[Role, Symmetry] = {
    Role.EMBEDDING: Symmetry(permutations, rotations),
    Role.TIED_EMBEDDING: Symmetry(permutations, rotations),
    Role.LM_HEAD: Symmetry(permutations, rotations, shift=True),
    Role.CAPPED_LM_HEAD: Symmetry(permutations, rotations),
    Role.ROUTER: Symmetry(permutations, rotations, shift=True),
    Role.SIGMOID_ROUTER: Symmetry(permutations, rotations),
    # RoPE leaves q and k only one rotation per frequency pair; the group here is that of a head without RoPE.
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
    """Describe what updates the parameters of a role.

    Args:
        rule: A name of `symlm.rules.RULES`.
        view: The split into matrices, one of `GRANULARITIES`.
        scale: The factor on the direction, a name of `symlm.sizes.scaling.SCALES`.
        lr: The multiple of the optimizer's rate.
        weight_decay: The multiple of the optimizer's weight decay.
        why: The reason, for the reader of `describe_routing`.
        options: Options of the optimizer for this role; those that the user sets come first.
        constraint: What a step may do to the weight's size, see `symlm.sizes.constraints`.
    """

    rule: str
    view: str = "whole"
    scale: str = "keller"
    lr: float = 1.0
    weight_decay: float = 1.0
    why: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    constraint: str = "decay"


Table = Mapping[Role, Route]


def make_table(routes: Mapping[Role, Route], baseline: bool = False) -> dict[Role, Route]:
    """Check a table and return it.

    Args:
        routes: The route of every role.
        baseline: Whether the table breaks symmetries on purpose, as Adam's does; this skips only the last check.

    Returns:
        The table.

    Raises:
        ValueError: A role is missing, a rule, view or scale is unknown, or a role's symmetry is larger than the claim
            of its rule.
    """
    if {Role.LM_HEAD, Role.ROUTER} <= set(routes):
        routes = with_shifted_logits(routes) | dict(routes)
    missing = [str(role) for role in Role if role not in routes]
    if missing:
        raise ValueError(f"the table has no route for {missing}; give one for every role")
    for role, route in routes.items():
        claim = get_rule(route.rule).symmetry
        sized = get_constraint(route.constraint).symmetry
        for key, name, allowed in (("view", route.view, GRANULARITIES), ("scale", route.scale, list(SCALES))):
            if name not in allowed:
                raise ValueError(f"route of {role}: unknown {key} {name!r}; choose one of {allowed}")
        if not baseline and not replace(SYMMETRIES[role], shift=False) <= sized:
            raise ValueError(
                f"route of {role}: its symmetry {SYMMETRIES[role]} is larger than what {route.constraint!r} preserves, "
                f"{sized}; choose a constraint that claims more, or baseline=True"
            )
        if not baseline and not SYMMETRIES[role] <= claim:
            raise ValueError(
                f"route of {role}: its symmetry {SYMMETRIES[role]} is larger than what {route.rule!r} preserves, "
                f"{claim}; choose a rule that claims more, or baseline=True"
            )
    return dict(routes)


UNCENTERED = {
    "centered_row_norm": "row_norm",
    "centered_row_adam": "row_adam",
    "centered_whitened_row_adam": "whitened_row_adam",
    "centered_polar": "left_spectral",
    "centered_polargrad": "polargrad",
    "centered_row_then_polar": "row_then_polar",
    "centered_polar_then_row": "polar_then_row",
}


def uncentered(route: Route, why: str) -> Route:
    """Return a route whose rule is not centered, for logits that feel a shift of all rows.

    Args:
        route: The route of logits that a softmax makes blind to a shift.
        why: The reason, for the reader.
    """
    return replace(route, rule=UNCENTERED.get(route.rule, route.rule), why=why)


def with_shifted_logits(routes: Mapping[Role, Route]) -> dict[Role, Route]:
    """Return routes with those of capped heads and sigmoid routers, made from the head's and the router's.

    Args:
        routes: Routes, of `lm_head` and `router` among them.
    """
    return {
        **routes,
        Role.CAPPED_LM_HEAD: uncentered(routes[Role.LM_HEAD], "capped logits feel a shared shift"),
        Role.SIGMOID_ROUTER: uncentered(routes[Role.ROUTER], "a sigmoid feels a shared shift"),
    }


# Nesterov momentum for every role with momentum: LOG 2026-11-21, "the embedded default", 14 trials.
NESTEROV = {"nesterov": True}


# 0.95: LOG 2026-11-25, "which part of the table wins where", and the public record of long runs (modded-nanogpt, track
# 3), where no winner has shorter means. LORA and MATRIX have the same without a run of their own.
_INNER_MEAN = {"nesterov": True, "momentum": 0.95}


# 0.7 for all inner matrices, 0.014 at the dial 0.02: LOG 2026-11-22, "seventeen dials in twenty-four runs", Muon's arm,
# as in LOG 2026-11-25. The screening found that one inner rate does not matter within a factor of two, and that v and o
# are better whole.
HEADS_APART = Route("polar", view="heads", lr=0.7, why="each head is a matrix of its own", options=_INNER_MEAN)


_SUMMED_HEADS = replace(HEADS_APART, view="whole", why="the heads' outputs are summed: one matrix")


_IN = Route("left_spectral", lr=0.7, why="rows are neurons", options=_INNER_MEAN)


_OUT = replace(_IN, view="transposed", why="rows are neurons, permuted with gate and up")


# 2.5 (an RMS of 0.05 an entry at the dial 0.02), momentum 0.9 and β₂ 0.98: LOG 2026-11-25, "which part of the table
# wins where". No weight decay of embedding, head and router: as in the README of the paper's code; LOG 2026-11-21,
# "twenty more tries", has one run with it for the embedding, which is worse.
_TOKENS = Route(
    "row_adam",
    "whole",
    "row_rms",
    2.5,
    0.0,
    "a row is a token, rare or frequent",
    {"nesterov": False, "momentum": 0.9, "betas": (0.9, 0.98)},
)


# 15.0 (1.3 times the rate before), momentum 0.8 and β₂ 0.98: LOG 2026-11-22, "seventeen dials in twenty-four runs". β₁
# of `betas` is not used by this rule. The whitened rule: LOG 2026-11-22, "a whitened head is the default".
_LOGITS = Route(
    "centered_whitened_row_adam",
    "whole",
    "inverse_row_rms",
    15.0,
    0.0,
    "softmax ignores a shared shift",
    {"nesterov": True, "momentum": 0.8, "betas": (0.9, 0.98)},
)


# 5.6 was the head's rate, a row length of 0.01 at the dial 0.02 and width 128: LOG 2026-11-21, "the embedded default".
# No run chose it for the router; the MoE bench (LOG 2026-11-22, "bench small, MoE") ran at it. Momentum: 0.95.
_EXPERTS = Route("centered_row_norm", "whole", "inverse_row_rms", 5.6, 0.0, "top-k softmax ignores it too", NESTEROV)


# 0.5 is a rate of 0.01 for gains and biases: LOG 2026-11-22, "a whitened head is the default" (twice the rate before).
# No weight decay: chosen here; no record.
ADAMW = Route("adamw", scale="unit", lr=0.5, weight_decay=0.0, why="not a matrix: elementwise")


LONG_MEANS: dict[Role, Route] = make_table(
    {
        Role.EMBEDDING: _TOKENS,
        # The head's options: LOG 2026-11-22, 4.066 whitened and 3.901 with the screened options, on one seed each.
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
        # 0.7 as for the other inner matrices; no run of these roles is recorded.
        Role.LORA: Route("polar", lr=0.7, why="a low-rank adapter's factor", options=_INNER_MEAN),
        Role.MATRIX: Route("polar", lr=0.7, why="a dense matrix", options=_INNER_MEAN),
        Role.VECTOR: ADAMW,
    }
)


# Shorter means and smaller steps of tokens, attention and MLPs, together: LOG 2026-11-22, "seventeen dials in
# twenty-four runs", and 2026-11-29, "one default": ahead after 300 steps, of dense models and of mixtures of experts,
# and proved behind at no length. Experts have the longer means, as in the runs of mixtures of experts.
_SHORT = (
    *(Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_O, Role.ATTENTION_QKV),
    *(Role.MLP_IN, Role.MLP_OUT),
)


ROUTES: dict[Role, Route] = make_table(
    {
        **LONG_MEANS,
        **{r: replace(LONG_MEANS[r], lr=0.5, options={"nesterov": True, "momentum": 0.85}) for r in _SHORT},
        Role.EMBEDDING: replace(_TOKENS, lr=0.75, options={"nesterov": True, "momentum": 0.7, "betas": (0.9, 0.95)}),
    }
)
