"""Phases 1 and 2 on a batch of equal shapes, for one rank and for many."""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.exchange import Exchange
from symlm.distributed.tensors import local, placed_like
from symlm.rules import get_rule
from symlm.step.directions import cost_of, rule_state, scale_of, whole_directions
from symlm.step.member import BATCH_ELEMENTS, Member
from symlm.step.momentum import rule_input, rule_input_of_block, update_momentum
from symlm.step.rows import fused
from symlm.step.rows.blocks import ALL, Block
from symlm.step.rows.row_step import RowStep
from symlm.views.matrix_view import MatrixView
from symlm.views.storage import WHOLE

CPU_BLOCK_ELEMENTS = 2**20  # rows that do not mix are updated in blocks that stay near a CPU's cache


class Bucket:
    """One batch in phases 1 and 2: `s·U(M)` of this rank's parts, by an `Exchange` where matrices must travel.

    Rows that do not mix, and intervals of whole matrices (experts, heads), are computed where they lie.
    """

    def __init__(self, group: dict[str, Any], batch: list[Member], loads: list[float], finite: Tensor) -> None:
        self.group, self.batch = group, batch
        self.finite = finite.to(batch[0].parameter.device)  # a model may lie on several
        layout = self.layout = batch[0].layout
        view, rule = MatrixView.parse(group["view"]), get_rule(group["rule"])
        self.local_view = view if layout.whole else view.of_interval(layout.shape, layout.intervals)
        rows_lie_here = rule.row_map is not None and view == WHOLE and not layout.gathered
        self.by_rows = rows_lie_here and (not layout.whole or len(batch) == 1 or bool(rule.state))
        # A state by matrices is kept whole on every rank, which then computes every direction.
        self.everywhere = layout.gathered or (bool(rule.state) and not layout.whole and not self.by_rows)
        shared = layout.whole and prod(layout.size) > 1 and rule.spectral
        travels = shared or (not layout.whole and not self.by_rows and not self.everywhere and self.local_view is None)
        self.exchange = Exchange(layout, len(batch), loads, cost_of(group, layout)) if travels else None
        # A plan's members are nowhere, and have no momentum to look at.
        here = self.by_rows and batch[0].parameter.device.type != "meta"
        self.fused = here and fused.serves(group, layout, batch[0].parameter)
        self.momenta = torch.empty(0)  # what the rule sees of all, (members, *shape), between `start` and `release`
        self.started = False

    def start(self) -> None:
        """Do phase 1, unless it is done, and start to move matrices to their owners."""
        if self.fused or self.started:
            return
        self.started = True
        if not self.by_rows:
            M = self.batch[0].momentum
            self.momenta = M.new_empty((len(self.batch), *M.shape), dtype=torch.promote_types(M.dtype, torch.float32))
        for k, member in enumerate(self.batch):
            G = update_momentum(self.group, member, self.finite)
            if not self.by_rows:
                rule_input(self.group, member.momentum, G, out=self.momenta[k])
        if self.exchange:
            self.exchange.send(self.momenta.flatten(1))

    def compute(self) -> None:
        """Compute what this rank owns, and start to move it back."""
        if self.exchange:
            self.exchange.compute(lambda wholes: whole_directions(self.group, wholes)[0])
            self.shape, self.momenta = self.momenta.shape[1:], torch.empty(0)

    def release(self) -> None:
        """Let go of what travelled and of the look-aheads: together they would be as large as the model."""
        self.momenta, self.exchange = torch.empty(0), None

    def updates(self) -> Iterator[tuple[list[Member], Block, list[Tensor]]]:
        """Yield members, a block of theirs, and its `s·U`; what the rule keeps is kept. A fused step yields none."""
        if self.exchange:
            yield self.batch, ALL, [part.view(self.shape) for part in self.exchange.receive()]
        elif self.fused:
            for member in self.batch:
                _fused_step(self.group, member, self.finite)
        elif self.by_rows:
            for member in self.batch:
                for block, U in _directions_by_rows(self.group, member, self.finite):
                    yield [member], block, [U]
        elif self.everywhere:
            for member, M in zip(self.batch, self.momenta, strict=True):
                yield [member], ALL, [_direction_everywhere(self.group, member, M, self.finite)]
        elif self.momenta.numel():
            states = [rule_state(self.group, member.state) for member in self.batch]
            found, states = whole_directions(self.group, self.momenta, self.local_view, states)
            for member, state in zip(self.batch, states, strict=True):
                member.store_state(state, self.finite)
            yield self.batch, ALL, list(found)


def overlapped(buckets: list[Bucket]) -> Iterator[Bucket]:
    """Yield buckets whose directions are here; while one is computed, another's return and a third one leaves."""
    returning: list[Bucket] = []
    for bucket in buckets[:1]:
        bucket.start()
    for k, bucket in enumerate(buckets):
        for following in buckets[k + 1 : k + 2]:
            following.start()
        bucket.compute()
        returning.append(bucket)
        while len(returning) > 1 or (returning and not bucket.exchange):
            yield returning[0]
            returning.pop(0).release()
    for bucket in returning:
        yield bucket
        bucket.release()


def _directions_by_rows(group: dict[str, Any], member: Member, finite: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """Yield a row rule's `s·U` block by block, so that a vocabulary's temporaries stay small; no row travels."""
    state = rule_state(group, member.state)
    settings = {"step": state.pop("step"), "beta2": group["betas"][1]} if state else {}
    elements = CPU_BLOCK_ELEMENTS if member.parameter.device.type == "cpu" else BATCH_ELEMENTS

    def seen(block: Block) -> Tensor:
        return rule_input_of_block(group, member, finite, block)

    rule, dtype = get_rule(group["rule"]), group["compute_dtype"]
    rows = RowStep(rule, member.layout, member.momentum, seen, state, settings, dtype)
    size = scale_of(group, WHOLE, member.layout.shape)
    for block, U, kept in rows.directions(elements):
        member.store_state(kept, finite, block.rows)
        yield block, U.mul_(size)
    member.store_state(rows.matrix_state, finite)


def _fused_step(group: dict[str, Any], member: Member, finite: Tensor) -> None:
    """Do all three phases of a row rule in one pass."""
    G, M = member.gradient, member.momentum
    scale = scale_of(group, WHOLE, member.layout.shape)
    fused.step(group, member.parameter, G, M, rule_state(group, member.state), scale, finite)


def _direction_everywhere(group: dict[str, Any], member: Member, M: Tensor, finite: Tensor) -> Tensor:
    """Gather a momentum on every rank, where its parts or the rule's state are no intervals; keep this rank's part."""
    (U,), (state,) = whole_directions(group, member.whole(M)[None], states=[rule_state(group, member.state)])
    member.store_state({key: value.view_as(local(member.state[key])) for key, value in state.items()}, finite)
    return placed_like(U, member.state["momentum"])
