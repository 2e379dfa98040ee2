"""The groups that preserve a transformer's loss, as transports of its weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from symlm.symmetry import Transport

Transports = Mapping[str, Transport]


def neuron_scales(model: nn.Module, T: Tensor) -> dict[str, Transport]:
    """Scale the neurons of each SwiGLU, `up' = e^T up`, `down' = down e^{-T}`.

    Args:
        model: The model, with modules `up_proj` and `down_proj` in every layer.
        T: The logarithms of the scales, (layers, neurons).

    Returns:
        The transports by parameter name.

    Raises:
        ValueError: The model has another number of layers or of neurons than T.
    """
    transports = {}
    for path, t in zip(_paths(model, "up_proj", len(T)), T, strict=True):
        neurons = len(model.get_parameter(f"{path}.up_proj.weight"))
        if neurons != len(t):
            raise ValueError(f"{path} has {neurons} neurons, T has {len(t)} a layer; give one number for each neuron")
        transports[f"{path}.up_proj.weight"] = Transport(left=t.exp())
        transports[f"{path}.down_proj.weight"] = Transport(right=t.exp())
    return transports


def neuron_permutations(model: nn.Module, orders: Tensor) -> dict[str, Transport]:
    """Permute the neurons of each SwiGLU, gate, up and down together.

    Args:
        model: The model, with modules `gate_proj`, `up_proj` and `down_proj` in every layer.
        orders: A permutation of the neurons for each layer, (layers, neurons), integers.

    Returns:
        The transports by parameter name.

    Raises:
        ValueError: The model has another number of layers than `orders`, or a row of these is no permutation.
    """
    transports = {}
    for path, order in zip(_paths(model, "up_proj", len(orders)), orders, strict=True):
        if order.is_floating_point() or not torch.equal(order.sort().values, torch.arange(len(order)).to(order)):
            raise ValueError(f"orders of {path} are no permutation of 0 to {len(order) - 1}; give torch.randperm's")
        P = torch.eye(len(order), dtype=_dtype(model), device=order.device)[order][None]
        for name in ("gate_proj", "up_proj"):
            transports[f"{path}.{name}.weight"] = Transport(left=P)
        transports[f"{path}.down_proj.weight"] = Transport(right=P)
    return transports


def value_output(model: nn.Module, T: Tensor) -> dict[str, Transport]:
    """Act on each head of values, `v' = g v`, `o' = o g^{-1}`, `g = exp(T)` in GL(head).

    Query heads that share a value head share its g.

    Args:
        model: The model, with modules `v_proj` and `o_proj` in every layer.
        T: The logarithms of g, (layers, value heads, head, head).

    Returns:
        The transports by parameter name.

    Raises:
        ValueError: The model has another number of layers than T.
    """
    transports = {}
    for path, t in zip(_paths(model, "v_proj", len(T)), T, strict=True):
        g = torch.linalg.matrix_exp(t)
        value, output = (model.get_parameter(f"{path}.{leaf}.weight") for leaf in ("v_proj", "o_proj"))
        groups = output.shape[1] // value.shape[0]
        transports[f"{path}.v_proj.weight"] = Transport(left=g)
        transports[f"{path}.o_proj.weight"] = Transport(right=g.repeat_interleave(groups, dim=0))
    return transports


def rope_rotations(model: nn.Module, angles: Tensor) -> dict[str, Transport]:
    """Rotate queries and keys, `q' = R q`, `k' = R k`, the pair (i, i + head/2) of each head by its angle as in RoPE.

    Query heads that share a key head share its R. The gains of a norm on q and k must be equal within a pair.

    Args:
        model: The model, with modules `q_proj` and `k_proj` in every layer.
        angles: The angles, (layers, key heads, head/2), radians.

    Returns:
        The transports by parameter name.

    Raises:
        ValueError: The model has another number of layers than `angles`.
    """
    transports = {}
    for path, angle in zip(_paths(model, "k_proj", len(angles)), angles, strict=True):
        cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
        R = torch.cat([torch.cat([cos, -sin], dim=-1), torch.cat([sin, cos], dim=-1)], dim=-2)
        query, key = (model.get_parameter(f"{path}.{leaf}.weight") for leaf in ("q_proj", "k_proj"))
        groups = query.shape[0] // key.shape[0]
        transports[f"{path}.q_proj.weight"] = Transport(left=R.repeat_interleave(groups, dim=0))
        transports[f"{path}.k_proj.weight"] = Transport(left=R)
    return transports


def head_shift(model: nn.Module, v: Tensor) -> dict[str, Transport]:
    """Add v to every row of an untied head, which changes no softmax of its logits.

    Args:
        model: The model, with the head `lm_head`.
        v: The shift, (d,).

    Returns:
        The transport by parameter name.
    """
    return {"lm_head.weight": Transport(shift=v)}


def residual_rotation(model: nn.Module, Q: Tensor) -> dict[str, Transport]:
    """Rotate the residual stream: weights that read it become `W Qᵀ`, weights that write it `Q W`.

    It preserves the loss if every norm of the stream has unit gains.

    Args:
        model: The model.
        Q: An orthogonal matrix, (d, d).

    Returns:
        The transports by parameter name.

    Raises:
        ValueError: It is not known of a weight whether it reads the stream or writes it.
    """
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")
    transports = {}
    for name, p in model.named_parameters():
        leaf = name.split(".")[-2] if "." in name else name
        if p.ndim == 2 and leaf in readers:
            transports[name] = Transport(right=Q[None])
        elif p.ndim == 2 and leaf in ("o_proj", "down_proj"):
            transports[name] = Transport(left=Q[None])
        elif p.ndim > 1:
            raise ValueError(
                f"{name}: the residual rotation is defined for {(*readers, 'o_proj', 'down_proj')}, not for this "
                "weight; rename the model's modules, or leave this action out"
            )
    return transports


def _paths(model: nn.Module, leaf: str, layers: int) -> list[str]:
    """Return the paths of the modules with a submodule of that name, one for each layer."""
    paths = [name.rpartition(".")[0] for name, _ in model.named_modules() if name.rpartition(".")[2] == leaf]
    if len(paths) != layers:
        raise ValueError(
            f"{type(model).__name__} has {len(paths)} modules {leaf}, the action has {layers} layers; "
            "give one layer for each"
        )
    return paths


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first parameter."""
    return next(model.parameters()).dtype
