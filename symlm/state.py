"""What the optimizer keeps of a parameter: momentum, what the rule keeps, and what rounding lost."""

from typing import Any

import torch
from torch import Tensor

from symlm.collectives import layout_of, repeated_like
from symlm.partitions import Fragment
from symlm.rules import get_rule
from symlm.views import MatrixView


def new_state(group: dict[str, Any], name: str, p: Tensor, fragments: list[Fragment]) -> dict[str, Tensor]:
    """Return the state of a parameter that no step has reached, fp32 or wider, and sharded as the parameter is.

    fragments: what a partition of ZeRO's holds, nothing for a parameter that is its own.
    Raises: RuntimeError for a rule whose state a partition cannot hold.
    """
    rule, dtype = get_rule(group["rule"]), torch.promote_types(p.dtype, torch.float32)
    momentum_dtype = getattr(torch, group["momentum_dtype"]) if dtype == torch.float32 else dtype
    kept = dict.fromkeys(("exp_avg", "exp_avg_sq"), dtype) if rule.elementwise else {"momentum": momentum_dtype}
    state = {key: torch.zeros_like(p, dtype=of, memory_format=torch.preserve_format) for key, of in kept.items()}
    if rule.state:
        state |= _of_rule(group, name, p, fragments, dtype)
    if rule.elementwise or rule.state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    if p.dtype != dtype and group["rounding"] == "compensated":
        state["compensation"] = torch.zeros_like(p)
    return state


def _of_rule(
    group: dict[str, Any], name: str, p: Tensor, fragments: list[Fragment], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return what the rule keeps: numbers by rows lie as the rows do, matrices are whole on every rank."""
    rule, view = get_rule(group["rule"]), MatrixView.parse(group["view"])
    if rule.row_map and fragments:
        rows = sum(fragment.rows for fragment in fragments)
        return {key: torch.zeros(rows, 1, dtype=dtype, device=p.device) for key in rule.state}
    if rule.row_map and not layout_of(p).gathered:
        return {key: torch.zeros_like(p[:, :1], dtype=dtype) for key in rule.state}
    if fragments:
        raise RuntimeError(
            f"{name}: rule {rule.name!r} keeps whole matrices, for which DeepSpeed's partitions have no place; "
            "train it with DDP or FSDP2"
        )
    whole = rule.start(torch.zeros(view.shape(tuple(p.shape)), dtype=dtype, device=p.device))
    return {key: repeated_like(value[0] if rule.row_map else value, p) for key, value in whole.items()}
