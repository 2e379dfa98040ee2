"""The three phases of a step on a batch of equal shapes: momentum, direction, update; for one rank and for many."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from symlm import fused_rows
from symlm.by_rows import ALL, Block, RowStep
from symlm.collectives import Exchange, Layout, gathered, local, placed_like, regrouped
from symlm.directions import cost_of, rule_state, scale_of, whole_directions, wide
from symlm.rules import get_rule
from symlm.views import WHOLE, MatrixView

BATCH_ELEMENTS = 2**26  # a batch of equal shapes holds at most this many, so that temporaries stay bounded
CPU_BLOCK_ELEMENTS = 2**20  # rows that do not mix are updated in blocks that stay near a CPU's cache


@dataclass
class Member:
    """This rank's part of one parameter in a step, and where the part lies in the whole."""

    name: str
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    layout: Layout
    # 1 or 0 for each of its matrices here, or for its only one: it steps or rests. None: all step where `finite` is.
    fresh: Tensor | None = None

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

    def keep(self, state: dict[str, Tensor], finite: Tensor, rows: slice = ALL.rows) -> None:
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


def update_momentum(group: dict[str, Any], member: Member, finite: Tensor) -> Tensor:
    """Phase 1: `M <- βM + (1−β)G`, nothing yet where the momentum is of directions; return G, or M in its place."""
    M, G = member.momentum, _masked(member.gradient, member.momentum, finite)
    if group["momentum_of"] == "gradients":
        M.lerp_(G, 1 - group["momentum"])
    return G


def seen_by_rule(group: dict[str, Any], member: Member, finite: Tensor, block: Block = ALL) -> Tensor:
    """Return what the rule sees of these rows of an updated momentum."""
    M = block.of(member.momentum)
    return _seen(group, M, _masked(block.of(member.gradient), M, finite))


def _seen(group: dict[str, Any], M: Tensor, G: Tensor, out: Tensor | None = None) -> Tensor:
    """Return in fp32 the momentum, its Nesterov look-ahead `(1−β)G + βM`, or G where the momentum is of directions.

    out: where it is written, if there is such a place.
    """
    seen = G if group["momentum_of"] == "directions" else M
    if seen is M and group["nesterov"]:
        into = out if out is not None and out.dtype == M.dtype else None
        seen = torch.lerp(G, M, group["momentum"], out=into)
    if out is None or seen is out:
        return wide(seen)
    return out.copy_(seen)


def _masked(G: Tensor, M: Tensor, finite: Tensor) -> Tensor:
    """Return the gradient, or M on a device whose step must not happen; a CPU has not come here with a bad one."""
    G = G.to(M.dtype)
    return G if G.device.type == "cpu" else torch.where(finite, G, M)


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
        self.fused = here and fused_rows.serves(group, layout, batch[0].parameter)
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
                _seen(self.group, member.momentum, G, out=self.momenta[k])
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
                member.keep(state, self.finite)
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
        return seen_by_rule(group, member, finite, block)

    rule, dtype = get_rule(group["rule"]), group["compute_dtype"]
    rows = RowStep(rule, member.layout, member.momentum, seen, state, settings, dtype)
    size = scale_of(group, WHOLE, member.layout.shape)
    for block, U, kept in rows.directions(elements):
        member.keep(kept, finite, block.rows)
        yield block, U.mul_(size)
    member.keep(rows.kept, finite)


def _fused_step(group: dict[str, Any], member: Member, finite: Tensor) -> None:
    """Do all three phases of a row rule in one pass."""
    G, M = member.gradient, member.momentum
    scale = scale_of(group, WHOLE, member.layout.shape)
    fused_rows.step(group, member.parameter, G, M, rule_state(group, member.state), scale, finite)


def _direction_everywhere(group: dict[str, Any], member: Member, M: Tensor, finite: Tensor) -> Tensor:
    """Gather a momentum on every rank, where its parts or the rule's state are no intervals; keep this rank's part."""
    (U,), (state,) = whole_directions(group, member.whole(M)[None], states=[rule_state(group, member.state)])
    member.keep({key: value.view_as(local(member.state[key])) for key, value in state.items()}, finite)
    return placed_like(U, member.state["momentum"])


def apply(group: dict[str, Any], members: list[Member], block: Block, updates: list[Tensor], finite: Tensor) -> Tensor:
    """Phase 3: `W <- (1 − ηλ)W − η·s·U`, on this block of the fp32 master; or with U's own momentum in its place.

    Returns `Σ(ηsU)²`, of which diagnostics make the size of a role's update.
    """
    lr = group["lr"] if members[0].parameter.device.type == "cpu" else group["lr"] * finite
    decay = group["weight_decay"] * group["weight_decay_multiplier"]
    keep = 1 - lr * decay
    norms, steps = [], []
    for member, U in zip(members, updates, strict=True):
        W = block.of(member.master)
        if group["momentum_of"] == "directions":
            M = block.of(member.momentum)
            U = M.lerp_(_masked(U, M, finite), 1 - group["momentum"])
        if decay:
            W.mul_(keep)
        taken = None if member.fresh is None else _spread(member.fresh, member.layout, U)
        norms.append(_norm(U, taken))
        steps.append(finite if taken is None or taken.ndim else taken)
        if taken is None and not isinstance(lr, Tensor):
            W.sub_(U, alpha=lr)
        elif taken is None or isinstance(group["lr"], Tensor):
            W.addcmul_(U, (lr if taken is None else lr * taken).to(U.dtype), value=-1)
        else:
            W.addcmul_(U, taken.to(U.dtype), value=-group["lr"])
    sizes = torch.stack(norms)
    if any(member.fresh is not None for member in members):  # of all in one launch
        sizes = sizes * torch.stack([step.to(sizes.dtype) for step in steps])
    return (lr * sizes).square().sum()


