"""What a step checks of its parameters before anything moves: they are still those that the optimizer was built for."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.layout import layout_of
from symlm.routing.options import named_parameters
from symlm.sizes.constraints import get_constraint

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
        if get_constraint(group["constraint"]).measures and layout_of(p, group["shared"]).gathered:
            raise RuntimeError(
                f"{name} is placed as {list(p.placements)}, and constraint {group['constraint']!r} measures whole "  # type: ignore[attr-defined]
                "matrices, which it can where rows are sharded over one axis of the mesh: use 'decay'"
            )
        if mean is not None and mean.shape != p.shape:
            raise RuntimeError(
                f"{name} has shape {list(p.shape)} now and had {list(mean.shape)} in the steps before "
                "(resize_token_embeddings?): build a new SymOptimizer after the model has changed"
            )


def warn_of_no_gradient(groups: Sequence[dict[str, Any]]) -> bool:
    """Warn of a step in which no parameter has a gradient, as after a model was replaced or wrapped in LoRA.

    Args:
        groups: All parameter groups; ZeRO empties them between steps, which is no reason to warn.

    Returns:
        Whether it warned.
    """
    if not any(group["params"] for group in groups):
        return False
    warnings.warn(
        "no parameter of this optimizer has a gradient, and the step changes nothing: was the model replaced, frozen "
        "or given adapters after SymOptimizer was built? Build it last, and call verify() after a step",
        stacklevel=6,
    )
    return True
