"""The checks of `SymOptimizer.verify`, that every rule really ran."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.tensors import gathered
from symlm.routing.options import named_parameters
from symlm.rules import Rule, get_rule
from symlm.rules.rule import DENSE
from symlm.state.quantization import SCALES, dequantized
from symlm.step.directions import rule_state, whole_directions
from symlm.views.matrix_view import MatrixView

PROMISES = {  # the largest departure, from rounding or from five Newton–Schulz steps
    "unit rows": 1e-3,
    "unit columns": 1e-3,
    "rows' directions": 1e-3,
    "rows' senses": 1e-3,
    "unit RMS": 1e-3,
    "the matrix's direction": 1e-3,
    "zero column sums": 1e-3,
    "singular values": 0.35,
    "spectral norm": 0.35,
    "signs": 1e-3,
    "a whole rank": 1e-3,
    "Adam's size": 1e-3,
}
MEANS = {"momentum", "exp_avg"}


@dataclass(frozen=True)
class Check:
    """Report how far the last step's direction of one parameter departs from a promise of its rule.

    Args:
        name: The parameter's name.
        role: Its role.
        rule: Its rule.
        promise: The promise, a key of `PROMISES`.
        departure: The largest departure of its matrices, relative.
    """

    name: str
    role: str
    rule: str
    promise: str
    departure: float

    @property
    def holds(self) -> bool:
        """Whether the departure is within the promise's bound."""
        return self.departure <= PROMISES[self.promise]

    def __str__(self) -> str:
        bound = PROMISES[self.promise]
        return f"{self.name} ({self.role}, {self.rule}): {self.promise} off by {self.departure:.2g}, bound {bound:g}"


class Verification(list[Check]):
    """List the checks of `SymOptimizer.verify`; printed, the largest departure of each role."""

    def __str__(self) -> str:
        worst: dict[tuple[str, str, str], float] = {}
        for check in self:
            key = (check.role, check.rule, check.promise)
            worst[key] = max(worst.get(key, 0.0), check.departure)
        return "\n".join(
            f"{role:16} {rule:20} {promise:18} off by at most {departure:.1e} (bound {PROMISES[promise]:g})"
            for (role, rule, promise), departure in worst.items()
        )


