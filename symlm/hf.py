"""The Hugging Face Trainer's face: a factory for its `optimizer_cls_and_kwargs`, so that one line routes a model."""

from typing import Any

from torch import nn

from symlm.optimizer import SymOptimizer


class TrainerOptimizer:
    """Make a SymOptimizer of a model's parameters; the Trainer calls `TrainerOptimizer()(model, **kwargs)`."""

    def __call__(self, model: nn.Module, **kwargs: Any) -> SymOptimizer:
        """Return the optimizer.  Raises: as `SymOptimizer`."""
        return SymOptimizer(model, **kwargs)


def trainer_optimizer(lr: float = 0.02, **kwargs: Any) -> tuple[type[TrainerOptimizer], dict[str, Any]]:
    """Return what `Trainer(..., optimizer_cls_and_kwargs=...)` takes, in transformers from 5.17 on and in TRL.

    lr, kwargs: as `SymOptimizer`. The Trainer's own `learning_rate` and `weight_decay` are not used; its schedule and
    warm-up drive every group, and its `max_grad_norm` is felt by AdamW's groups alone (the rules have degree 0).
    """
    return TrainerOptimizer, {"lr": lr, **kwargs}
