"""The size of a step: the sum of squares of its update, by role, of this rank's parts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from symlm.state.originals import Originals
from symlm.update.adamw import adamw_update


class UpdateSize:
    """Accumulate `Σ(ηsU)²` of the last step without the decay, and the number of entries.

    A part of a group that a step does not reach retains its last value. DeepSpeed steps group by group, and a group in
    several calls with other parameters, so that one step may be many calls.
    """

    def __init__(self) -> None:
        self._squares: dict[tuple[str, Tensor], tuple[Tensor, int]] = {}
        self._adamw: dict[tuple[str, Tensor], list[tuple[dict[str, Any], dict[str, Any], int]]] = {}

    def begin(self, groups: list[dict[str, Any]], device: torch.device) -> None:
        """Reset the sums of these groups.

        Args:
            groups: The groups of the step that begins.
            device: The device of the sums.
        """
        self._squares |= {_key(group): (torch.zeros((), device=device), 0) for group in groups}

    def add(self, group: dict[str, Any], squares: Tensor, count: int) -> None:
        """Add a part of a group's step.

        Args:
            group: The group.
            squares: The part's `Σ(ηsU)²`, one element.
            count: Its number of entries.
        """
        before = self._squares[_key(group)]
        self._squares[_key(group)] = (before[0] + squares.to(before[0].device), before[1] + count)

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
        parts = [(role, squares, count) for (role, _), (squares, count) in self._squares.items()]
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
