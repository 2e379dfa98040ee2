"""What the optimizer keeps of a parameter: momentum, what the rule keeps, and what rounding lost."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.layout import layout_of
from symlm.distributed.partitions import Fragment
from symlm.distributed.tensors import repeated_like
from symlm.rules import get_rule
from symlm.views.matrix_view import MatrixView


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


def of_fragments(
    group: dict[str, Any], state: dict[str, Tensor], fragments: list[Fragment]
) -> Iterator[dict[str, Tensor]]:
    """Yield the state of each fragment of a partition of ZeRO's, all of it views of the partition's."""
    rule, row, entry = get_rule(group["rule"]), 0, 0
    for fragment in fragments:
        own = {key: fragment.of(x) for key, x in state.items() if key not in (*rule.state, "step")}
        rows, n = fragment.rows, fragment.layout.shape[-1]
        for key in rule.state:
            if key in rule.row_state_keys:
                own[key] = state[key][row : row + rows]
            else:
                own[key] = state[key][entry : entry + n * n].view(n, n)
        if rule.state:
            own["step"] = state["step"]
        row, entry = row + rows, entry + n * n
        yield own


def _of_rule(
    group: dict[str, Any], name: str, p: Tensor, fragments: list[Fragment], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return what the rule keeps: numbers by rows lie as the rows do, matrices are whole on every rank."""
    rule, view = get_rule(group["rule"]), MatrixView.parse(group["view"])
    if rule.row_map and fragments:  # matrices lie flat, one after the other
        rows, entries = sum(part.rows for part in fragments), sum(part.layout.shape[-1] ** 2 for part in fragments)
        shapes = {key: (rows, 1) if key in rule.row_state_keys else (entries,) for key in rule.state}
        return {key: torch.zeros(shape, dtype=dtype, device=p.device) for key, shape in shapes.items()}
    if fragments:
        raise RuntimeError(
            f"{name}: rule {rule.name!r} keeps whole matrices, for which DeepSpeed's partitions have no place; "
            "train it with DDP or FSDP2"
        )
    by_rows = set() if layout_of(p).gathered else rule.row_state_keys
    lying = {key: torch.zeros_like(p[:, :1], dtype=dtype) for key in by_rows}
    M = torch.zeros((), dtype=dtype, device=p.device).expand(view.shape(tuple(p.shape)))
    whole = {key: kind.start(M) for key, kind in rule.state.items() if key not in lying}
    return lying | {key: repeated_like(value[0] if rule.row_map else value, p) for key, value in whole.items()}