def verified(
    groups: list[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    matrices: int,
    moved: Collection[Tensor] | None,
) -> Verification:
    """Check the last step of all parameters.

    Args:
        groups: The optimizer's groups.
        states: Its states.
        matrices: How many matrices of each parameter are checked at most.
        moved: The parameters that had a gradient in the last step; none if it was skipped, None if nobody knows.

    Returns:
        The checks.

    Raises:
        RuntimeError: A direction departs from a promise, or a parameter had no step or no gradient; all are named.
    """
    checks, failures = Verification(), []
    for group in groups:
        rule = get_rule(group["rule"])
        for name, p in named_parameters(group):
            state = states.get(p, {})
            if not state or group.get("step", 0) < 1:
                failures.append(f"{name} ({group['role']}): no step has reached it")
            elif moved is not None and p not in moved:
                failures.append(f"{name} ({group['role']}): the last step did not move it: no finite gradient")
            elif p.numel() and not any(
                gathered(state[key]).any() for key in sorted(MEANS & state.keys())
            ):  # by all ranks
                failures.append(f"{name} ({group['role']}): no gradient has reached it, or zeros alone")
            elif p.numel() and not rule.elementwise:
                for promise, departure in departures(group, state, matrices).items():
                    checks.append(Check(name, group["role"], rule.name, promise, departure))
    failures += [str(check) for check in checks if not check.holds]
    if failures:
        raise RuntimeError("the last step was not what the table prescribes:\n  " + "\n  ".join(failures))
    return checks


def departures(group: dict[str, Any], state: dict[str, Any], matrices: int) -> dict[str, float]:
    """Compute how far a parameter's direction, computed again from its state, departs from its rule's promises.

    Args:
        group: The parameter group.
        state: The parameter's state after the step.
        matrices: How many of its matrices are checked at most.

    Returns:
        The largest departure of each promise.
    """
    if get_rule(group["rule"]).reads_weight:  # of which the step has left the next one
        return {}
    whole = {key: gathered(value) for key, value in state.items()}
    momentum, states = whole["momentum"], [rule_state(group, whole)]
    if SCALES in whole:
        momentum = dequantized(momentum, whole[SCALES])
    (U,), _ = whole_directions({**group, "scale": "unit"}, momentum[None], states=states, refresh=False)
    worst: dict[str, float] = {}
    view = MatrixView.parse(group["view"])
    for (section, M), (_, part) in zip(view.sections(momentum), view.sections(U), strict=True):
        stacks = [section.to_matrices(x.double())[:matrices] for x in (M, part)]
        for promise, departure in departures_of(get_rule(group["rule"]), *stacks).items():
            worst[promise] = max(worst.get(promise, 0.0), departure)
    return worst


def departures_of(rule: Rule, M: Tensor, U: Tensor) -> dict[str, float]:
    """Compute how far directions U depart from a rule's promises for M. It takes SVDs, and waits for the device.

    Args:
        rule: The rule.
        M: The rule's inputs, (b, m, n), float64.
        U: Their directions, same shape and dtype.

    Returns:
        The largest departure of each promise; zero rows and zero matrices are left out.
    """
    departure: dict[str, Tensor] = {}
    lengths, moved = M.norm(dim=-1), U.norm(dim=-1)
    if rule.row_map and not rule.symmetry.shift:
        if rule.state:
            along = (M * U).sum(dim=-1) / (lengths * moved).clamp(min=1e-300)
            along = along[lengths > 0]
            if rule.whitens:
                departure["rows' senses"] = (-along).clamp(min=0)
            else:
                departure["rows' directions"] = (along - 1).abs()
        else:
            departure["unit rows"] = (moved - 1)[lengths > 0].abs()
    if rule.symmetry.shift:
        departure["zero column sums"] = U.sum(dim=-2).abs() / U.abs().sum(dim=-2).clamp(min=1e-300)
    if "rotation" in rule.state:
        sizes = U.square().mean(dim=(-2, -1))
        departure["unit RMS"] = (sizes - 1)[sizes > 0].abs()
    elif rule.symmetry == DENSE and not rule.state:
        L, S, Rh = torch.linalg.svd(M, full_matrices=False)
        size = S.sum(dim=-1, keepdim=True) if rule.degree else torch.ones_like(S[..., :1])
        values = (L.mT @ U @ Rh.mT).diagonal(dim1=-2, dim2=-1) / size.clamp(min=1e-300)
        departure["singular values"] = (values - 1)[1e-2 * S.norm(dim=-1, keepdim=True) < S].abs()
    elif rule.spectral and rule.name.endswith("polar"):
        norms = torch.linalg.matrix_norm(U, ord=2)
        departure["spectral norm"] = (norms - 1)[norms > 0].abs()
    if rule.name in ("auon", "auon_unnormalized"):
        sizes = (M.square().sum(dim=(-2, -1)) * U.square().sum(dim=(-2, -1))).sqrt()
        departure["the matrix's direction"] = ((M * U).sum(dim=(-2, -1)) / sizes - 1)[sizes > 0].abs()
    if rule.own_mean and "left_factor" in rule.state:  # the squared norm counts the columns
        ranks = U.square().sum(dim=(-2, -1))
        departure["a whole rank"] = (ranks / ranks.round().clamp(min=1) - 1)[ranks > 0].abs()
    elif rule.own_mean:
        departure["Adam's size"] = (U.square().mean(dim=(-2, -1)).sqrt() / 3 - 1).clamp(min=0)
    if rule.name == "muon_plus":
        departure["unit columns"] = (U.norm(dim=-2) - 1)[M.norm(dim=-2) > 0].abs()
    if rule.name == "sign":
        departure["signs"] = (U.abs() - 1)[M != 0].abs()
    return {promise: float(x.max()) for promise, x in departure.items() if x.numel()}
