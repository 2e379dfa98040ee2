"""Teleports in a run: now and then, move a SwiGLU model along its own group to where the gradient is larger."""

from functools import partial
from typing import Any

import torch
from torch import nn

from symlm.step_control import evaluating
from symlm.symmetry import Transport
from symlm.teleport import climb
from symlm.teleport.actions import neuron_scales, value_output
from symlm.teleport.moving import refuse_unmovable, teleport

LARGEST = 2.0  # these orbits have no end, and a model far out on one trains no more


class Teleporter:
    """Every so many steps, climb the scales of neurons and the GL(head) of values; the optimizer's momenta move along.

    All teleports of a run together make no weight more than `LARGEST` times as large; then there are no more of them.
    Raises: ValueError for a model without these symmetries, for a rule whose state cannot move, and where the loss
    would change.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> None:
        self.model, self.optimizer, self.every = model, optimizer, every
        self.steps, self.ratio, self.growth = 0, 1.0, 1.0
        config: Any = model.config
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.families = (
            (neuron_scales, (layers, config.intermediate_size)),
            (value_output, (layers, heads, width, width)),
        )
        for family, shape in self.families:
            refuse_unmovable(optimizer, model, family(model, torch.zeros(shape)))

    def state_dict(self) -> dict[str, float]:
        return {"steps": self.steps, "growth": self.growth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.growth = state["steps"], state["growth"]

    def before_step(self, x: torch.Tensor) -> None:
        """Move the model and what was accumulated of its gradients, if it is time to; before they are clipped."""
        self.steps += 1
        if self.steps % self.every:
            return
        self.ratio = 1.0
        if not all(p.grad.isfinite().all() for p in self.model.parameters() if p.grad is not None):
            return  # the optimizer will skip this step
        for family, shape in self.families:
            gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            action = partial(family, self.model)
            T, ratio = climb(action, torch.zeros(shape, device=x.device), gradients, lr=0.1, steps=10)
            transports = action(T)
            growth = self.growth * max(self._growth(name, transport) for name, transport in transports.items())
            if not (ratio > 1 and growth <= LARGEST):
                continue
            with evaluating(self.model):
                teleport(self.model, transports, lambda: self.model(input_ids=x, labels=x).loss, self.optimizer)
            self.ratio, self.growth = self.ratio * ratio, growth

    @torch.no_grad()
    def _growth(self, name: str, transport: Transport) -> float:
        W = self.model.get_parameter(name)
        return float(transport.weight(W).norm() / W.norm())
