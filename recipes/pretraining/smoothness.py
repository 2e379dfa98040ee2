"""How far the loss's gradient holds along the optimizer's step, by role, now and then in a run."""

import torch
from torch import Tensor, nn

import symlm
from pretraining.routers import Routers
from symlm.gradient_smoothness import Smoothness, along_step
from symlm.step_control import evaluating


class SmoothnessProbe:
    """Every so many steps, measure the step that was made on its last batch: γ, and how many such steps γ is long."""

    def __init__(self, model: nn.Module, routers: Routers, every: int) -> None:
        self.model = getattr(model, "_orig_mod", model)  # compiled code has no forward derivative
        self.routers, self.every, self.roles = routers, every, symlm.assign_roles(self.model)
        self.taken = 0
        self.before: dict[str, Tensor] = {}
        self.found: dict[str, Smoothness] = {}

    def before_step(self) -> None:
        """Copy the parameters, if it is time to."""
        self.taken += 1
        due = self.taken % self.every == 0
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()} if due else {}

    def after_step(self, x: Tensor) -> None:
        """Measure the step from the copy to the parameters as they are, at the copy."""
        if not self.before:
            return
        step = {name: p.detach() - self.before[name] for name, p in self.model.named_parameters()}

        def loss(call: nn.Module) -> Tensor:
            output = call(input_ids=x, labels=x, **self.routers.inputs)
            return torch.stack(list(self.routers.losses(output).values())).sum()

        with evaluating(self.model):
            self.found = along_step(self.model, step, loss, self.before, self.roles)
        self.before = {}

    def metrics(self) -> dict[str, float]:
        """Return γ by role, and its length in steps, as last measured."""
        gammas = {f"smoothness/gamma/{role}": s.gamma for role, s in self.found.items()}
        return {**gammas, **{f"smoothness/steps/{role}": s.steps for role, s in self.found.items()}}

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]
