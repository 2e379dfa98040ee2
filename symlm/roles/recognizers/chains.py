"""Layers one behind the other: deep MLPs, experts' layers in lists, and names that sizes have to agree with."""

from itertools import pairwise

from torch import nn

from symlm.roles.recognizers.attention import is_attention
from symlm.roles.recognizers.layers import ACTIVATION, activates, dense_children, is_dense, kind_of, shape_of
from symlm.roles.recognizers.names import NUMBERED
from symlm.roles.role import Role, Site
from symlm.roles.source.flow import flow_of
from symlm.roles.storage import whole_shape
from symlm.roles.wrappers import inner_module

Layer = tuple[nn.Module, int, int]  # with its inputs and outputs


def if_chained(roles: dict[str, Role | None], layers: dict[str, tuple[int, int]]) -> dict[str, Role | None]:
    """Return what names say of layers into channels and out of them, where the sizes do not say otherwise.

    Args:
        roles: What each name says.
        layers: Inputs and outputs of the layers, as far as they are known.
    """
    first = [name for name, role in roles.items() if role is Role.MLP_IN]
    last = [name for name, role in roles.items() if role is Role.MLP_OUT]
    widths = {layers[name][0] for name in last if name in layers}
    outputs = {layers[name][1] for name in first if name in layers}  # a wrapped layer's are not known
    if (
        not first
        or not last
        or len(widths) > 1
        or any(n not in (width, 2 * width) for n in outputs for width in widths)
    ):
        return {}
    down, up = last[0], first[0]
    if len(first) == len(last) == 1 and down.startswith("down") and [*roles].index(down) < [*roles].index(up):
        return {up: Role.MLP_OUT, down: Role.MLP_IN}  # an adapter goes down before it goes up
    return roles


def deep_layers(site: Site) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return three or more layers, each reading what the one before writes: in a list or with numbers, and in any case.

    Of any names, nothing else with matrices stands beside them.

    Args:
        site: The site of a dense layer.
    """
    parent = site.ancestors[0]
    listed = isinstance(parent, nn.ModuleList) and len(site.ancestors) > 1
    around, children = site.ancestors[1] if listed else parent, dense_children(parent)
    numbered = [layer for name, layer in children.items() if listed or NUMBERED.fullmatch(name)]
    others = (p for child in parent.children() if not is_dense(inner_module(child)) for p in child.parameters())
    alone = not is_attention(parent) and all(len(whole_shape(p)) < 2 for p in others)
    parallel = listed and "mlp" not in kind_of(around)  # equal squares may be
    if not activates(around) or _is_no_chain(site):
        return [], []
    return _chain(numbered, not parallel), _chain([*children.values()], False) if alone else []


def _is_no_chain(site: Site) -> bool:
    """Tell whether the code gives the outputs of a layer beside one to another than the one behind it."""
    behind = _layers_behind(site)
    known = bool(behind) and all(flow_of(site.ancestors[0], name) for name in behind)
    return known and any(behind[name][0] != other for name, other in pairwise(behind))


def role_by_flow(site: Site) -> Role | None:
    """Return the role of a layer whose outputs the code activates and gives to another one, or that reads such outputs.

    Layers that lead to one layer together are gates and values, and one of them is activated.

    Args:
        site: The site of a dense layer.
    """
    behind = _layers_behind(site)
    active = {other for other, activated in behind.values() if activated}
    if behind.get(site.leaf, ("", False))[0] in active:
        return Role.MLP_IN
    return Role.MLP_OUT if site.leaf in active else None


def is_apart(site: Site) -> bool:
    """Tell whether the code shows layers that neither read each other's outputs nor activate or normalize theirs.

    Args:
        site: The site of one of them.
    """
    behind = _layers_behind(site)
    flows = [flow_of(site.ancestors[0], name) for name in behind]
    known = bool(flows) and all(flows) and not any(other for other, _ in behind.values())
    names = [step.name for flow in flows if flow for step in flow.steps]
    return known and not any(ACTIVATION.search(name) or "norm" in name for name in names)


def _layers_behind(site: Site) -> dict[str, tuple[str, bool]]:
    """Return, of each layer beside one in no attention, which one the code gives its outputs to, and if activated."""
    around = site.parent
    layers = dense_children(around) if around is not None and not is_attention(around) else {}
    if around is None or site.leaf not in layers or len(layers) < 2:
        return {}
    return {name: _next_layer(around, name, layers) for name in layers}


def _next_layer(around: nn.Module, name: str, layers: dict[str, nn.Module]) -> tuple[str, bool]:
    """Return the layer that the code gives a layer's outputs to, and whether it activates them before; "" for none."""
    flow, activated = flow_of(around, name), False
    for step in flow.steps if flow else ():
        behind = next((other for other, layer in layers.items() if layer is step.by and other != name), None)
        if behind:
            fits = shape_of(layers[behind])[0] * 2 >= shape_of(layers[name])[1]
            return (behind, activated) if fits else ("", False)
        activated |= bool(ACTIVATION.search(step.name))
    return "", False