def _spread(fresh: Tensor, layout: Layout, U: Tensor) -> Tensor:
    """Shape a matrix's flag, or a stack's, to multiply this rank's part U of it."""
    if layout.matrices == 1:
        return fresh[0]
    if U.ndim == 3:
        return fresh[:, None, None]
    return torch.cat([flag.expand(length) for flag, length in zip(fresh, layout.pieces, strict=True)])


def _norm(U: Tensor, taken: Tensor | None) -> Tensor:
    """Return the norm of what is taken of a stack U, without a copy where its parts are whole; of one matrix, all."""
    if taken is None or not taken.ndim:
        return torch.linalg.vector_norm(U)
    parts = torch.linalg.vector_norm(U, dim=(1, 2), keepdim=True) if taken.ndim == 3 else U
    return torch.linalg.vector_norm(parts * taken)


def adamw_step(group: dict[str, Any], members: list[Member], finite: Tensor) -> None:
    """Run torch's own fused AdamW on the group; `found_inf` masks the step on a device."""
    wide = [member for member in members if member.parameter.numel() and member.parameter.dtype == member.dtype]
    narrow = [member for member in members if member.parameter.numel() and member.parameter.dtype != member.dtype]
    for some in ([wide] if wide else []) + list(_chunks(narrow)):
        _adamw_together(group, some, finite)


def _chunks(members: list[Member]) -> Iterator[list[Member]]:
    """Yield members, each time within BATCH_ELEMENTS or one alone: their wide copies are alive at once."""
    chunk: list[Member] = []
    elements = 0
    for member in members:
        if chunk and elements + member.parameter.numel() > BATCH_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(member)
        elements += member.parameter.numel()
    if chunk:
        yield chunk


def _adamw_together(group: dict[str, Any], members: list[Member], finite: Tensor) -> None:
    on_cpu = members[0].master.device.type == "cpu"
    adamw(
        [member.master for member in members],
        [_laid_as(member.gradient, member.master) for member in members],
        [local(member.state["exp_avg"]) for member in members],
        [local(member.state["exp_avg_sq"]) for member in members],
        [],
        [member.state["step"] for member in members],
        fused=True,
        found_inf=None if on_cpu else (~finite).float(),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"] * group["weight_decay_multiplier"],
        eps=group["eps"],
        maximize=False,
    )
    for member in members:
        store(group, member, finite.to(member.parameter.device))


def _laid_as(gradient: Tensor, master: Tensor) -> Tensor:
    """Return a gradient in the dtype and strides of its weight: torch's fused step reads both along memory."""
    if gradient.stride() == master.stride():
        return gradient.to(master.dtype)
    return torch.empty_like(master).copy_(gradient)


def adamw_update(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """Return the update of this rank's part that AdamW's last step made, from its state."""
    t = state["step"].clamp(min=1.0)
    first = local(state["exp_avg"]) / (1 - group["betas"][0] ** t)
    second = local(state["exp_avg_sq"]) / (1 - group["betas"][1] ** t)
    return group["lr"] * first / (second.sqrt() + group["eps"])


def store(group: dict[str, Any], member: Member, finite: Tensor) -> None:
    """Write a low-precision parameter back from its fp32 master; nothing to do where the two are one."""
    p, master = member.parameter, member.master
    if master is p:
        return
    del member.master  # wide copies of a whole model at once would be twice its size
    if "compensation" in member.state:
        rounded = master.to(p.dtype)
        local(member.state["compensation"]).copy_(master - rounded.float())
    else:
        rounded = stochastic_round(master, crc32(f"{group['step']} {member.name} {member.layout.interval[0]}".encode()))
    p.copy_(rounded if p.device.type == "cpu" else torch.where(finite, rounded, p))


def stochastic_round(x: Tensor, seed: int) -> Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the mean exact.

    A bf16 is the upper half of an fp32, so 16 random bits are added below and the lower half is cut. Infinities and
    NaN pass unchanged. Shapes: any -> same. Source: Zamirai et al., arXiv 2010.06192, section 4.
    Raises: RuntimeError under CUDA graph capture, in whose replays the bits would be the same for ever.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("stochastic rounding draws by the number of the step; capture with rounding='compensated'")
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)
