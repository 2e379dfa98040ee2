"""Mixture-of-experts training: the auxiliary losses of the routers."""

import torch
from torch import Tensor


def router_loss(logits: tuple[Tensor, ...], top_k: int, load: float, z: float) -> Tensor:
    """Return `load · E Σ f_i P_i + z · mean lse²`, the mean over layers; f is the share of choices, without gradient.

    Shapes: a (tokens, experts) tensor a layer -> scalar. The load term is 1 for a uniform router.
    Source: Switch Transformer, arXiv 2101.03961, eq. 4; ST-MoE, arXiv 2202.08906, eq. 5.
    """
    total = torch.zeros((), device=logits[0].device)
    for scores in logits:
        scores = scores.float()
        tokens, experts = scores.shape
        chosen = scores.topk(top_k, dim=-1).indices.flatten()
        f = torch.zeros(experts, device=scores.device).index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float))
        balance = experts * (f / (tokens * top_k) * scores.softmax(-1).mean(0)).sum()
        total = total + load * balance + z * scores.logsumexp(-1).square().mean()
    return total / len(logits)