def _chain(layers: list[nn.Module], squares: bool) -> list[nn.Module]:
    """Return three or more layers if each reads what the one before writes, equal squares only where asked for."""
    shapes = [shape_of(layer) for layer in layers]
    chained = all(before[1] == after[0] for before, after in pairwise(shapes))
    gated = len(layers) == 3 and shapes[0] == shapes[2]  # w1 and w3 into neurons that w2 reads
    return layers if len(layers) > 2 and chained and (squares or not (gated or len(set(shapes)) == 1)) else []


def layers_of_experts(site: Site) -> list[Layer]:
    """Return the layers of one expert where a module holds two or three lists, each of a layer of every expert.

    Args:
        site: The site of a dense layer.
    """
    if not isinstance(site.parent, nn.ModuleList) or len(site.ancestors) < 2 or not activates(site.ancestors[1]):
        return []
    around = [child for child in site.ancestors[1].children() if isinstance(child, nn.ModuleList)]
    lists = [child for child in around if len(child) == len(site.parent) > 1 and all(map(is_dense, child))]
    return [(some[0], *shape_of(some[0])) for some in lists] if 2 <= len(lists) <= 3 else []


def reads_a_recurrence(site: Site) -> bool:
    """Tell whether a layer stands behind a recurrence of torch's, and has as many inputs as that has channels.

    Args:
        site: The site of a dense layer.
    """
    before = [*site.parent.children()] if site.parent is not None else []
    before = before[: before.index(site.module)] if site.module in before else []
    cells = [cell for cell in before if isinstance(cell, nn.RNNBase) and not cell.proj_size]
    return any(shape_of(site.module)[0] == cell.hidden_size * (1 + cell.bidirectional) for cell in cells)


def is_stack(module: nn.Module) -> bool:
    """Tell whether a module is a stack of blocks or a recurrence, which may stand between two projections.

    Args:
        module: A module beside dense layers.
    """
    lists = (m for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential))
    blocks = (block for some in lists for block in some)
    return isinstance(module, nn.RNNBase) or any(sum(map(is_dense, block.modules())) > 1 for block in blocks)


def stand_around_blocks(scope: nn.Module, layers: list[Layer], leads_back: bool) -> bool:
    """Tell whether two layers rather stand in front of something and behind it than around an activation.

    Two of three say so: nothing activates, a stack stands beside them, the second does not lead back.

    Args:
        scope: The module around both.
        layers: The two.
        leads_back: Whether the second writes as many outputs as the first has inputs.
    """
    boxes = [child for child in scope.children() if any(layer in child.modules() for layer, _, _ in layers)]
    stack = any(map(is_stack, {*scope.children()} - {*boxes}))
    return (not any(map(activates, (scope, *boxes)))) + stack + (not leads_back) > 1
