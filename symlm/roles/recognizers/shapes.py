"""Blocks of dense layers into a width and out of it again, by their shapes: what an MLP is before it has a name."""

import re
from collections.abc import Collection

from torch import nn

from symlm.roles.recognizers.attention import BESIDE_FUSED, fuses, has_qkv, is_attention
from symlm.roles.recognizers.chains import Layer, layers_of_experts, stand_around_blocks
from symlm.roles.recognizers.layers import (
    ACTIVATION,
    activates,
    dense_children,
    is_alone,
    is_dense,
    is_pointwise,
    kind_of,
    shape_of,
)
from symlm.roles.recognizers.logits import HEADS
from symlm.roles.recognizers.names import is_fused, projection
from symlm.roles.role import Role, Site
from symlm.roles.source.calls import functions_called
from symlm.roles.wrappers import inner_module

INERT = re.compile(r"drop|identity|flatten|norm|rearrange|permute|transpose|reshape|pool")


def role_by_shapes(site: Site, ends: Collection[int] = ()) -> Role | None:
    """Return the role of a layer in a block of layers into a width, and one out of it again; None elsewhere.

    Args:
        site: The site of a dense layer.
        ends: The ids of the token matrices: a layer in front of a head has no channels, where the head may be tied.
    """
    if layers := layers_of_experts(site):
        last = next((layer for k, (layer, n, m) in enumerate(layers) if n != m and _fits_last(layers, k)), None)
        siblings = list(site.parent.children()) if site.parent is not None else []
        return None if last is None else Role.MLP_OUT if last in siblings else Role.MLP_IN
    scopes = [scope_of(site), *site.ancestors[1:2]] if is_gate_and_up(site.parent) else [scope_of(site)]
    roles = (_role_in(scope, site, ends) for scope in scopes)
    return next((role for role in roles if role), None)


def is_activated_alone(site: Site) -> bool:
    """Tell whether a layer goes through an activation, and its module has no more but norms, and a head behind it.

    Its outputs are neurons, as those of an MLP: the transform in front of a masked model's head, a pooler.

    Args:
        site: The site of a dense layer.
    """
    parent, sequential = site.parent, isinstance(site.parent, nn.Sequential)
    if parent is None or not (len(site.shape) == 2 or sequential) or not activates(parent):
        return False
    children = dict(parent.named_children())
    if sequential and [*children][-1:] == [site.leaf]:
        return False  # the activation is before it
    layers = {n for n, child in children.items() if is_dense(inner := inner_module(child)) or is_pointwise(inner)}
    others = [child for name, child in children.items() if name not in layers]
    return layers - {*HEADS, "decoder"} == {site.leaf} and all(
        p.ndim < 2 for child in others for p in child.parameters()
    )


def is_activated_first(site: Site) -> bool:
    """Tell whether a layer goes through an activation of its own, and a block into a width and out of it follows.

    Args:
        site: The site of a dense layer.
    """
    parent = site.parent
    layers = [*dense_children(parent).values()] if parent is not None else []
    if parent is None or isinstance(parent, nn.Sequential) or len(layers) < 3 or layers[0] is not site.module:
        return False
    activations = sum(bool(ACTIVATION.search(kind_of(child))) for child in parent.children())
    (_, width), *between, (channels, _) = [shape_of(layer) for layer in layers]
    return activations > 1 and all(shape == (width, channels) for shape in between)


def is_ambiguous(site: Site) -> bool:
    """Tell whether a layer is one of several around an activation of which no name says what they are.

    Equal squares are, four or more layers into one width (a recurrent cell), a square beside one into twice its width,
    and one into three or more times the width that another leads back from.

    Args:
        site: The site of a dense layer.
    """
    layers = dense_layers(site.parent) if site.parent is not None else []
    if _are_several(layers) and any(layer is site.module for layer, _, _ in layers):
        return True
    if site.parent is None or not activates(site.parent):
        return False
    sizes = {(inputs, outputs) for _, inputs, outputs in layers}
    gated = [both for _, *both in layers] == [[n, k * n] for n, _ in list(sizes)[:1] for k in (2, 1)]
    alike = [layer for layer, _, outputs in layers if outputs == shape_of(site.module)[1]]  # of a recurrent cell
    cell = len(alike) > 3 and functions_called(type(site.parent)) & {"sigmoid", "tanh"}
    equal = len(sizes) == 1 and all(n == m for n, m in sizes) and len(layers) <= 3
    return len(layers) == len(dense_children(site.parent)) > 1 and (equal or gated or bool(cell))


