"""The groups that leave a transformer's loss unchanged, as transports of its weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from symlm.symmetry import Transport

Transports = Mapping[str, Transport]


def neuron_scales(model: nn.Module, T: Tensor) -> dict[str, Transport]:
    """Return the scales `up' = e^T up`, `down' = down e^{-T}` of a SwiGLU's neurons.  Shapes: T (layers, neurons)."""
    found = {}
    for path, t in zip(_paths(model, "up_proj", len(T)), T, strict=True):
        neurons = len(model.get_parameter(f"{path}.up_proj.weight"))
        if neurons != len(t):
            raise ValueError(f"{path} has {neurons} neurons, T has {len(t)} a layer")
        found[f"{path}.up_proj.weight"] = Transport(left=t.exp())
        found[f"{path}.down_proj.weight"] = Transport(right=t.exp())
    return found


def neuron_permutations(model: nn.Module, orders: Tensor) -> dict[str, Transport]:
    """Return permutations of gate, up and down together.  Shapes: orders (layers, neurons), each a permutation."""
    found = {}
    for path, order in zip(_paths(model, "up_proj", len(orders)), orders, strict=True):
        P = torch.eye(len(order), dtype=_dtype(model), device=order.device)[order][None]
        for name in ("gate_proj", "up_proj"):
            found[f"{path}.{name}.weight"] = Transport(left=P)
        found[f"{path}.down_proj.weight"] = Transport(right=P)
    return found


def value_output(model: nn.Module, T: Tensor) -> dict[str, Transport]:
    """Return `v' = g v`, `o' = o g^{-1}`, `g = exp(T)` in GL(head), of each head of values.

    Shapes: T (layers, value heads, head, head). Query heads that share a value head share its g.
    """
    found = {}
    for path, t in zip(_paths(model, "v_proj", len(T)), T, strict=True):
        g = torch.linalg.matrix_exp(t)
        value, output = (model.get_parameter(f"{path}.{leaf}.weight") for leaf in ("v_proj", "o_proj"))
        groups = output.shape[1] // value.shape[0]
        found[f"{path}.v_proj.weight"] = Transport(left=g)
        found[f"{path}.o_proj.weight"] = Transport(right=g.repeat_interleave(groups, dim=0))
    return found


def rope_rotations(model: nn.Module, angles: Tensor) -> dict[str, Transport]:
    """Return `q' = R q`, `k' = R k`, R turning the pair (i, i + head/2) of each head by its angle, as RoPE does.

    Shapes: angles (layers, key heads, head/2). Query heads that share a key head share its R. Gains of a norm on q
    and k must be equal within a pair.
    """
    found = {}
    for path, angle in zip(_paths(model, "k_proj", len(angles)), angles, strict=True):
        cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
        R = torch.cat([torch.cat([cos, -sin], dim=-1), torch.cat([sin, cos], dim=-1)], dim=-2)
        query, key = (model.get_parameter(f"{path}.{leaf}.weight") for leaf in ("q_proj", "k_proj"))
        groups = query.shape[0] // key.shape[0]
        found[f"{path}.q_proj.weight"] = Transport(left=R.repeat_interleave(groups, dim=0))
        found[f"{path}.k_proj.weight"] = Transport(left=R)
    return found


def head_shift(model: nn.Module, v: Tensor) -> dict[str, Transport]:
    """Return the shift of every row of an untied head by v, which no softmax sees.  Shapes: v (d)."""
    return {"lm_head.weight": Transport(shift=v)}


def residual_rotation(model: nn.Module, Q: Tensor) -> dict[str, Transport]:
    """Return the rotation of the residual stream: readers `W Qᵀ`, writers `Q W`.  Shapes: Q (d, d), orthogonal.

    It leaves the loss unchanged where every norm of the stream has unit gains.
    Raises: ValueError for a model with weights of which it is not known whether they read the stream or write it.
    """
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")
    found = {}
    for name, p in model.named_parameters():
        leaf = name.split(".")[-2] if "." in name else name
        if p.ndim == 2 and leaf in readers:
            found[name] = Transport(right=Q[None])
        elif p.ndim == 2 and leaf in ("o_proj", "down_proj"):
            found[name] = Transport(left=Q[None])
        elif p.ndim > 1:
            raise ValueError(
                f"{name}: a rotation knows {(*readers, 'o_proj', 'down_proj')}, and not how this one turns"
            )
    return found


def _paths(model: nn.Module, leaf: str, layers: int) -> list[str]:
    found = [name.rpartition(".")[0] for name, _ in model.named_modules() if name.rpartition(".")[2] == leaf]
    if len(found) != layers:
        raise ValueError(f"{type(model).__name__} has {len(found)} {leaf}, the action is on {layers}")
    return found


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
