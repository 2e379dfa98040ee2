"""What a dense layer is, by its class or by what it does, and how many inputs and outputs it has."""

from torch import Tensor, nn

from symlm.roles.role import whole_shape
from symlm.roles.wrappers import inner_module

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_dense(module: nn.Module | None) -> bool:
    """Tell whether a module is a dense layer, by its class or a subclass's name.

    Args:
        module: A module.
    """
    return isinstance(module, nn.Linear) or type(module).__name__.endswith(("Linear", "Conv1D"))


def is_convolution(module: nn.Module | None) -> bool:
    """Tell whether a module is a convolution, of torch or of a subclass.

    Args:
        module: The module that holds the parameter.
    """
    return isinstance(module, nn.modules.conv._ConvNd)


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
    return (rows, columns) if type(layer).__name__.endswith("Conv1D") else (columns, rows)
