"""An adapter for the Hugging Face Trainer: a factory for its argument `optimizer_cls_and_kwargs`."""

from typing import Any

from torch import nn

from symlm.optimizer import SymOptimizer


class TrainerOptimizer:
    """Make a SymOptimizer of a model's parameters; the Trainer calls `TrainerOptimizer()(model, **kwargs)`."""

    def __call__(self, model: nn.Module, **kwargs: Any) -> SymOptimizer:
        """Make the optimizer.

        Args:
            model: The model.
            kwargs: The other arguments of `SymOptimizer`.

        Returns:
            The optimizer.

        Raises:
            ValueError: As `SymOptimizer`.
            TypeError: As `SymOptimizer`.
        """
        return SymOptimizer(model, **kwargs)


def trainer_optimizer(lr: float = 0.02, **kwargs: Any) -> tuple[type[TrainerOptimizer], dict[str, Any]]:
    """Return the argument `optimizer_cls_and_kwargs` of a Trainer, in transformers from 5.17 on and in TRL.

    The Trainer's `learning_rate` and `weight_decay` are not used. Its schedule and warm-up scale the rate of every
    group. Its `max_grad_norm` changes the step of AdamW's groups; rules of degree 0 are affected only by the weight of
    the gradient in the momentum.

    Args:
        lr: The rate η, as in `SymOptimizer`.
        kwargs: The other arguments of `SymOptimizer`, without the model.

    Returns:
        The factory class, and the arguments with which the Trainer calls it.
    """
    return TrainerOptimizer, {"lr": lr, **kwargs}
