"""The clip itself: watch the attentions of a training step, and scale queries and keys back behind the optimizer's."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from symlm.distributed.collectives import largest_everywhere
from symlm.distributed.layout import Layout
from symlm.distributed.tensors import local, placed_like
from symlm.optimizer import SymOptimizer
from symlm.polar.precision import accumulation_dtype
from symlm.qk_clip.heads import ScaledTensor, attentions
from symlm.qk_clip.watching import LogitWatch
from symlm.routing.options import named_parameters


class QKClip:
    """Bound attention logits: `γ_h = min(1, τ/S_h)` with S_h the largest logit of head h in the batch.

    Behind every step of the optimizer `W_q` of head h is multiplied by `√γ_h` and `W_k` by `√min γ` over the query
    heads that share it, biases too, so that the largest logit of the same batch is at most τ; heads below τ stay as
    they are, bit for bit. Of latent attention the part of a query that meets the shared rotated key is multiplied by
    `γ_h`, and that key stays. Where queries and keys are normalized, the norms' gains are scaled in the place of the
    projections: gains that all heads share by `√min γ` over all heads. Logits are `q·k` times the attention's scale,
    before masks, caps and sinks; those of pairs that do not attend do not count. A head whose S_h is not finite stays.

    Nothing else has to be called: the clip follows `optimizer.step()`. Make it before the model is wrapped or sharded.
    A copy of the model (`copy.deepcopy`, `AveragedModel`, a pickle) is neither watched nor clipped.
    Many ranks take the largest S_h of all. The cost is one more product of queries and keys in each forward pass in
    training mode, by blocks.

    Args:
        model: The model; its attentions must call transformers' attention interface (eager, SDPA, flash or flex) or
            `torch.nn.functional.scaled_dot_product_attention`.
        optimizer: Its optimizer, any of torch's or symlm's; under DeepSpeed symlm's.
        threshold: The largest logit τ; 100 in Kimi K2.
        every: Every how many steps logits are measured and clipped.
        roles: Roles of parameters whose role the structure does not show, as `symlm.assign_roles` takes them.

    Raises:
        ValueError: The threshold or `every` is not positive, no attention is known whose q and k are trained, or
            the model has a clip already.

    Source:
        Kimi K2, arXiv 2507.20534, section 2.1 and algorithm 1 (MuonClip). It has no grouped keys and no norms.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        threshold: float = 100.0,
        every: int = 1,
        roles: dict[str, str] | None = None,
    ) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < float("inf"):
            raise ValueError(f"threshold must be a positive finite number, the largest attention logit: {threshold!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive number of steps, got {every!r}")
        self.optimizer, self.threshold, self.every = optimizer, float(threshold), every
        self._steps, self._scaled = 0, set[str]()  # whole steps, and what this step has scaled
        self._is_clipped = False
        self.attentions = attentions(model, roles)
        self.watches = [LogitWatch(a.name, a.module, a.queries, self._measures) for a in self.attentions]
        self.largest: dict[str, Tensor] = {}
        self._hook = optimizer.register_step_post_hook(lambda *_: self.clip())

    def _measures(self) -> bool:
        """Return whether the logits of this step are measured; asked first by the forward pass behind a step."""
        if self._is_clipped:
            self._steps, self._scaled, self._is_clipped = self._steps + 1, set(), False
            for watch in self.watches:
                watch.largest = None
        return self._steps % self.every == 0

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps, by which `every` counts."""
        return {"steps": self._steps + self._is_clipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the number of steps.

        Args:
            state: What `state_dict` returned.
        """
        self._steps, self._is_clipped = state["steps"], False

    def remove(self) -> None:
        """Watch and clip no more."""
        self._hook.remove()
        for watch in self.watches:
            watch.remove()

    @torch.no_grad()
    def clip(self) -> None:
        """Scale the heads whose logits passed the threshold in this step; all ranks call this together.

        Called again in one step, as by each sub-group of ZeRO-3, it scales what was not scaled before.
        """
        self._is_clipped = True
        if self._steps % self.every:
            return
        sizes, device = [a.queries for a in self.attentions], self.attentions[0].tensors[0].parameter.device
        nothing = torch.tensor(-torch.inf, device=device)
        seen = [
            nothing.expand(watch.heads) if watch.largest is None else watch.largest.to(device) for watch in self.watches
        ]
        largest = largest_everywhere(torch.cat(seen))
        over = largest.isfinite() & (largest > self.threshold)
        gammas = torch.where(over, self.threshold / largest, 1.0)
        partitions = dict(_partitions(self.optimizer))
        for attention, gamma in zip(self.attentions, gammas.split(sizes), strict=True):
            factors = attention.factors(gamma)
            for tensor in attention.tensors:
                if tensor.name not in self._scaled and self._scale(tensor, factors, partitions):
                    self._scaled.add(tensor.name)
        self.largest = {a.name: part for a, part in zip(self.attentions, largest.split(sizes), strict=True)}

    def _scale(self, tensor: ScaledTensor, factors: Tensor, partitions: dict[str, tuple[Tensor, Layout]]) -> bool:
        """Multiply this rank's part of a tensor by the factors of its outputs; False if it is not here to be scaled."""
        p = tensor.parameter
        compensation = self.optimizer.state.get(p, {}).get("compensation")
        if tensor.name in partitions:
            part, layout = partitions[tensor.name]
            start, stop = layout.interval
            by_entries = tensor.by_entries(factors).expand(layout.shape).flatten()[start:stop].view_as(part)
        elif hasattr(p, "_hp_mapping") or hasattr(p, "ds_tensor"):
            if isinstance(self.optimizer, SymOptimizer):
                return False
            raise RuntimeError(
                f"QKClip: DeepSpeed stores {tensor.name} in a partition of {type(self.optimizer).__name__}, whose "
                "places only SymOptimizer knows: use SymOptimizer (its preset 'adamw' is AdamW)"
            )
        else:
            part, by_entries = local(p.detach()), tensor.by_entries(factors)
            if hasattr(p, "placements"):
                by_entries = placed_like(by_entries.expand(p.shape).contiguous(), p)
        _multiply(part, by_entries.to(part.device), tensor.offset, compensation)
        return True


def _partitions(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, tuple[Tensor, Layout]]]:
    """Yield this rank's part of each parameter that DeepSpeed has partitioned, by name."""
    if not isinstance(optimizer, SymOptimizer):
        return
    for group in optimizer.param_groups:
        for _, p in named_parameters(group):
            for fragment in optimizer._originals.fragments(group, p):
                yield fragment.name, (fragment.of(p.detach()), fragment.layout)


def _multiply(part: Tensor, factors: Tensor, offset: float, compensation: Any) -> None:
    """Multiply a tensor plus its offset in place; entries whose factor is 1 stay as they are, bit for bit."""
    wide = part.to(accumulation_dtype(part.dtype))
    if compensation is not None:
        wide = wide + local(compensation)
    factors = factors.to(wide.dtype)
    scaled = torch.where(factors == 1, wide, (wide + offset) * factors - offset)
    part.copy_(scaled)
    if compensation is not None:
        local(compensation).copy_(scaled - part)
