"""What a dense layer is, by its class or by what it does, and how many inputs and outputs it has."""

import re

from torch import Tensor, nn

from symlm.roles.recognizers.names import HEAD_COUNTS
from symlm.roles.role import TENSORS, Site
from symlm.roles.source.calls import functions_called
from symlm.roles.storage import inputs_first, is_own_layer, whole_shape
from symlm.roles.wrappers import inner_module

NORMS = ("_WeightNorm", "_SpectralNorm")  # torch's, of a weight that is stored
ACTIVATION = re.compile(r"(^|_|norm)act|^(sin|erf)$|gelu|relu|silu|swi|glu|tanh|sigmoid|mish|softplus|(^|_)elu|ACT2FN")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_dense(module: nn.Module | None) -> bool:
    """Tell whether a module is a dense layer: by its class, by its class's name, or by what it does with its weight.

    Args:
        module: A module.
    """
    if module is None or isinstance(module, nn.Linear):
        return module is not None
    named = type(module).__name__.endswith(("Linear", "Conv1D"))
    return isinstance(getattr(module, "weight", None), Tensor) and (named or is_own_layer(module))


def is_weight_of_dense(site: Site) -> bool:
    """Tell whether a parameter is the weight of a dense layer, and nothing else that such a layer holds.

    Args:
        site: The parameter's site.
    """
    last = site.name.rpartition(".")[2]
    attention = isinstance(site.module, nn.MultiheadAttention)
    return attention or (is_dense(site.module) and (last in TENSORS or ".parametrizations." in site.name))


def is_computed(site: Site) -> bool:
    """Tell whether a weight is computed from what is stored by other means than norms and adapters.

    Args:
        site: The site of a weight.
    """
    if ".parametrizations." not in site.name:
        return False
    tensor = site.name.rpartition(".parametrizations.")[2].partition(".")[0]
    steps = getattr(site.module, "parametrizations")[tensor]  # noqa: B009
    return any(type(step).__name__ not in NORMS and not hasattr(step, "lora_A") for step in steps)


def is_convolution(module: nn.Module | None) -> bool:
    """Tell whether a module is a convolution, of torch or of a subclass.

    Args:
        module: The module that holds the parameter.
    """
    return isinstance(module, nn.modules.conv._ConvNd)


def kind_of(module: nn.Module | None) -> str:
    """Return the name of a module's class in small letters.

    Args:
        module: A module.
    """
    return type(module).__name__.lower()


def is_norm(module: nn.Module | None) -> bool:
    """Tell whether a module is a norm, by its class's name.

    Args:
        module: The module that holds the parameter.
    """
    return "norm" in kind_of(module)


def is_pointwise(module: nn.Module | None) -> bool:
    """Tell whether a module is a convolution over single places: a dense layer of every place.

    Args:
        module: The module that holds the parameter.
    """
    return isinstance(module, nn.modules.conv._ConvNd) and set(module.kernel_size) == {1}


def dense_children(module: nn.Module) -> dict[str, nn.Module]:
    """Return the dense layers that stand in a module, by their names, without wrappers.

    Args:
        module: A module.
    """
    inner = {name: inner_module(child) for name, child in module.named_children()}
    return {name: child for name, child in inner.items() if child is not None and is_dense(child)}


def heads_of(module: object) -> int:
    """Return the number of heads that a module or a config states; 0 without one.

    Args:
        module: A module or a config.
    """
    counts = (getattr(module, name, None) for name in HEAD_COUNTS if name != "groups")
    return next((count for count in counts if isinstance(count, int) and count > 1), 0)


def is_alone(module: nn.Module) -> bool:
    """Tell whether a module holds one dense layer and nothing else that has a matrix, as BERT's output layers do.

    Args:
        module: A module around a dense layer.
    """
    return len(dense_children(module)) == 1


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a dense layer; (0, 0) where its weight is no matrix.

    Args:
        layer: The layer.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or len(whole_shape(weight)) != 2:
        return 0, 0
    rows, columns = whole_shape(weight)
    return (rows, columns) if inputs_first(layer) else (columns, rows)


def activates(module: nn.Module) -> bool:
    """Tell whether the code of a module names an activation, or a child is one, by its class.

    Args:
        module: A module around dense layers.
    """
    children = [child for child in module.children() if not isinstance(child, nn.MultiheadAttention)]
    if any(type(child).__module__ == "torch.nn.modules.activation" for child in children):
        return True
    bare = (kind_of(child) for child in children if not any(True for _ in child.parameters()))
    return any(map(ACTIVATION.search, (*functions_called(type(module)), *bare)))
