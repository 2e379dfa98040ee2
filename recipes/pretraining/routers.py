"""Mixture-of-experts training: the routers' losses and their metrics."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import symlm
from pretraining.config import TrainConfig


def router_losses(logits: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, Tensor]:
    """Return `E Σ f_i P_i` and `mean lse²`, each the mean over layers; f is the share of choices, without gradient.

    Shapes: a (tokens, experts) tensor a layer -> two scalars. The first, of the load, is 1 for a uniform router.
    Source: Switch Transformer, arXiv 2101.03961, eq. 4; ST-MoE, arXiv 2202.08906, eq. 5.
    """
    load, z = (torch.zeros((), device=logits[0].device) for _ in range(2))
    for scores in logits:
        scores = scores.float()
        tokens, experts = scores.shape
        chosen = scores.topk(top_k, dim=-1).indices.flatten()
        f = torch.zeros(experts, device=scores.device).index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float))
        load = load + experts * (f / (tokens * top_k) * scores.softmax(-1).mean(0)).sum()
        z = z + scores.logsumexp(-1).square().mean()
    return load / len(logits), z / len(logits)


class Routers:
    """What a model's routers said, where it has any: their losses, and their metrics."""

    def __init__(self, model: torch.nn.Module, train: TrainConfig) -> None:
        routed = any(hasattr(module, "experts") for module in model.modules())  # a config may name what a model has not
        self.top_k = getattr(model.config, "num_experts_per_tok", None) if routed else None
        self.load, self.z = train.load_loss, train.z_loss
        if self.top_k is None and (self.load or self.z):
            raise ValueError(f"{type(model).__name__} has no routers for train.load_loss and train.z_loss")
        if self.top_k:
            model.config.router_aux_loss_coef = 0.0  # transformers' own sums over layers; ours are `router_losses`

    @property
    def inputs(self) -> dict[str, bool]:
        return {"output_router_logits": True} if self.top_k else {}

    @property
    def trained(self) -> list[str]:
        """The names of the losses that a run trains."""
        return ["next_token", *(["load"] if self.load else []), *(["z"] if self.z else [])]

    def losses(self, output: Any) -> dict[str, Tensor]:
        """Return the losses by name, times their coefficients."""
        if len(self.trained) == 1:
            return {"next_token": output.loss}
        load, z = router_losses(output.router_logits, self.top_k)
        weighted = {"next_token": output.loss, "load": self.load * load, "z": self.z * z}
        return {name: weighted[name] for name in self.trained}

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
