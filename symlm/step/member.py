"""One parameter in a step: this rank's part of it, and batches of equal ones."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.layout import Layout
from symlm.distributed.tensors import gathered, local, regrouped
from symlm.step.rows.blocks import ALL

BATCH_ELEMENTS = 2**26  # a batch of equal shapes holds at most this many, so that temporaries stay bounded


@dataclass
class Member:
    """This rank's part of one parameter in a step, and where the part lies in the whole."""

    name: str
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    layout: Layout
    # 1 or 0 for each of its matrices here, or for its only one: it steps or rests. None: all step where `finite` is.
    active: Tensor | None = None

    @property
    def momentum(self) -> Tensor:
        """This rank's part of the momentum."""
        return local(self.state["momentum"])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the update is done in, fp32 or wider."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    @cached_property
    def master(self) -> Tensor:
        """What is updated: the parameter itself where it is wide enough, else a wide copy, made when asked for."""
        if self.parameter.dtype == self.dtype:
            return self.parameter
        wide = self.parameter.to(self.dtype)
        return wide + local(self.state["compensation"]) if "compensation" in self.state else wide

    def whole(self, M: Tensor) -> Tensor:
        """Return on every rank the whole matrix of which M, seen by the rule, is this rank's part."""
        return gathered(regrouped(M, self.state["momentum"]))

    def store_state(self, state: dict[str, Tensor], finite: Tensor, rows: slice = ALL.rows) -> None:
        """Take over the next state of a rule, or of these rows of it, where the step happens."""
        for key, value in state.items():
            own = local(self.state[key])[rows]
            own.copy_(value if own.device.type == "cpu" else torch.where(finite, value, own))


def member_of(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any], layout: Layout) -> Member:
    """Gather what a step needs of a parameter."""
    return Member(name, local(p.detach()), gradient, state, layout)


def batches(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Put members of one layout, dtype and device in batches, each within BATCH_ELEMENTS."""
    alike: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        if prod(member.layout.shape):
            alike.setdefault((member.layout, member.dtype, member.parameter.device), []).append(member)
    for batch in alike.values():
        size = max(1, BATCH_ELEMENTS // prod(batch[0].layout.shape))
        for start in range(0, len(batch), size):
            yield batch[start : start + size]
