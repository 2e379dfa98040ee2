"""The largest attention logit of each head, by blocks of queries: a whole matrix of scores is never in memory."""

import torch
from torch import Tensor

SCORES = 2**22  # of one block; 16 MB in fp32


@torch.no_grad()
def largest_logits(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Return `max q_i·k_j·scale` of every head, over the batch and all pairs (i, j) that attend.

    Args:
        q: Queries, (batch, heads, queries, head_dim), rotated and normalized.
        k: Keys, (batch, key heads, keys, head_dim); query heads share them in equal groups, in order.
        mask: Which pairs attend: True or False, or 0 and −∞ (or the dtype's least number) in a dtype of numbers,
            broadcast to (batch, heads, queries, keys); or (batch, keys), which keys are no padding. None for all.
        causal: Whether a query attends to no later key; the last query and the last key are at one position.
        scale: The factor of the logits, `1/√head_dim` by default.
        window: How many keys a query attends to, itself included; None for all.

    Returns:
        The largest logits, (heads,); −∞ for a head none of whose pairs attends.
    """
    batch, heads, queries, width = q.shape
    shared, keys = k.shape[1], k.shape[2]
    q = q.reshape(batch, shared, -1, queries, width)
    k = k.unsqueeze(2)
    mask = _grouped(mask, shared)
    rows = max(1, SCORES // max(1, batch * heads * keys))
    largest = q.new_full((shared, heads // shared), -torch.inf)
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        place = torch.arange(start, stop, device=q.device)[:, None] + (keys - queries)
        end = keys if not causal else min(keys, stop + keys - queries)
        other = torch.arange(end, device=q.device)
        attends = torch.ones((), dtype=torch.bool, device=q.device)
        if causal:
            attends = attends & (other <= place)
        if window is not None:
            attends = attends & (other > place - window)
        if mask is not None:
            attends = attends & (mask if mask.shape[-2] == 1 else mask[..., start:stop, :])[..., :end]
        scores = q[..., start:stop, :] @ k[..., :end, :].mT
        scores = scores.masked_fill_(~attends, -torch.inf)
        largest = torch.maximum(largest, scores.amax((0, 3, 4)))
    return largest.flatten().float() * (width**-0.5 if scale is None else scale)


def _grouped(mask: Tensor | None, shared: int) -> Tensor | None:
    """Return a mask as True where a pair attends, with an axis for the groups of heads."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, None, None, None, :].bool()
    attends = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    while attends.ndim < 4:
        attends = attends[None]
    heads = attends.shape[1]
    return attends.unsqueeze(2) if heads in (1, shared) else attends.unflatten(1, (shared, heads // shared))
