"""The optimizer's state of a parameter: the momentum, the rule's state, and the rounding error."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
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
from symlm.state.quantization import SCALES, is_quantized, zero_momentum
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
        RuntimeError: A layer's matrices share a rotation, and a parameter is a partition.
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
    scales = {SCALES} if is_quantized(group) else set()
    return means | scales | set(rule.stored) | ({"step"} if rule.elementwise or rule.state else set())


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
        RuntimeError: A layer shares a rotation, or the momentum has blocks of whole rows, and p is a partition.
    """
    rule, dtype = get_rule(group["rule"]), accumulation_dtype(p.dtype)
    if is_quantized(group):
        state = zero_momentum(name, p, bool(fragments))
    else:
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
    rule, kind, at = get_rule(group["rule"]), (group["rule"], group["view"]), dict.fromkeys(state, 0)
    for fragment in fragments:
        views = {key: fragment.of(x) for key, x in state.items() if key not in (*rule.stored, "step")}
        for key, shape in _shapes_of_rule(*kind, fragment.layout.shape, fragment.rows).items():
            size = prod(shape)
            views[key] = state[key].view(-1)[at[key] : at[key] + size].view(shape)
            at[key] += size
        if rule.state:
            views["step"] = state["step"]
        yield views


def _first_of_rule(name: str, view: str, shape: tuple[int, ...], rows: int, M: Tensor) -> dict[str, Tensor]:
    """Return a rule's state of a fragment before a first step: a number a row of it, or the matrices of the whole."""
    rule = get_rule(name)
    whole = M.expand(shape if rule.row_map else MatrixView.parse(view).shape(shape)) if rule.state else M
    rows_alone = rule.row_state_keys
    return {k: M.new_zeros(rows, 1) if k in rows_alone else kind.start(whole) for k, kind in rule.stored.items()}


@lru_cache(maxsize=4096)  # it is asked for every fragment of every step
def _shapes_of_rule(name: str, view: str, shape: tuple[int, ...], rows: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `_first_of_rule`."""
    first = _first_of_rule(name, view, shape, rows, torch.empty((), device="meta"))
    return {key: tuple(x.shape) for key, x in first.items()}


def _state_of_rule(
    group: dict[str, Any], name: str, p: Tensor, fragments: list[Fragment], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the rule's state before a first step: row states sharded as the rows are, matrices replicated.

    Of fragments the states are one flat tensor, one after the other; every rank has the matrices of all, also of those
    of which it stores nothing.
    """
    rule, view = get_rule(group["rule"]), MatrixView.parse(group["view"])
    if fragments:
        if group["rotation"] == "layer" and rule.pull:
            raise RuntimeError(
                f"{name}: DeepSpeed steps group by group, and rotation 'layer' needs a layer's matrices together; set "
                "rotation 'own', or train it with DDP or FSDP2"
            )
        M, kind = torch.zeros((), dtype=dtype, device=p.device), (group["rule"], group["view"])
        firsts = [_first_of_rule(*kind, fragment.layout.shape, fragment.rows, M) for fragment in fragments]
        return {key: torch.cat([first[key].reshape(-1) for first in firsts]) for key in rule.stored}
    by_rows = set() if layout_of(p).gathered else rule.row_state_keys
    sharded = {key: torch.zeros_like(p[:, :1], dtype=dtype) for key in by_rows}
    M = torch.zeros((), dtype=dtype, device=p.device).expand(view.shape(tuple(p.shape)))
    whole = {key: kind.start(M) for key, kind in rule.stored.items() if key not in sharded}
    return sharded | {key: repeated_like(value[0] if rule.row_map else value, p) for key, value in whole.items()}
