"""Mixture-of-experts training: the routers' losses and their metrics."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import symlm
from pretraining.config import TrainConfig


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


class Routers:
    """What a model's routers said, where it has any: their losses, and their metrics."""

    def __init__(self, model: torch.nn.Module, train: TrainConfig) -> None:
        routed = any(hasattr(module, "experts") for module in model.modules())  # a config may name what a model has not
        self.top_k = getattr(model.config, "num_experts_per_tok", None) if routed else None
        self.load, self.z = train.load_loss, train.z_loss
        if self.top_k is None and (self.load or self.z):
            raise ValueError(f"{type(model).__name__} has no routers for train.load_loss and train.z_loss")
        if self.top_k:
            model.config.router_aux_loss_coef = 0.0  # transformers' own sums over layers; ours is `router_loss`

    @property
    def inputs(self) -> dict[str, bool]:
        return {"output_router_logits": True} if self.top_k else {}

    def loss(self, output: Any) -> torch.Tensor | float:
        return router_loss(output.router_logits, self.top_k, self.load, self.z) if self.load or self.z else 0.0

    def metrics(self, output: Any, accelerator: Accelerator) -> dict[str, Any]:
        """Return each metric's mean over the layers, and the load of every expert, layer by layer."""
        if not self.top_k or not getattr(output, "router_logits", None):
            return {}
        layers = [
            symlm.diagnostics.router_metrics(z.detach(), self.top_k, accelerator.gather) for z in output.router_logits
        ]
        loads = [[round(f, 5) for f in layer.pop("load").tolist()] for layer in layers]
        means = {f"router/{key}": torch.stack([layer[key] for layer in layers]).mean().item() for key in layers[0]}
        return {**means, "router/load": loads}
