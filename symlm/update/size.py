"""How large a step was: the sum of squares of its update, by role and view, of this rank's parts."""

from typing import Any

import torch
from torch import Tensor

from symlm.update.adamw import adamw_update


class UpdateSize:
    """`Σ(ηsU)²`, decay left out, and of how many entries; what no step reaches keeps its last.

    DeepSpeed steps group by group, and a group in several calls with other parameters, so that a step may be many.
    """

    def __init__(self) -> None:
        self._squares: dict[tuple[str, Tensor], tuple[Tensor, int]] = {}
        self._adamw: dict[tuple[str, Tensor], list[tuple[dict[str, Any], dict[str, Any], int]]] = {}

    def begin(self, groups: list[dict[str, Any]], device: torch.device) -> None:
        """Forget what these groups' last step was."""
        self._squares |= {_key(group): (torch.zeros((), device=device), 0) for group in groups}

    def add(self, group: dict[str, Any], squares: Tensor, count: int) -> None:
        """Add a part of a group's step."""
        before = self._squares[_key(group)]
        self._squares[_key(group)] = (before[0] + squares.to(before[0].device), before[1] + count)

    def of_adamw(self, group: dict[str, Any], stepped: list[tuple[dict[str, Any], int]]) -> None:
        """Take note of the states and sizes that AdamW stepped; its update is read from them when asked for."""
        told = {key: group[key] for key in ("lr", "betas", "eps")}
        if isinstance(told["lr"], Tensor):
            told["lr"] = told["lr"].clone()  # which a schedule writes to
        self._adamw[_key(group)] = [(told, state, count) for state, count in stepped]

    def by_role(self) -> dict[str, tuple[Tensor, int]]:
        """Return the sum of squares, and of how many entries, by role."""
        parts = [(role, squares, count) for (role, _), (squares, count) in self._squares.items()]
        for (role, _), stepped in self._adamw.items():
            parts += [(role, adamw_update(group, state).square().sum(), count) for group, state, count in stepped]
        found: dict[str, tuple[Tensor, int]] = {}
        for role, squares, count in parts:
            before = found.get(role, (torch.zeros_like(squares), 0))
            found[role] = (before[0] + squares.to(before[0].device), before[1] + count)
        return found


def _key(group: dict[str, Any]) -> tuple[str, Tensor]:
    """Return what tells this call's part of a group from its others."""
    return group["role"], group["params"][0]
