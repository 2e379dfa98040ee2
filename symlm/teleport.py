"""Symmetry teleportation: move a model along the group that leaves its loss unchanged, to where the gradient is large.

A group acts on a weight as `W' = L W R^{-1}`. The loss is the same there, so its gradient, and any mean of gradients in
an optimizer's state, moves as the covector `G' = L^{-T} G R^T`: the search needs one gradient and no further look at
the model. Source: Zhao, Dehmamy, Walters & Yu, NeurIPS 2022; the transformer's groups are derived.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from symlm.rules import get_rule
from symlm.rules.rule import State
from symlm.symmetry import Group, Transport, permutations, rotations, signed_permutations
from symlm.views import TRANSPOSED, WHOLE, MatrixView

TOLERANCE = 1e-10  # of float64, relative; fp32 gets 1e-5


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


@torch.no_grad()
def teleport(
    model: nn.Module,
    transports: Transports,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    tolerance: float | None = None,
) -> None:
    """Act on a model, and on the gradients' means in its optimizer's state; or leave both alone and raise.

    loss: evaluated before and after, and must not change by more than `tolerance` (relative; by dtype).
    Raises: ValueError where the loss changed, for an unknown weight, for weights of less than fp32, and for a state
    that cannot move: elementwise squares under what is no permutation, means of steps under what is no rotation.
    Whatever raises, everything is then as it was.
    """
    weights = dict(model.named_parameters())
    if unknown := sorted(set(transports) - set(weights)):
        raise ValueError(f"the model has no {unknown}")
    if narrow := [name for name in transports if weights[name].dtype.itemsize < 4]:
        raise ValueError(
            f"{narrow[0]} is {weights[narrow[0]].dtype}, whose rounding would change the loss: widen it first"
        )
    tolerance = tolerance or (TOLERANCE if _dtype(model) == torch.float64 else 1e-5)
    states = [(value, moved(value)) for value, moved in _states(optimizer, transports, weights)] if optimizer else []
    kept = {name: weights[name].detach().clone() for name in transports}
    try:
        before = loss().item()
        for name, transport in transports.items():
            weights[name].copy_(transport.weight(kept[name]))
        after = loss().item()
        if not abs(after - before) <= tolerance * max(1.0, abs(before)):
            raise ValueError(
                f"the loss went from {before:.12g} to {after:.12g}: the action is no symmetry of this model (norm "
                "gains that are not 1? biases? dropout?); the weights are as they were"
            )
    except BaseException:
        for name, W in kept.items():
            weights[name].copy_(W)
        raise
    for value, moved in states:
        value.copy_(moved)
    for name, transport in transports.items():
        gradient = weights[name].grad
        if gradient is not None:
            weights[name].grad = transport.covector(gradient).contiguous()  # fused steps read along memory


MEANS_OF_GRADIENTS = ("momentum", "momentum_buffer", "exp_avg")  # ours and torch's


def _states(
    optimizer: torch.optim.Optimizer, transports: Transports, weights: Mapping[str, nn.Parameter]
) -> list[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Return every tensor of the optimizer's state that moves, and how."""
    found: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, transport in transports.items():
        if transport.left is None and transport.right is None:
            continue  # a shift moves no gradient
        group = groups.get(weights[name], {})
        kept = get_rule(group["rule"]).state if "rule" in group else {}
        for key, value in optimizer.state.get(weights[name], {}).items():
            if not isinstance(value, Tensor) or not value.ndim:
                continue
            if key in kept:
                found.append((value, partial(_moved_by_rule, kept[key], group["view"], transport, name)))
            elif value.shape == weights[name].shape and transport.group in _groups_that_move(key, group):
                found.append((value, transport.covector))
            else:
                raise ValueError(f"{key} of {name} cannot move with this group element (elementwise?); reset it first")
    return found


def _groups_that_move(key: str, group: Mapping[str, Any]) -> tuple[Group | None, ...]:
    """Return the groups under which a tensor of the state moves like a gradient; None stands for GL."""
    if key not in MEANS_OF_GRADIENTS:
        return (permutations,)
    if group.get("momentum_of") == "directions":
        return (permutations, signed_permutations, rotations)
    return (permutations, signed_permutations, rotations, None)


