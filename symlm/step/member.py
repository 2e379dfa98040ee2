"""One parameter in a step: this rank's part of it, and batches of equal ones."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.collectives import whole_of_parts
from symlm.distributed.layout import Layout, layout_of
from symlm.distributed.tensors import aligned, gathered, local, placed_like, regrouped
from symlm.polar.precision import accumulation_dtype
from symlm.routing.costs import BATCH_ELEMENTS
from symlm.routing.options import named_parameters
from symlm.rules import get_rule
from symlm.state.creation import of_fragments
from symlm.state.originals import Originals
from symlm.state.quantization import SCALES, dequantized
from symlm.step.directions import rule_state
from symlm.step.rows.blocks import ALL


@dataclass
class Member:
    """Store this rank's part of one parameter during a step.

    Args:
        name: The parameter's name.
        parameter: This rank's part of it.
        gradient: This rank's part of the gradient, same shape.
        state: The parameter's state.
        layout: Where the part is in the whole.
        active: 1 or 0 for each of its matrices on this rank, or for its only one: it is updated or skipped. If None,
            all are updated if the step happens.
        clock: In a captured step, a count of steps on the device, which replays move on.
    """

    name: str
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    layout: Layout
    active: Tensor | None = None
    clock: Tensor | None = None

    @cached_property
    def momentum(self) -> Tensor:
        """This rank's part of the momentum; of one in 8 bits a wide copy, made at the first use."""
        M = local(self.state["momentum"])
        return dequantized(M, local(self.state[SCALES])) if M.dtype == torch.int8 else M

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the update, fp32 or wider."""
        return accumulation_dtype(self.parameter.dtype)

    @cached_property
    def master(self) -> Tensor:
        """The tensor that is updated: the parameter if it is wide enough, else a wide copy, made at the first use."""
        if self.parameter.dtype == self.dtype:
            return self.parameter
        wide = self.parameter.to(self.dtype)
        return wide + local(self.state["compensation"]) if "compensation" in self.state else wide

    def rule_state(self, group: dict[str, Any], whole: bool = False) -> dict[str, Tensor]:
        """Return the `rule_state` of the parameter, and its weight and momentum if its rule reads the weight.

        Args:
            group: The parameter group.
            whole: Whether weight and momentum are gathered.
        """
        state = rule_state(group, self.state)
        if not get_rule(group["rule"]).reads_weight:
            return state
        read = {"weight": self.master, "momentum": self.momentum}
        return state | {key: self.whole(x) if whole else x for key, x in read.items()}

    def whole(self, M: Tensor) -> Tensor:
        """Gather a rule's input on every rank.

        Args:
            M: This rank's part.

        Returns:
            The whole, of the parameter's shape.
        """
        if self.layout.shards is not None and not hasattr(self.state["momentum"], "placements"):  # of ZeRO's partition
            return whole_of_parts(M, self.layout)
        return gathered(regrouped(M, self.state["momentum"]))

    def part_of(self, U: Tensor) -> Tensor:
        """Return this rank's part of a whole; nothing is exchanged.

        Args:
            U: The whole, of the parameter's shape.
        """
        if hasattr(self.state["momentum"], "placements"):
            return placed_like(U, self.state["momentum"])
        start, stop = self.layout.interval
        return U.flatten()[start:stop].view_as(self.parameter)

    def store_state(self, state: dict[str, Tensor], finite: Tensor, rows: slice = ALL.rows) -> None:
        """Store the next state of a rule, and the momentum if it is among it, if the step happens.

        Args:
            state: The state tensors by name, of the rows or whole.
            finite: Whether the step happens, a bool of one element; it is true on a CPU.
            rows: The rows that the state is of, all by default.
        """
        for key, value in state.items():
            stored = self.momentum if key == "momentum" else local(self.state[key])[rows]
            stored.copy_(value if stored.device.type == "cpu" else torch.where(finite, value, stored))


def member_of(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any], layout: Layout) -> Member:
    """Make the `Member` of a parameter.

    Args:
        name: The parameter's name.
        p: The parameter, a DTensor or a plain tensor.
        gradient: This rank's part of its gradient.
        state: Its state.
        layout: Its layout.

    Returns:
        The member, whose parameter shares p's memory.
    """
    return Member(name, local(p.detach()), gradient, state, layout)


def members_of(
    group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]], originals: Originals
) -> Iterator[Member]:
    """Make the members of a group's parameters that have a gradient.

    Args:
        group: The parameter group.
        states: The optimizer's state.
        originals: The parameters of ZeRO's partitions, each a member of its own unless the rule is elementwise.

    Yields:
        The members.

    Raises:
        RuntimeError: A gradient is sparse.
    """
    for name, p in named_parameters(group):
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise RuntimeError(f"{name} has a sparse gradient; build its nn.Embedding with sparse=False")
        fragments = originals.fragments(group, p)
        if not fragments or get_rule(group["rule"]).elementwise:
            yield member_of(name, p, aligned(p.grad, p), states[p], layout_of(p, group["shared"]))
            continue
        for fragment, state in zip(fragments, of_fragments(group, states[p], fragments), strict=True):
            yield member_of(fragment.name, fragment.of(p.detach()), fragment.of(p.grad), state, fragment.layout)


def batches(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Put members of one layout, dtype and device in batches.

    Args:
        members: The members; empty parameters are left out.

    Yields:
        Batches of one member or more, each of at most `BATCH_ELEMENTS` elements unless it is of one member.
    """
    alike: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        if prod(member.layout.shape):
            alike.setdefault((member.layout, member.dtype, member.parameter.device), []).append(member)
    for batch in alike.values():
        size = max(1, BATCH_ELEMENTS // prod(batch[0].layout.shape))
        for start in range(0, len(batch), size):
            yield batch[start : start + size]
