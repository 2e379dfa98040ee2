"""What a step checks of its parameters before anything moves: they are still those that the optimizer was built for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from symlm.routing.options import named_parameters

MEANS = ("momentum", "exp_avg")


def check_parameters(group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Check that no parameter changed its dtype or shape since its state was created.

    Args:
        group: A parameter group.
        states: The optimizer's state.

    Raises:
        RuntimeError: Names the parameter, what it was and what it is, and the remedy. Nothing has moved.
    """
    for name, p in named_parameters(group):
        mean = next((states[p][key] for key in MEANS if key in states.get(p, ())), None)
        if p.dtype not in (torch.float64, torch.float32, torch.bfloat16) or (
            mean is not None and (p.dtype == torch.float64) != (mean.dtype == torch.float64)
        ):
            raise RuntimeError(
                f"{name} is {p.dtype} now, which this optimizer was not built for: convert the model before you build "
                "SymOptimizer, to float32 or bfloat16 (autocast may compute in float16)"
            )
        if mean is not None and mean.shape != p.shape:
            raise RuntimeError(
                f"{name} has shape {list(p.shape)} now and had {list(mean.shape)} in the steps before "
                "(resize_token_embeddings?): build a new SymOptimizer after the model has changed"
            )