def _are_several(layers: list[Layer]) -> bool:
    """Tell whether two layers lead into some width and back from a third of it, or from less."""
    inputs, outputs, width, back = [size for _, *both in layers for size in both] if len(layers) == 2 else [0, 0, 1, 1]
    return inputs == back != width and outputs % width == 0 and outputs > 2 * width


def scope_of(site: Site) -> nn.Module | None:
    """Return the block around a layer: its parent, or what is around a parent that holds this layer alone.

    Args:
        site: The site of a dense layer.
    """
    parent = site.parent
    if isinstance(parent, nn.Sequential | nn.ModuleList) and len(dense_layers(parent)) > 1:
        return parent
    if parent is not None and is_alone(parent) and not any(is_gate_and_up(child) for child in parent.children()):
        around = site.ancestors[1] if len(site.ancestors) > 1 else None
        return around if around is not None and len(dense_layers(around)) > 1 else None
    return parent


def is_gate_and_up(module: nn.Module | None) -> bool:
    """Tell whether a module is two equal layers and an activation: the gate and up of a block around it."""
    if module is None:
        return False
    layers = dense_layers(module)
    return len(layers) == 2 and layers[0][1:] == layers[1][1:] and activates(module)


def _role_in(scope: nn.Module | None, site: Site, ends: Collection[int]) -> Role | None:
    """Return the role of a layer in one block."""
    if scope is None:
        return None
    if isinstance(scope, nn.Sequential | nn.ModuleList) and (role := _role_in_sequence(scope, site, ends)):
        return role
    if isinstance(scope, nn.Sequential) or (site.leaf in HEADS and not activates(scope)) or _is_linear(scope):
        return None
    children = [*scope.children()]
    blocks = isinstance(scope, nn.ModuleDict) and any(not is_dense(m) and len([*m.modules()]) > 1 for m in children)
    if blocks or (any(isinstance(child, nn.Embedding) for child in children) and not activates(scope)):
        return None  # a model, or blocks among layers
    layers = [layer for layer in dense_layers(scope) if id(getattr(layer[0], "weight", None)) not in ends]
    own = [layer for layer in layers if layer[0] in dense_children(scope).values()]
    if len(layers) > len(own) == 2 and activates(scope) and _are_numbered(scope, [layer for layer, _, _ in own]):
        layers = own  # what is in a box beside them is in front
    two = len(layers) == 2
    if len({layer[1:] for layer in layers}) == 3:  # a square gate beside a key and a value, as in RWKV
        squares = [layer for layer in layers if layer[1] == layer[2]]
        layers = [layer for layer in layers if layer not in squares]
        reversed_ = len(layers) == 2 and layers[0][1:] == layers[1][:0:-1]
        if any(layer is site.module and reversed_ and width == layers[1][2] for layer, width, _ in squares):
            return Role.MLP_IN  # its outputs are factors of channels
    layers = without_others(scope, layers)
    places = [place for place, (layer, _, _) in enumerate(layers) if layer is site.module]
    if _are_several(layers) or not places or not 2 <= len(layers) <= 3:
        return None
    numbered = len(layers) == 2 and _are_numbered(scope, [layer for layer, _, _ in layers])
    fitting = [last for last in range(len(layers) - 1, -1, -1) if _fits_last(layers, last)]
    back = [last for last in fitting if layers[last][2] == layers[last - 1][1]]  # to what the others read
    for last in [] if two and stand_around_blocks(scope, layers, bool(back)) else back or fitting:
        if layers[last][2] != layers[last][1] or (numbered and last == 1):
            return Role.MLP_OUT if places[0] == last else Role.MLP_IN
    return None


