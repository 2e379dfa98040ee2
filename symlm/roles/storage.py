"""How a weight is stored: its full shape, and whether its outputs come before its inputs."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from symlm.roles.source.calls import multiplies_by_weight, multiplies_from_rows

BLOCKS = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("w1", "w2"), ("w1", "w3"), ("wi", "wo"))
COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
ROUTERS = ("router", "gate", "gating")  # ends of the names of classes
PARALLEL = re.compile(r"(Column|Row)ParallelLinear$")  # fairscale's and Megatron's, whose products are elsewhere
AXES = re.compile(r"_[A-Z]{2,4}$")  # at the end of a name, as torchtitan's `w1_EFD`
SIZES = (
    *(("in_features", "out_features"), ("input_size", "output_size"), ("in_dim", "out_dim")),
    *(("input_dim", "output_dim"), ("d_in", "d_out")),
)


def whole_shape(p: Tensor) -> tuple[int, ...]:
    """Return the full shape of a parameter, also of one that ZeRO-3 has emptied between uses.

    Args:
        p: The parameter; ZeRO-3 stores the full shape in `ds_shape`.

    Returns:
        The shape.
    """
    return tuple(getattr(p, "ds_shape", p.shape))


def inputs_first(module: nn.Module, around: nn.Module | None = None) -> bool | None:
    """Tell whether a module stores [..., inputs, outputs], as Conv1D and some experts do, and not as torch's layers.

    Sizes decide where they differ, then the code: `x @ W` or `x @ W.T`.

    Args:
        module: The module that holds the weight.
        around: The module around it, where a router may stand beside experts.

    Returns:
        None where neither sizes nor code show it.
    """
    stated = getattr(module, "is_transposed", None)
    name = type(module).__name__
    if isinstance(stated, bool) or name.endswith("Conv1D") or isinstance(module, nn.Linear):
        return bool(stated) or name.endswith("Conv1D")
    if PARALLEL.search(name):
        return False
    if pair := block_of_experts(module):
        return _of_experts(*pair, around, type(module))
    if name.lower().endswith(ROUTERS) or router_weights(module):
        return _of_router(module, around)
    weight = getattr(module, "weight", None)
    if not (name.endswith("Linear") or is_own_layer(module)) or not isinstance(weight, Tensor):
        return False
    rows, columns = (*whole_shape(weight), 0, 0)[:2]
    for names in SIZES:
        inputs, outputs = (getattr(module, size, None) for size in names)
        if inputs != outputs and {inputs, outputs} == {rows, columns}:
            return inputs == rows
    return _by_code(type(module))


def is_own_layer(module: nn.Module) -> bool:
    """Tell whether a module of a class of one's own is a dense layer: a matrix, a bias perhaps, and their product.

    Args:
        module: A module.
    """
    own = dict(module.named_parameters(recurse=False))
    alone = (
        not module._modules
        and {*own} <= {"weight", "bias"}
        and "weight" in own
        and not isinstance(module, nn.Embedding)
    )
    return (
        alone
        and len(whole_shape(own["weight"])) == 2
        and not type(module).__name__.lower().endswith(ROUTERS)
        and multiplies_by_weight(type(module))
    )


def block_of_experts(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the matrices into the neurons of stacked experts and out of them, where a module holds both.

    Args:
        module: A module.
    """
    own = module.named_parameters(recurse=False)
    stacks = {AXES.sub("", name): p for name, p in own if len(whole_shape(p)) == 3}
    pairs = [(stacks[into], stacks[out]) for into, out in BLOCKS if {into, out} <= {*stacks}]
    return next(((into, out) for into, out in pairs if _lead_back(whole_shape(into), whole_shape(out))), None)


def _lead_back(into: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Tell whether two stacks are of the same experts, and no two ways into their neurons."""
    return into[0] == out[0] and (into != out or into[1] == into[2])


def router_weights(module: nn.Module) -> list[str]:
    """Return the names of a module's own matrices with a row or a column for each of the experts beside them.

    The experts are in a list, or in stacks of the module.

    Args:
        module: A module that holds experts.
    """
    experts = {len(child) for child in module.children() if isinstance(child, nn.ModuleList) and len(child) > 1}
    experts |= {whole_shape(p)[0] for p in block_of_experts(module) or ()}
    own = module.named_parameters(recurse=False)
    return [name for name, p in own if len(whole_shape(p)) == 2 and experts & {*whole_shape(p)}]


def number_of_experts(module: nn.Module | None) -> set[int]:
    """Return how many experts a module states or holds in a list or in stacks.

    Args:
        module: A router, or the module around it.
    """
    if module is None:
        return set()
    stated: list[Any] = [
        getattr(owner, name, 0) for owner in (module, getattr(module, "config", None)) for name in COUNTS
    ]
    lists = [len(child) for child in module.children() if isinstance(child, nn.ModuleList)]
    stacks = [
        whole_shape(p)[0]
        for child in (module, *module.children())
        for p in child.parameters(recurse=False)
        if len(whole_shape(p)) == 3
    ]
    return {count for count in [*stated, *lists, *stacks] if isinstance(count, int) and count > 1}


def _of_router(module: nn.Module, around: nn.Module | None) -> bool | None:
    """Decide for a router that holds its weights: by the number of experts, then by the code."""
    experts = number_of_experts(module) or number_of_experts(around)
    for rows, columns in (whole_shape(p) for p in module.parameters(recurse=False) if len(whole_shape(p)) == 2):
        if (rows in experts) != (columns in experts):
            return columns in experts
    return _by_code(type(module))


def _of_experts(into: Tensor, out: Tensor, around: nn.Module | None, kind: type) -> bool | None:
    """Decide for experts: by shapes where gate and up are one, by the router's width, then by the code."""
    (_, first, second), (_, third, last) = whole_shape(into), whole_shape(out)
    if (first, second) != (last, third):  # gate and up are in one tensor, which is twice as wide
        return second != third
    routers = {shape[1] for shape in _matrices(around) if shape[0] == len(into)}
    routers |= {shape[0] for shape in _matrices(around) if shape[1] == len(into)}
    fits = {first, second} & routers
    return (first in fits) if len(fits) == 1 and first != second else _by_code(kind)


def _by_code(kind: type) -> bool | None:
    rows = multiplies_from_rows(kind)
    return None if rows is None else not rows


def _matrices(around: nn.Module | None) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of the matrices that stand beside experts."""
    shapes = (whole_shape(p) for p in around.parameters()) if around is not None else ()
    yield from (shape for shape in shapes if len(shape) == 2)
