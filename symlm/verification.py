"""Whether the rules really ran: the checks of `SymOptimizer.verify`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.tensors import gathered, local
from symlm.routing.options import named_parameters
from symlm.rules import Rule, get_rule
from symlm.rules.rule import DENSE
from symlm.step.directions import rule_state, whole_directions
from symlm.views.matrix_view import MatrixView

PROMISES = {  # the departure that rounding, or five Newton–Schulz steps, may leave
    "unit rows": 1e-3,
    "rows' directions": 1e-3,
    "rows' senses": 1e-3,
    "unit RMS": 1e-3,
    "the matrix's direction": 1e-3,
    "zero column sums": 1e-3,
    "singular values": 0.35,
    "spectral norm": 0.35,
    "signs": 1e-3,
}
MEANS = {"momentum", "exp_avg"}


@dataclass(frozen=True)
class Check:
    """One promise of one parameter's rule, and how far the last step's direction is from it."""

    name: str
    role: str
    rule: str
    promise: str
    departure: float

    @property
    def holds(self) -> bool:
        """Tell whether the departure is within the promise's bound."""
        return self.departure <= PROMISES[self.promise]

    def __str__(self) -> str:
        bound = PROMISES[self.promise]
        return f"{self.name} ({self.role}, {self.rule}): {self.promise} off by {self.departure:.2g}, bound {bound:g}"


class Verification(list[Check]):
    """The checks of `SymOptimizer.verify`, a list; printed, the worst of each role."""

    def __str__(self) -> str:
        worst: dict[tuple[str, str, str], float] = {}
        for check in self:
            key = (check.role, check.rule, check.promise)
            worst[key] = max(worst.get(key, 0.0), check.departure)
        return "\n".join(
            f"{role:16} {rule:20} {promise:18} off by at most {departure:.1e} (bound {PROMISES[promise]:g})"
            for (role, rule, promise), departure in worst.items()
        )


def verified(groups: list[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]], matrices: int) -> Verification:
    """Return the checks of all parameters.  Raises: RuntimeError, naming what broke its promise or saw no step."""
    checks, failures = Verification(), []
    for group in groups:
        rule = get_rule(group["rule"])
        for name, p in named_parameters(group):
            state = states.get(p, {})
            if not state or group.get("step", 0) < 1:
                failures.append(f"{name} ({group['role']}): no step has reached it")
            elif p.grad is None and p.numel() and not any(local(state[key]).any() for key in MEANS & state.keys()):
                failures.append(f"{name} ({group['role']}): no gradient has reached it, or zeros alone")
            elif p.numel() and not rule.elementwise:
                for promise, departure in departures(group, state, matrices).items():
                    checks.append(Check(name, group["role"], rule.name, promise, departure))
    failures += [str(check) for check in checks if not check.holds]
    if failures:
        raise RuntimeError("the optimizer did not do what its table says:\n  " + "\n  ".join(failures))
    return checks


def departures(group: dict[str, Any], state: dict[str, Any], matrices: int) -> dict[str, float]:
    """Return how far a parameter's direction, computed again from its state, is from each of its rule's promises."""
    whole = {key: gathered(value) for key, value in state.items()}
    momentum, states = whole["momentum"], [rule_state(group, whole)]
    (U,), _ = whole_directions({**group, "scale": "unit"}, momentum[None], states=states, refresh=False)
    worst: dict[str, float] = {}
    view = MatrixView.parse(group["view"])
    for (section, M), (_, part) in zip(view.sections(momentum), view.sections(U), strict=True):
        stacks = [section.to_matrices(x.double())[:matrices] for x in (M, part)]
        for promise, departure in departures_of(get_rule(group["rule"]), *stacks).items():
            worst[promise] = max(worst.get(promise, 0.0), departure)
    return worst


def departures_of(rule: Rule, M: Tensor, U: Tensor) -> dict[str, float]:
    """Return how far U is from what a rule promises of M, by promise.

    Shapes: (b, m, n) twice, float64. Rows and matrices that are zero promise nothing. Reads the device, and takes SVDs.
    """
    found: dict[str, Tensor] = {}
    lengths, moved = M.norm(dim=-1), U.norm(dim=-1)
    if rule.row_map and not rule.symmetry.shift:
        if rule.state:
            along = (M * U).sum(dim=-1) / (lengths * moved).clamp(min=1e-300)
            along = along[lengths > 0]
            if rule.whitens:
                found["rows' senses"] = (-along).clamp(min=0)
            else:
                found["rows' directions"] = (along - 1).abs()
        else:
            found["unit rows"] = (moved - 1)[lengths > 0].abs()
    if rule.symmetry.shift:
        found["zero column sums"] = U.sum(dim=-2).abs() / U.abs().sum(dim=-2).clamp(min=1e-300)
    if "rotation" in rule.state:
        sizes = U.square().mean(dim=(-2, -1))
        found["unit RMS"] = (sizes - 1)[sizes > 0].abs()
    elif rule.symmetry == DENSE:
        L, S, Rh = torch.linalg.svd(M, full_matrices=False)
        size = S.sum(dim=-1, keepdim=True) if rule.degree else torch.ones_like(S[..., :1])
        own = (L.mT @ U @ Rh.mT).diagonal(dim1=-2, dim2=-1) / size.clamp(min=1e-300)
        found["singular values"] = (own - 1)[1e-2 * S.norm(dim=-1, keepdim=True) < S].abs()
    elif rule.spectral and rule.name.endswith("polar"):
        norms = torch.linalg.matrix_norm(U, ord=2)
        found["spectral norm"] = (norms - 1)[norms > 0].abs()
    if rule.name in ("auon", "auon_unnormalized"):
        sizes = (M.square().sum(dim=(-2, -1)) * U.square().sum(dim=(-2, -1))).sqrt()
        found["the matrix's direction"] = ((M * U).sum(dim=(-2, -1)) / sizes - 1)[sizes > 0].abs()
    if rule.name == "sign":
        found["signs"] = (U.abs() - 1)[M != 0].abs()
    return {promise: float(values.max()) for promise, values in found.items() if values.numel()}