def _fits_last(layers: list[Layer], last: int) -> bool:
    """Tell whether a layer may read what the others write, each alone or as one of two halves."""
    _, width, outputs = layers[last]
    others = [layer[1:] for place, layer in enumerate(layers) if place != last]
    parallel = width != outputs and (width, outputs) in others
    return len({inputs for inputs, _ in others}) == 1 and not parallel and {n for _, n in others} <= {width, 2 * width}


def without_others(scope: nn.Module, layers: list[Layer]) -> list[Layer]:
    """Return the layers of a block without those alone with an activation whose outputs the last does not read.

    Args:
        scope: The block.
        layers: Its layers.
    """
    boxes = [child for child in scope.children() if isinstance(child, nn.Sequential) and activates(child)]
    alone = {id(layer) for box in boxes if is_alone(box) for layer in dense_children(box).values()}
    width = layers[-1][1] if layers else 0
    others = [layer for layer in layers if id(layer[0]) in alone and layer[2] not in (width, 2 * width)]
    return [layer for layer in layers if layer not in others] if len(alone) - len(others) == 1 else layers


def _is_linear(scope: nn.Module) -> bool:
    """Tell whether the layers of a block have norms between them and no activation, as MobileBERT's bottleneck."""
    inside = (scope, *scope.children())
    norms = any("norm" in type(child).__name__.lower() for child in scope.children())
    return norms and not type(scope).__module__.startswith("torch.") and not any(activates(module) for module in inside)


def _role_in_sequence(scope: nn.Module, site: Site, ends: Collection[int]) -> Role | None:
    """Return the role of a layer among several with an activation between each two: the last reads neurons out."""
    layers: list[nn.Module] = []
    active = False
    if isinstance(scope, nn.ModuleList) and not dense_children(scope):  # boxes side by side
        return None
    for child in filter(None, scope._modules.values()):  # one activation may stand at several places
        inner = inner_module(child) or child
        dense = [inner] if is_dense(inner) else list(dense_children(inner).values())
        if len(dense) == 1 and not (layers and not active):
            layers += dense
            active = dense[0] is not inner and activates(inner)
        elif dense or any(min(p.shape) > 1 for p in inner.parameters() if p.ndim > 1):
            return None
        else:
            active |= not INERT.search(type(inner).__name__.lower())
    layers = [layer for layer in layers if id(getattr(layer, "weight", None)) not in ends]
    if len(layers) < 2 or all(layer is not site.module for layer in layers):
        return None
    return Role.MLP_OUT if layers[-1] is site.module else Role.MLP_IN


def _are_numbered(scope: nn.Module, layers: list[nn.Module]) -> bool:
    """Tell whether two layers have one name and numbers, as `linear_1` and `linear_2`."""
    names = [name for name, child in scope.named_children() if inner_module(child) in layers]
    return len(names) == 2 and len({name.rstrip("0123456789") for name in names}) == 1 and names[0][-1:].isdigit()


def dense_layers(scope: nn.Module) -> list[Layer]:
    """Return the layers of a block with their inputs and outputs, of boxes of one or two layers too.

    Those of an attention are left out, whether it is in a box or beside the others.

    Args:
        scope: The block.
    """
    if is_attention(scope) and not (has_qkv(scope) or fuses(scope)):  # of names that say nothing
        return []
    found = []
    for name, child in scope.named_children():
        inner = inner_module(child)
        if is_dense(inner):
            found += [] if is_attention(scope) and _is_projection(name) else [inner]
        elif inner is not None and not is_attention(inner):
            inside = list(dense_children(inner).values())
            other = any(word in type(inner).__name__ for word in ("Embedding", "Pooler"))
            found += inside if len(inside) <= 2 and not other else []
    return [(layer, *shape_of(layer)) for layer in found if layer is not None and shape_of(layer) != (0, 0)]


def _is_projection(name: str) -> bool:
    """Tell whether a name is one of an attention's projections."""
    return bool(projection(name)) or is_fused(name) or name in BESIDE_FUSED