def refuse_unmovable(optimizer: torch.optim.Optimizer, model: nn.Module, names: Collection[str]) -> None:
    """Tell before any step whether these weights' states will move with more than permutations.

    Raises: ValueError for elementwise rules, rules with a state and means of steps, which do not.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name in names:
        group = groups.get(model.get_parameter(name), {})
        rule = get_rule(group["rule"]) if "rule" in group else None
        if (rule and (rule.elementwise or rule.state)) or group.get("momentum_of") == "directions":
            raise ValueError(f"{name}: what {group['rule']!r} keeps does not move with a teleport; choose another rule")


def _moved_by_rule(state: State, view: str, transport: Transport, name: str, value: Tensor) -> Tensor:
    """Move what a rule keeps as the rule declares, in the coordinates of its view.

    Raises: ValueError for a view with other coordinates, and for a factor that the state has no move for.
    """
    parsed = MatrixView.parse(view)
    if parsed not in (WHOLE, TRANSPOSED):
        raise ValueError(f"what the rule keeps of {name} cannot move in its view {view!r}; reset it first")
    side = transport.left if (state.side == "left") == (parsed == WHOLE) else transport.right
    if side is None:
        return value
    group = Transport(left=side).group
    if group is None:
        raise ValueError(f"what the rule keeps of {name} moves with rotations alone; reset it first")
    if group == rotations and not state.rotations:
        raise ValueError(f"what the rule keeps of {name} moves with signed permutations alone; reset it first")
    return state.act(value, torch.diag(side) if side.ndim == 1 else torch.block_diag(*side))


def climb(
    family: Callable[[Tensor], Transports],
    start: Tensor,
    gradients: Mapping[str, Tensor],
    lr: float = 0.1,
    steps: int = 10,
) -> tuple[Tensor, float]:
    """Search a group for the place of the largest gradient, by ascent in its Lie algebra.

    family: T -> the transports of exp(T); start: T's first value, zero for the identity; each step has length `lr`.
    Returns T and `|∇L|` there over `|∇L|` here, of the weights that move; 1 where the gradient is zero.
    """
    T = start.detach().clone().requires_grad_()
    with torch.no_grad():
        here = torch.stack([gradients[name].square().sum() for name in family(T)]).sum()
    for _ in range(steps):
        (direction,) = torch.autograd.grad(_square(family(T), gradients), T)
        with torch.no_grad():
            T += lr * direction / direction.norm().clamp(min=1e-30)
    with torch.no_grad():
        ratio = float((_square(family(T), gradients) / here).sqrt()) if here > 0 else 1.0
    return T.detach(), ratio


def _square(transports: Transports, gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([t.covector(gradients[name]).square().sum() for name, t in transports.items()]).sum()


def ascend(
    act: Callable[[Tensor, Any], Any],
    loss: Callable[[Any], Tensor],
    w: Any,
    theta: Tensor,
    lr: float,
    steps: int,
    longest: float = inf,
) -> Any:
    """Return `act(θ, w)` after gradient ascent of `|∇loss|²` over θ: for actions that are not linear in w.

    w: a tensor, or a list of them; act and loss are differentiable. θ starts at `theta`; no step of it is longer than
    `longest`, so that an element near the identity stays one that can be inverted.
    """
    theta = theta.detach().clone().requires_grad_()
    many = isinstance(w, (list, tuple))
    w = [x.detach().requires_grad_() for x in w] if many else w.detach().requires_grad_()
    for _ in range(steps):
        moved = act(theta, w)
        parts = list(moved) if many else [moved]
        gradients = torch.autograd.grad(loss(moved), parts, create_graph=True)
        size = torch.stack([g.square().sum() for g in gradients]).sum()
        (direction,) = torch.autograd.grad(size, theta)
        with torch.no_grad():
            theta += direction * (longest / direction.norm()).clamp(max=lr)
    moved = act(theta.detach(), w)
    return [x.detach() for x in moved] if many else moved.detach()


def act_on_quadratic(A: Tensor, R: Tensor, w: Tensor) -> Tensor:
    """Let a rotation R act on the w of `wᵀAw`: `A^{-1/2} R A^{1/2} w`.  Shapes: (n, n), (n, n), (n) -> (n).

    A: symmetric and positive definite. Source: Zhao et al., NeurIPS 2022.
    """
    values, vectors = torch.linalg.eigh(A)
    return vectors @ ((vectors.mT @ (R @ (vectors @ (values.sqrt() * (vectors.mT @ w))))) / values.sqrt())


def act_on_mlp(
    weights: list[Tensor],
    X: Tensor,
    layer: int,
    g: Tensor,
    activation: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Let g of GL(k) act on the outputs h of a layer of `h_m = σ(W_m h_{m-1})`, exactly, for the data X.

    `W_m' = σ^{-1}(g σ(W_m h)) h^+`, `W_{m+1}' = W_{m+1} g^{-1}`, h the layer's inputs. Shapes: X (inputs, samples).
    Raises: ValueError for the last layer, and where no weights give these outputs: h has more samples than rows, or
    they depend on each other; `inverse` is not σ's, or g leads out of σ's values.
    """
    if not 0 <= layer < len(weights) - 1:
        raise ValueError(f"layer {layer} of {len(weights)}: the last has no next one to take g back")
    h = X
    for W in weights[:layer]:
        h = activation(W @ h)
    if h.shape[1] > h.shape[0]:
        raise ValueError(f"a batch of {h.shape[1]} is larger than the width {h.shape[0]}: the action is not exact")
    moved, wanted = list(weights), g @ activation(weights[layer] @ h)
    moved[layer] = inverse(wanted) @ torch.linalg.pinv(h)
    moved[layer + 1] = weights[layer + 1] @ torch.linalg.inv(g)
    with torch.no_grad():
        error = (activation(moved[layer] @ h) - wanted).norm() / wanted.norm()
    if not error <= 1e-6:
        raise ValueError(
            f"the layer's outputs are off by {error:.1e}: samples that depend on each other, or an activation that is "
            "not bijective or has not these values"
        )
    return moved
