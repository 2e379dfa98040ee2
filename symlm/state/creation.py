"""The optimizer's state of a parameter: the momentum, the rule's state, and the rounding error."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.layout import layout_of
from symlm.distributed.partitions import Fragment
from symlm.distributed.tensors import repeated_like
from symlm.polar.precision import accumulation_dtype
from symlm.routing.options import named_parameters
from symlm.rules import get_rule
from symlm.state.originals import Originals
from symlm.views.matrix_view import MatrixView

MEANS = ("momentum", "exp_avg", "exp_avg_sq")  # of the parameter's own shape


def create_state(group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]], originals: Originals) -> None:
    """Give every parameter of a group its state at once, so that all ranks and checkpoints agree on the keys.

    What others stored there before the first step (a schedule-free wrapper, SAM) stays.

    Args:
        group: The parameter group.
        states: The optimizer's state, in which the missing tensors are made.
        originals: The parameters of ZeRO's partitions.

    Raises:
        RuntimeError: The rule stores whole matrices, and a parameter is a partition.
    """
    needed = stored_keys(group)
    for name, p in named_parameters(group):
        if not (needed | ({"compensation"} if _compensates(group, p) else set())) <= states[p].keys():
            for key, value in new_state(group, name, p, originals.fragments(group, p)).items():
                states[p].setdefault(key, value)


def stored_keys(group: dict[str, Any]) -> set[str]:
    """Return the names of the tensors that a step reads from a parameter's state.

    Args:
        group: The parameter group.
    """
    rule = get_rule(group["rule"])
    means = {"exp_avg", "exp_avg_sq"} if rule.elementwise else {"momentum"}
    return means | set(rule.state) | ({"step"} if rule.elementwise or rule.state else set())


def count_step(group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]], finite: Tensor) -> None:
    """Count a step in the state of rules that have one; torch's AdamW counts its own.

    Args:
        group: The parameter group.
        states: The optimizer's state.
        finite: Whether the step happens, a bool of one element.
    """
    for p in group["params"] if get_rule(group["rule"]).state else ():
        if p.grad is not None:
            states[p]["step"].add_(finite.to(states[p]["step"].device))


def new_state(group: dict[str, Any], name: str, p: Tensor, fragments: list[Fragment]) -> dict[str, Tensor]:
    """Make the state of a parameter before its first step, sharded as the parameter is.

    Args:
        group: The parameter group.
        name: The parameter's name.
        p: The parameter, or a flat partition of ZeRO.
        fragments: The parts of parameters in a partition; empty for a parameter.

    Returns:
        The state tensors by name, in fp32 or wider, except for the momentum if its dtype is set, and for the
        compensation, which has the parameter's.

    Raises:
        RuntimeError: The rule stores whole matrices, and p is a partition.
    """
    rule, dtype = get_rule(group["rule"]), accumulation_dtype(p.dtype)
    momentum_dtype = getattr(torch, group["momentum_dtype"]) if dtype == torch.float32 else dtype
    dtypes = dict.fromkeys(("exp_avg", "exp_avg_sq"), dtype) if rule.elementwise else {"momentum": momentum_dtype}
    state = {key: torch.zeros_like(p, dtype=of, memory_format=torch.preserve_format) for key, of in dtypes.items()}
    if rule.state:
        state |= _state_of_rule(group, name, p, fragments, dtype)
    if rule.elementwise or rule.state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    if _compensates(group, p):
        state["compensation"] = torch.zeros_like(p)
    return state


def _compensates(group: dict[str, Any], p: Tensor) -> bool:
    return group["rounding"] == "compensated" and p.dtype != accumulation_dtype(p.dtype)


def of_fragments(
    group: dict[str, Any], state: dict[str, Tensor], fragments: list[Fragment]
) -> Iterator[dict[str, Tensor]]:
    """Yield the state of each fragment of a partition of ZeRO, as views of the partition's state.

    Args:
        group: The parameter group.
        state: The state of the partition, from `new_state`.
        fragments: The fragments of the partition, in its order.

    Yields:
        The state tensors of one fragment by name.
    """
    rule, row, entry = get_rule(group["rule"]), 0, 0
    for fragment in fragments:
        views = {key: fragment.of(x) for key, x in state.items() if key not in (*rule.state, "step")}
        rows, n = fragment.rows, fragment.layout.shape[-1]
        for key in rule.state:
            if key in rule.row_state_keys:
                views[key] = state[key][row : row + rows]
            else:
                views[key] = state[key][entry : entry + n * n].view(n, n)
        if rule.state:
            views["step"] = state["step"]
        row, entry = row + rows, entry + n * n
        yield views


def _state_of_rule(
    group: dict[str, Any], name: str, p: Tensor, fragments: list[Fragment], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the rule's state before a first step: row states sharded as the rows are, matrices replicated."""
    rule, view = get_rule(group["rule"]), MatrixView.parse(group["view"])
    if rule.row_map and fragments:  # matrices are stored flat, one after the other
        rows, entries = sum(part.rows for part in fragments), sum(part.layout.shape[-1] ** 2 for part in fragments)
        shapes = {key: (rows, 1) if key in rule.row_state_keys else (entries,) for key in rule.state}
        return {key: torch.zeros(shape, dtype=dtype, device=p.device) for key, shape in shapes.items()}
    if fragments:
        raise RuntimeError(
            f"{name}: rule {rule.name!r} stores whole matrices, for which DeepSpeed's partitions have no place; "
            "train it with DDP or FSDP2"
        )
    by_rows = set() if layout_of(p).gathered else rule.row_state_keys
    sharded = {key: torch.zeros_like(p[:, :1], dtype=dtype) for key in by_rows}
    M = torch.zeros((), dtype=dtype, device=p.device).expand(view.shape(tuple(p.shape)))
    whole = {key: kind.start(M) for key, kind in rule.state.items() if key not in sharded}
    return sharded | {key: repeated_like(value[0] if rule.row_map else value, p) for key, value in whole.items()}
