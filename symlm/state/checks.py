"""What a step checks of its parameters before anything moves: they are still those that the optimizer was built for."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.layout import layout_of
from symlm.distributed.tensors import local
from symlm.routing.options import named_parameters
from symlm.rules import get_rule
from symlm.sizes.constraints import get_constraint
from symlm.state.creation import MEANS, new_state

SQUARES = ("exp_avg_sq",)  # of a large gradient they are infinite, and its entry stands still as in torch's AdamW


def check_parameters(group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Check that no parameter changed its dtype or shape since its state was created.

    Args:
        group: A parameter group.
        states: The optimizer's state.

    Raises:
        RuntimeError: Names the parameter, what it was and what it is, and the remedy. Nothing has moved.
    """
    for name, p in named_parameters(group):
        mean = next((states[p][key] for key in MEANS[:2] if key in states.get(p, ())), None)
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


def flaw_of(group: dict[str, Any], name: str, p: Tensor, state: Mapping[str, Any], needed: set[str]) -> str:
    """Say why no step can go on from a saved state of a parameter.

    Args:
        group: The parameter group with every option.
        name: The parameter's name.
        p: The parameter.
        state: What was saved of it.
        needed: The tensors that it must have.

    Returns:
        What it lacks, or has in another shape, place or dtype or not finite; nothing for a state that is whole.
    """
    if missing := sorted(key for key in needed if not isinstance(state.get(key), Tensor)):
        return f"lacks {missing}: it is incomplete, save it anew"
    begun = _begun(group, name, p)
    for key in sorted(needed | ({"compensation"} & state.keys())):
        x, first = state[key], begun.get(key, state[key])
        if x.shape != first.shape:
            return f"is of another size: its saved {key} is {list(x.shape)}, the parameter is {list(p.shape)}"
        if key in MEANS and _place(x) != _place(p):
            return (
                "is placed otherwise than the parameter, as by another rank, number of ranks or wrapper: give the "
                "whole state to torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        if x.dtype != first.dtype and not (x.is_floating_point() and first.is_floating_point()):
            return f"is damaged: its saved {key} is {x.dtype}; take another checkpoint"
        if local(x).is_meta != local(p).is_meta:
            return f"is incomplete: its saved {key} has no numbers; take another checkpoint"
        if not local(p).is_meta and not _can_go_on(key, local(x)):
            return f"is damaged: its saved {key} is not finite; take another checkpoint, or the rest by strict=False"
    return ""


def _place(x: Any) -> tuple[Any, ...] | None:
    """Return which part of a whole a DTensor is on this rank, or was on the one that saved it; None for a plain one."""
    return (x.placements, x.device_mesh.get_coordinate(), local(x).shape) if hasattr(x, "placements") else None


def _can_go_on(key: str, x: Tensor) -> bool:
    return not x.isnan().any() if key in SQUARES else bool(x.isfinite().all())


def _begun(group: dict[str, Any], name: str, p: Tensor) -> Mapping[str, Tensor]:
    """Return the state of a parameter before a first step, without memory; of shards and partitions the means alone."""
    if hasattr(p, "placements") or (p.ndim < 2 and not get_rule(group["rule"]).elementwise):
        return dict.fromkeys(MEANS, p) if group["momentum_dtype"] != "int8" else {}
    return new_state(group, name, torch.empty_like(p, device="meta"), [])
