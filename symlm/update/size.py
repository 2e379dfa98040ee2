"""The size of a step: the sum of squares of its update, by role, of this rank's parts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symlm.state.originals import Originals
from symlm.update.adamw import adamw_update


class Change(NamedTuple):
    """Hold the size of a change, of which the sum of squares is computed when someone asks for it.

    Args:
        factor: A number that multiplies the norms.
        norms: Tensors of norms, any shapes.
        squared: Tensors of squares of norms, any shapes.
    """

    factor: float
    norms: Sequence[Tensor] = ()
    squared: Sequence[Tensor] = ()

    def squares(self) -> Tensor:
        """Return the sum of squares, one element."""
        parts = [(self.factor * norm).square().sum() for norm in self.norms] + [x.sum() for x in self.squared]
        return torch.stack(parts).sum()


class UpdateSize:
    """Accumulate `Σ(ηsU)²` of the last step without the decay, and the number of entries.

    A part of a group that a step does not reach retains its last value. DeepSpeed steps group by group, and a group in
    several calls with other parameters, so that one step may be many calls.
    """

    def __init__(self) -> None:
        self._changes: dict[tuple[str, Tensor], tuple[list[Change], int]] = {}
        self._adamw: dict[tuple[str, Tensor], list[tuple[dict[str, Any], dict[str, Any], int]]] = {}

    def begin(self, groups: list[dict[str, Any]]) -> None:
        """Reset the sums of these groups.

        Args:
            groups: The groups of the step that begins.
        """
        self._changes |= {_key(group): ([], 0) for group in groups}

    def add(self, group: dict[str, Any], change: Change, count: int) -> None:
        """Add a part of a group's step.

        Args:
            group: The group.
            change: The size of the part's `ηsU`.
            count: Its number of entries.
        """
        changes, before = self._changes[_key(group)]
        changes.append(change)
        self._changes[_key(group)] = (changes, before + count)

    def of_adamw(self, group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]], originals: Originals) -> None:
        """Record a step of AdamW, of which `by_role` computes the update.

        Args:
            group: The group.
            states: The optimizer's state.
            originals: The parameters of ZeRO's partitions, whose padding does not count.
        """
        settings = {key: group[key] for key in ("lr", "betas", "eps")}
        if isinstance(settings["lr"], Tensor):
            settings["lr"] = settings["lr"].clone()  # a schedule writes to it
        stepped = [p for p in group["params"] if p.grad is not None]
        self._adamw[_key(group)] = [(settings, states[p], originals.entries(p)) for p in stepped]

    def by_role(self) -> dict[str, tuple[Tensor, int]]:
        """Return `Σ(ηsU)²`, and the number of entries, by role."""
        parts = []
        for (role, _), (changes, count) in self._changes.items():
            sums = [change.squares() for change in changes]
            parts += [(role, torch.stack([x.to(sums[0].device) for x in sums]).sum(), count)] if sums else []
        for (role, _), stepped in self._adamw.items():
            parts += [(role, adamw_update(group, state).square().sum(), count) for group, state, count in stepped]
        totals: dict[str, tuple[Tensor, int]] = {}
        for role, squares, count in parts:
            before = totals.get(role, (torch.zeros_like(squares), 0))
            totals[role] = (before[0] + squares.to(before[0].device), before[1] + count)
        return totals


def _key(group: dict[str, Any]) -> tuple[str, Tensor]:
    """Return a key of this call's part of a group: its role and first parameter."""
    return group["role"], group["params"][0]
