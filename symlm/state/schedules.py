"""What schedules change between two steps: rates, whose proportions are the table's, and momenta that are cycled."""

import warnings
from typing import Any

from torch import Tensor

Group = dict[str, Any]


class Schedules:
    """Watch the rates and betas of parameter groups, which schedulers write to.

    A scheduler that cycles momentum writes to `betas` where an optimizer has them: every group's momentum follows its
    β₁. A rate given as a tensor, which its owner fills, is followed by the groups' own. A scheduler that gives all
    groups one rate breaks the table's proportions: that is warned of once.
    """

    def __init__(self) -> None:
        self._beta1: list[float] = []
        self._rates: list[float | None] = []
        self._versions: list[int | None] = []
        self._multipliers: list[Tensor] = []
        self._warned = False

    def remember(self, groups: list[Group]) -> None:
        """Take the groups' values as they are now for those that were chosen."""
        self._beta1 = [group["betas"][0] for group in groups]
        self._rates = [_number(group["lr"]) for group in groups]
        self._versions = [_version(group["lr"]) for group in groups]
        dial = groups[0]["lr"]
        self._multipliers = (
            [(group["lr"] / dial).detach() for group in groups]
            if all(isinstance(group["lr"], Tensor) for group in groups) and _number(dial) != 0
            else []
        )

    def follow(self, groups: list[Group]) -> None:
        """Carry over what schedulers and callers wrote since the last step."""
        if len(groups) != len(self._beta1):
            self.remember(groups)
        for k, group in enumerate(groups):
            if group["betas"][0] != self._beta1[k] or "max_momentum" in group:  # which torch's cyclic schedulers leave
                self._beta1[k] = group["betas"][0]
                group["momentum"] = group["betas"][0]
        self._follow_tensor(groups)
        self._check_proportions(groups)

    def _follow_tensor(self, groups: list[Group]) -> None:
        """Where the first group's tensor alone was written to, it is the caller's dial: fill the others from it."""
        versions = [_version(group["lr"]) for group in groups]
        if versions == self._versions or not self._multipliers:
            return
        if versions[1:] == self._versions[1:]:
            for group, multiplier in zip(groups[1:], self._multipliers[1:], strict=True):
                group["lr"].copy_(groups[0]["lr"] * multiplier)
        self._versions = [_version(group["lr"]) for group in groups]

    def _check_proportions(self, groups: list[Group]) -> None:
        now = [_number(group["lr"]) for group in groups]
        if self._warned or None in now or None in self._rates or not all(now) or not all(self._rates):
            return
        before = [rate / self._rates[0] for rate in self._rates]  # type: ignore[operator]
        changed = [
            group.get("name", group["role"])
            for group, rate, share in zip(groups, now, before, strict=True)
            if abs(rate / now[0] - share) > 1e-3 * share  # type: ignore[operator]
        ]
        if changed:
            self._warned = True
            warnings.warn(
                f"the rates of {changed} left the table's proportions: a schedule sets one rate for all groups, where "
                "it should multiply them. Give it a list, e.g. max_lr=[g['lr'] for g in opt.param_groups], or leave "
                "out absolute bounds (eta_min, min_lr, swa_lr). Rates that you set on purpose need no change",
                stacklevel=4,
            )


def _number(lr: float | Tensor) -> float | None:
    """Return a rate that can be read without waiting for a device."""
    return float(lr) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else None


def _version(lr: float | Tensor) -> int | None:
    return lr._version if isinstance(lr, Tensor) else None
