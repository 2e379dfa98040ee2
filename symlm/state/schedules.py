"""What schedules change between two steps: rates, whose proportions are the table's, and momenta that are cycled."""

import warnings
from typing import Any

from torch import Tensor

from symlm.routing.values import check_values
from symlm.rules import get_rule

Group = dict[str, Any]


class Schedules:
    """Watch the rates and betas of parameter groups, which schedulers write to.

    A scheduler that cycles momentum writes to `betas` where an optimizer has them: every group's momentum follows its
    β₁, but for rules that store a mean of β₁ themselves.

    A rate given as a tensor, which its owner fills, is followed by the groups' own. A scheduler that gives all
    groups one rate breaks the table's proportions: that is warned of once.
    """

    def __init__(self) -> None:
        self._groups: list[Group] = []
        self._beta1: list[float] = []
        self._rates: list[float | None] = []
        self._versions: list[int | None] = []
        self._shares: list[Tensor | None] = []
        self._dial: int | None = None
        self._warned = False

    def remember(self, groups: list[Group], dial: Any) -> None:
        """Take the groups' values as they are now for those that were chosen.

        Args:
            groups: The parameter groups.
            dial: The rate that the caller gave; a tensor is watched.
        """
        self._groups = list(groups)
        self._beta1 = [group["betas"][0] for group in groups]
        self._rates = [_number(group["lr"]) for group in groups]
        self._versions = [_version(group["lr"]) for group in groups]
        dial = _dial_of(groups, dial)
        self._dial = _version(dial)
        self._shares = [_share(group["lr"], dial) for group in groups]

    def follow(self, groups: list[Group], dial: Any) -> None:
        """Carry over what schedulers and callers wrote since the last step.

        Args:
            groups: The parameter groups, or one of them where ZeRO steps group by group, and all are looked at; momenta
                and rates are written.
            dial: The rate that the caller gave.
        """
        if all(any(group is known for known in self._groups) for group in groups):
            groups = self._groups
        if len(groups) != len(self._beta1):
            self.remember(groups, dial)
        for k, group in enumerate(groups):
            if group["betas"][0] != self._beta1[k] or "max_momentum" in group:  # which torch's cyclic schedulers leave
                self._beta1[k] = group["betas"][0]
                if not get_rule(group["rule"]).own_mean:  # whose mean is of β₁ already
                    group["momentum"] = group["betas"][0]
        self._follow_tensor(groups, _dial_of(groups, dial))
        self._check_proportions(groups)

    def _follow_tensor(self, groups: list[Group], dial: Any) -> None:
        """Where the caller wrote to the dial, fill the rates from it that nobody else wrote to."""
        if _version(dial) != self._dial:
            check_values("the tensor that was given as rate", {"lr": dial})
            for k, group in enumerate(groups):
                share = self._shares[k]
                if share is not None and _version(group["lr"]) == self._versions[k]:
                    group["lr"].copy_(dial.view(()) * share)
            self._dial = _version(dial)
            self._rates = [_number(group["lr"]) for group in groups]
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


def _dial_of(groups: list[Group], dial: Any) -> Any:
    return dial if isinstance(dial, Tensor) or not groups else groups[0]["lr"]


def _share(lr: float | Tensor, dial: Any) -> Tensor | None:
    """Return a rate's share of the dial; None for one that is not a tensor, or that shares the dial's memory."""
    if not isinstance(lr, Tensor) or not isinstance(dial, Tensor) or lr.data_ptr() == dial.data_ptr():
        return None
    return (lr / dial.view(())).detach() if _number(dial) != 0 else None
