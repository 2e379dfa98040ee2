"""Whether the rules really ran: the checks of `SymOptimizer.verify`."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from symlm.rules import PROMISES, Rule
from symlm.step import whole_directions
from symlm.views import MatrixView


@dataclass(frozen=True)
class Check:
    """One promise of one parameter's rule, and how far the last step's direction is from it."""

    name: str
    role: str
    rule: str
    promise: str
    departure: float

    @property
    def kept(self) -> bool:
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


def departures(group: dict[str, Any], rule: Rule, momentum: Tensor, matrices: int) -> dict[str, float]:
    """Return how far the direction of a whole momentum is from each of its rule's promises."""
    unscaled = {**group, "scale": "unit"}
    (U,) = whole_directions(unscaled, [momentum])
    worst: dict[str, float] = {}
    view = MatrixView.parse(group["view"])
    for (section, M), (_, part) in zip(view.sections(momentum), view.sections(U), strict=True):
        stacks = [section.to_matrices(x.double())[:matrices] for x in (M, part)]
        for promise, departure in rule.departures(*stacks).items():
            worst[promise] = max(worst.get(promise, 0.0), departure)
    return worst
