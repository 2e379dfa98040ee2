"""Phases 1 and 2 on a batch of equal shapes, for one rank and for many."""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.exchange import Exchange
from symlm.distributed.tensors import local
from symlm.routing.costs import BATCH_ELEMENTS
from symlm.rules import get_rule
from symlm.step import stacks
from symlm.step.directions import POLAR_OPTIONS, cost_of, rule_state, scale_of, whole_directions
from symlm.step.member import Member
from symlm.step.momentum import BlockInputs, rule_inputs
from symlm.step.rows import fused
from symlm.step.rows.blocks import ALL, Block
from symlm.step.rows.row_step import RowStep, gram_weight, root_of
from symlm.views.matrix_view import MatrixView
from symlm.views.storage import WHOLE

JOINED_ELEMENTS = 2**20  # a larger bucket's launches cost little beside its products
CPU_BLOCK_ELEMENTS = 2**20  # rows that do not mix are updated in blocks that fit a CPU's cache
CPU_PART_ELEMENTS = 2**18  # of a larger bucket, matrices that run through all phases while they are in the cache


class Bucket:
    """Run phases 1 and 2 on one batch: `s·U(M)` of this rank's parts.

    Sharded matrices are sent to their owners by an `Exchange`. Rows that do not mix, and shards of whole matrices
    (experts, heads), are computed on the rank that stores them. Call `start`, `compute`, `updates` and `release`, in
    this order.

    Args:
        group: The parameter group.
        batch: Members of one layout, dtype and device.
        loads: The operations that each rank has been assigned in the step; the bucket's are added.
        finite: Whether the step happens, a bool of one element.
    """

    def __init__(self, group: dict[str, Any], batch: list[Member], loads: list[float], finite: Tensor) -> None:
        self.group, self.batch = group, batch
        self.finite = finite.to(batch[0].parameter.device)  # a model may be on several devices
        layout = self.layout = batch[0].layout
        view, rule = MatrixView.parse(group["view"]), get_rule(group["rule"])
        self.local_view = view if layout.whole else view.of_interval(layout.shape, layout.intervals)
        rows_are_local = rule.row_map is not None and view == WHOLE and not layout.gathered
        self.by_rows = rows_are_local and (not layout.whole or len(batch) == 1 or bool(rule.state))
        # A state by matrices is replicated on every rank, which then computes every direction.
        self.everywhere = layout.gathered or (bool(rule.state) and not layout.whole and not self.by_rows)
        shared = layout.whole and prod(layout.size) > 1 and rule.spectral and not rule.state  # which no owner has
        split = not layout.whole and not self.by_rows and not self.everywhere and self.local_view is None
        self.exchange = Exchange(layout, len(batch), loads, cost_of(group, layout)) if shared or split else None
        self.fused = self._fusible(view)
        self.parts = self._parts()
        self.momenta = torch.empty(0)  # the rule's inputs, (members, *shape), between `start` and `release`
        self.squared: list[Tensor] = []
        self.factors: Tensor | None = None  # the polar factors, if `join` has computed them
        self.started = False

    def start(self) -> None:
        """Run phase 1, unless it has run, and start to send matrices to their owners."""
        if self.fused or self.started:
            return
        self.started = True
        if not self.by_rows and len(self.parts) == 1:  # others' momentum is updated when it is used
            self.momenta = rule_inputs(self.group, self.batch, self.finite)
        if self.exchange:
            self.exchange.send(self.momenta.flatten(1))

    def compute(self) -> None:
        """Compute the directions of the matrices that this rank owns, and start to send them back."""
        if self.exchange:
            self.exchange.compute(lambda wholes: whole_directions(self.group, wholes)[0])
            self.shape, self.momenta = self.momenta.shape[1:], torch.empty(0)

    def release(self) -> None:
        """Free the exchanged tensors and the rule's inputs: those of all buckets would be as large as the model."""
        self.momenta, self.exchange, self.factors = torch.empty(0), None, None

    def updates(self) -> Iterator[tuple[list[Member], Block, list[Tensor]]]:
        """Yield members, a block of their parts, and its `s·U` for each; the rule's next state is stored.

        Kernels that do all phases update the weights themselves: nothing is yielded, and `squared` has `Σ(ηsU)²`.
        """
        if self.fused:
            self.squared = self._fused_steps()
        elif self.exchange:
            yield self.batch, ALL, [part.view(self.shape) for part in self.exchange.receive()]
        elif self.by_rows:
            for member in self.batch:
                for block, U in _directions_by_rows(self.group, member, self.finite):
                    yield [member], block, [U]
        elif self.everywhere:
            for member, M in zip(self.batch, self.momenta, strict=True):
                yield [member], ALL, [_direction_everywhere(self.group, member, M, self.finite)]
        else:
            yield from self._directions_of_matrices()

    def _directions_of_matrices(self) -> Iterator[tuple[list[Member], Block, list[Tensor]]]:
        """Yield the `s·U` of whole matrices, part by part; the rule's next state is stored."""
        for part in self.parts:
            momenta = self.momenta if len(self.parts) == 1 else rule_inputs(self.group, part, self.finite)
            if not momenta.numel():
                continue
            states = [member.rule_state(self.group) for member in part]
            wholes = (self.group, momenta, self.local_view, states)
            directions, states = whole_directions(*wholes, factors=self.factors)
            for member, state in zip(part, states, strict=True):
                member.store_state(state, self.finite)
            yield part, ALL, list(directions)

    def _parts(self) -> list[list[Member]]:
        """Divide the members into those that run through all phases together: all, or what a CPU's cache holds."""
        size = prod(self.layout.shape)
        together = self.by_rows or self.exchange or self.everywhere or size * len(self.batch) <= JOINED_ELEMENTS
        if together or self.batch[0].parameter.device.type != "cpu":
            return [self.batch]
        count = max(1, CPU_PART_ELEMENTS // size)
        return [self.batch[k : k + count] for k in range(0, len(self.batch), count)]

    def _fusible(self, view: MatrixView) -> bool:
        """Return whether kernels run all three phases. A plan's members are on the meta device, without momenta."""
        if self.batch[0].parameter.device.type == "meta":
            return False
        if self.by_rows:
            return fused.serves(self.group, self.layout, self.batch[0].parameter)
        alone = self.layout.whole and not self.exchange and not self.everywhere
        return alone and stacks.serves(self.group, self.batch, view)

    @property
    def entries(self) -> int:
        """The number of entries of this rank's parts."""
        return sum(member.parameter.numel() for member in self.batch)

    def _fused_steps(self) -> list[Tensor]:
        """Run all three phases in kernels, and return parts of `Σ(ηsU)²`."""
        if not self.by_rows:
            return [stacks.step(self.group, self.batch, MatrixView.parse(self.group["view"]), self.finite)]
        return [_fused_rows(self.group, member, self.finite) for member in self.batch]

    def matrices_to_join(self) -> tuple[Any, ...] | None:
        """Return what small buckets must have in common for `join`: shape up to transposition, place and settings."""
        rule, shape = get_rule(self.group["rule"]), self.layout.shape
        elsewhere = self.exchange or self.by_rows or self.everywhere or self.fused or not self.layout.whole
        if elsewhere or not (rule.spectral and rule.fused) or MatrixView.parse(self.group["view"]).unequal:
            return None
        if prod(shape) * len(self.batch) > JOINED_ELEMENTS:
            return None
        _, m, n = MatrixView.parse(self.group["view"]).shape(shape)
        place = (self.batch[0].dtype, self.batch[0].parameter.device)
        return min(m, n), max(m, n), *place, *(self.group[key] for key in POLAR_OPTIONS)


def _directions_by_rows(group: dict[str, Any], member: Member, finite: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """Yield a row rule's `s·U` block by block, so that a vocabulary needs little temporary memory."""
    state = rule_state(group, member.state)
    settings = {"step": state.pop("step"), "beta2": group["betas"][1]} if state else {}
    elements = CPU_BLOCK_ELEMENTS if member.parameter.device.type == "cpu" else BATCH_ELEMENTS
    inputs = BlockInputs(group, member, finite)
    rule, dtype = get_rule(group["rule"]), group["compute_dtype"]
    mean = (settings, gram_weight(group), lambda new: member.store_state(new, finite), root_of(group))
    rows = RowStep(rule, member.layout, member.momentum, inputs, state, *mean, dtype)
    size = scale_of(group, WHOLE, member.layout.shape)
    for block, U, row_state in rows.directions(elements):
        member.store_state(row_state, finite, block.rows)
        yield block, U if size == 1 else U.mul_(size)


def _fused_rows(group: dict[str, Any], member: Member, finite: Tensor) -> Tensor:
    """Run all three phases of a row rule in one kernel, and return `Σ(ηsU)²`."""
    G, M = member.gradient, member.momentum
    scale = scale_of(group, WHOLE, member.layout.shape)
    return fused.step(group, member.parameter, G, M, rule_state(group, member.state), scale, finite)


def _direction_everywhere(group: dict[str, Any], member: Member, M: Tensor, finite: Tensor) -> Tensor:
    """Return this rank's part of a direction that every rank computes, from a gathered momentum."""
    (U,), (state,) = whole_directions(group, member.whole(M)[None], states=[member.rule_state(group, whole=True)])
    own = {key: member.part_of(state.pop(key)) for key in {"momentum"} & state.keys()}
    member.store_state(own | {key: value.view_as(local(member.state[key])) for key, value in state.items()}, finite)
    return member.part_of(U)
