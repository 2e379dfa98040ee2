"""Layers that read into channels which nothing mixes, and out of them: MLPs, gates, state spaces, short convolutions.

A channel may change its place among the others, in all layers that read into it or out of it together.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor, nn

from symlm.roles.recognizers.attention import is_alone, is_dense, is_fused
from symlm.roles.recognizers.leaves import is_convolution
from symlm.roles.recognizers.logits import HEADS, functions_called
from symlm.roles.role import Role, Site, whole_shape
from symlm.roles.wrappers import inner_module

INTO = ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h")
OUT_OF = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "linear_out")
BY_NAME = {**dict.fromkeys(INTO, Role.MLP_IN), **dict.fromkeys(OUT_OF, Role.MLP_OUT)}
ALONE = {  # where no layer stands beside that reads the channels
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa", "kv_a_proj"), Role.MLP_IN),
    **dict.fromkeys(("per_layer_model_projection", "per_layer_input_gate"), Role.MLP_IN),
    "per_layer_projection": Role.MLP_OUT,
    **{"o_a_proj": Role.MLP_IN, "o_b_proj": Role.MLP_OUT},
}
ATTENDING = ("attention", "lstm", "mla", "compressor")  # parts of the names of classes
LEAVES_MIXER = ("out_proj", "o_proj", "linear_out", "output", "down_proj", "dense", "x_proj")
GATES = (
    "gate_proj",
    "q_gate_proj",
    "g_proj",
    "sink_proj",
    "ogate_preact",
    "igate_preact",
    "fgate_preact",
    "b_proj",
    "dt_proj",
    "r_proj",
    "relative_pos_embeddings",
)

ACTIVATION = re.compile(r"(^|_)act|gelu|relu|silu|swi|glu|tanh|sigmoid|mish|softplus|(^|_)elu|ACT2FN")


class Blocks(NamedTuple):
    """Describe the outputs of a dense layer that fuses several.

    Args:
        axis: The axes of the outputs, as a view writes them: "m", "(h m)" or "(m p)".
        sizes: The lengths of these axes; several for unequal blocks.
    """

    axis: str
    sizes: dict[str, tuple[int, ...]]


def channel_role(site: Site) -> Role | None:
    """Return `mlp_in` or `mlp_out` for a layer into channels or out of them, by names and mixer; None elsewhere.

    Args:
        site: The site of a dense layer.
    """
    parent = site.parent
    if parent is None:
        return None
    if is_mixer(parent):
        if is_fused(site.leaf) and _blocks_of_mixer(site.leaf, parent, site.shape[int(site.transposed)]) is None:
            return None
        return Role.MLP_OUT if site.leaf in LEAVES_MIXER else Role.MLP_IN
    if is_fused(site.leaf) and len(set(site.shape)) > 1:
        return None
    if site.leaf in ALONE:
        return ALONE[site.leaf]
    if any(part.startswith("gate_up_proj_adapter") for part in site.path[:-1]) and site.leaf != "0":
        return Role.MLP_IN  # the second factor of what is added to the neurons
    if site.leaf in GATES and any(word in type(parent).__name__.lower() for word in ATTENDING):
        return Role.MLP_IN
    children = {name for name, _ in parent.named_children()}
    if site.leaf in BY_NAME and {BY_NAME.get(name) for name in children} >= {Role.MLP_IN, Role.MLP_OUT}:
        return BY_NAME[site.leaf]
    return None


def is_mixer(module: nn.Module) -> bool:
    """Tell whether a module works on channels one by one: it has a short convolution or a decay of its own.

    Args:
        module: The module around a dense layer.
    """
    names = {name for name, _ in module.named_parameters(recurse=False)}
    children = dict(module.named_children())
    names |= {name for child in children.values() for name, _ in child.named_parameters(recurse=False)}
    filters = [name for name, child in children.items() if _is_depthwise(child)]
    convolves = any(name.startswith("conv") for name in filters) or bool(filters and "in_proj" in children)
    names |= {name for name, _ in module.named_buffers(recurse=False)}
    return convolves or bool(names & {"A_log", "time_decay", "recurrent_param", "slope_rate"})


def blocks_of_outputs(site: Site) -> Blocks | None:
    """Return how the outputs of a layer are divided among several purposes, from sizes that its module knows.

    Args:
        site: The site of a layer into channels.

    Returns:
        The blocks; None for outputs of one kind.
    """
    owner, rows = site.parent, site.shape[int(site.transposed)]
    if site.leaf == "kv_a_proj_with_mqa":
        return Blocks("m", {"m": (_size(owner, "kv_lora_rank"), _size(owner, "qk_rope_head_dim"))})
    if owner is not None and is_mixer(owner):
        return _blocks_of_mixer(site.leaf, owner, rows)
    return Blocks("(p m)", {"p": (2,)}) if site.leaf == "gate_up_proj" or _is_doubled(site) else None


def _blocks_of_mixer(leaf: str, owner: nn.Module, rows: int) -> Blocks | None:
    """Return the blocks of a projection of a state space, of linear attention or of a gated convolution."""
    keys, values = _size(owner, "num_k_heads"), _size(owner, "num_v_heads")
    if keys and values and leaf in ("in_proj_qkvz", "in_proj_ba"):
        each = values // keys
        wide = (_size(owner, "head_k_dim"),) * 2 + (each * _size(owner, "head_v_dim"),) * 2
        return Blocks("(h m)", {"h": (keys,), "m": wide if leaf == "in_proj_qkvz" else (each, each)})
    if leaf == "qkv_proj" and rows % (3 * max(1, _size(owner, "head_dim"))) == 0:
        width = _size(owner, "head_dim")
        return Blocks("(h m)", {"h": (rows // (3 * width),), "m": (width,) * 3}) if width else None
    if leaf == "in_proj_qkv":
        return Blocks("m", {"m": (_size(owner, "key_dim"), _size(owner, "key_dim"), _size(owner, "value_dim"))})
    if leaf == "x_proj":
        state = (rows - _size(owner, "time_step_rank")) // 2
        return Blocks("m", {"m": (rows - 2 * state, state, state)}) if 0 < 2 * state < rows else None
    convolved = next((child for name, child in owner.named_children() if _is_depthwise(child)), None)
    if leaf != "in_proj" or convolved is None:
        return None
    channels = whole_shape(convolved.weight)[0]  # type: ignore[arg-type]
    if rows in (2 * channels, 3 * channels):  # a state space and its gate; a convolution between two gates
        interleaved = rows == 2 * channels and _size(owner, "n_mamba_heads")
        return Blocks("(m p)" if interleaved else "(p m)", {"p": (rows // channels,)})
    states = _size(owner, "n_groups") * _size(owner, "ssm_state_size")
    inner, heads = channels - 2 * states, _size(owner, "num_heads")
    rest = rows - inner - channels - heads  # of an MLP beside the state space
    if min(states, inner, heads) <= 0 or rest < 0 or rest % 2:
        return None
    return Blocks("m", {"m": (*((rest // 2,) * 2 if rest else ()), inner, inner, states, states, heads)})


def role_by_shapes(site: Site, ends: Collection[int] = ()) -> Role | None:
    """Return the role of a layer in a block of layers into a width, and one out of it again; None elsewhere.

    Args:
        site: The site of a dense layer.
        ends: The ids of the token matrices: a layer in front of a head has no channels, where the head may be tied.
    """
    scopes = [_scope(site), *site.ancestors[1:2]] if _gates(site.parent) else [_scope(site)]
    roles = (_role_in(scope, site, ends) for scope in scopes)
    return next((role for role in roles if role), None)


def _read_by_others(layers: list[tuple[nn.Module, int, int]]) -> nn.Module | None:
    """Return the layer whose outputs all the others read, as AltUp's router, if there is one and nothing leads back."""
    for source, before, width in layers:
        others = [shape for layer, *shape in layers if layer is not source]
        if before != width and all(inputs == width and outputs != before for inputs, outputs in others):
            return source
    return None


def _activates(module: nn.Module) -> bool:
    """Tell whether the code of a module names an activation, or a child is one."""
    if any(type(child).__module__ == "torch.nn.modules.activation" for child in module.children()):
        return True
    return type(module).__module__ == "torch.nn.modules.activation" or any(
        ACTIVATION.search(name) for name in functions_called(type(module))
    )


def _gates(module: nn.Module | None) -> bool:
    """Tell whether a module is two equal layers and an activation: the gate and up of a block around it."""
    layers = _dense_layers(module) if module is not None else []
    return len(layers) == 2 and layers[0][1:] == layers[1][1:] and _activates(module)


def _role_in(scope: nn.Module | None, site: Site, ends: Collection[int]) -> Role | None:
    """Return the role of a layer in one block."""
    if scope is None or (isinstance(scope, nn.Sequential) and not _is_activated(scope)):
        return None
    if site.leaf in HEADS and not _activates(scope):
        return None
    if not any(_activates(module) for module in (scope, *scope.children())):
        return None
    if any(isinstance(child, nn.Embedding) for child in scope.children()):  # a model, not a block of one
        return None
    layers = [layer for layer in _dense_layers(scope) if id(getattr(layer[0], "weight", None)) not in ends]
    if len(layers) == 3 and site.module in [layer[0] for layer in layers] and (source := _read_by_others(layers)):
        return Role.MLP_IN if source is site.module else Role.MLP_OUT
    if len({layer[1:] for layer in layers}) == 3:  # a square gate beside a key and a value, as in RWKV
        squares = [layer for layer in layers if layer[1] == layer[2]]
        layers = [layer for layer in layers if layer not in squares]
        reversed_ = len(layers) == 2 and layers[0][1:] == layers[1][:0:-1]
        if any(layer is site.module and reversed_ and width == layers[1][2] for layer, width, _ in squares):
            return Role.MLP_IN  # its outputs are factors of channels
    places = [place for place, (layer, _, _) in enumerate(layers) if layer is site.module]
    if not places or not 2 <= len(layers) <= 3:
        return None
    for last in (*range(len(layers) - 1, -1, -1),):
        _, width, _ = layers[last]
        others = [layer for place, layer in enumerate(layers) if place != last]
        fits = all(outputs in (width, 2 * width) for _, _, outputs in others)
        alike = len({inputs for _, inputs, _ in others}) == 1
        numbered = len(layers) == 2 and last == 1 and (isinstance(scope, nn.Sequential) or _are_numbered(scope))
        if fits and alike and (layers[last][2] != width or numbered):
            return Role.MLP_OUT if places[0] == last else Role.MLP_IN
    return None


def is_activated_alone(site: Site) -> bool:
    """Tell whether a layer goes through an activation, and its module has no other but a head behind it.

    Its outputs are neurons, as those of an MLP: the transform in front of a masked model's head, a pooler.

    Args:
        site: The site of a dense layer.
    """
    parent = site.parent
    if parent is None or len(site.shape) != 2 or not _activates(parent):
        return False
    layers = {name for name, child in parent.named_children() if is_dense(inner_module(child))}
    return layers - {*HEADS, "decoder", "vocab_projector"} == {site.leaf}


def _is_activated(sequence: nn.Sequential) -> bool:
    """Tell whether a sequence is a layer, something without weights, and a layer."""
    dense = [is_dense(inner_module(child)) for child in sequence]
    between = [child for child, is_layer in zip(sequence, dense, strict=True) if not is_layer]
    plain = all(not list(child.parameters()) and not isinstance(child, nn.Dropout | nn.Identity) for child in between)
    return dense[:1] == dense[-1:] == [True] and sum(dense) == 2 and bool(between) and plain


def _are_numbered(scope: nn.Module) -> bool:
    """Tell whether the layers of a block have one name and numbers, as `linear_1` and `linear_2`."""
    names = [name for name, child in scope.named_children() if is_dense(inner_module(child))]
    return len(names) == 2 and len({name.rstrip("0123456789") for name in names}) == 1 and names[0][-1:].isdigit()


def _scope(site: Site) -> nn.Module | None:
    """Return the block around a layer: its parent, or what is around a parent that holds this layer alone."""
    parent = site.parent
    if parent is not None and is_alone(parent) and not any(_gates(child) for child in parent.children()):
        around = site.ancestors[1] if len(site.ancestors) > 1 else None
        return around if around is not None and len(_dense_layers(around)) > 1 else None
    return parent


def _dense_layers(scope: nn.Module) -> list[tuple[nn.Module, int, int]]:
    """Return the layers of a block with their inputs and outputs, of boxes of one or two layers too."""
    found = []
    for _, child in scope.named_children():
        inner = inner_module(child)
        if is_dense(inner):
            found.append(inner)
        elif inner is not None:
            inside = [inner_module(layer) for _, layer in inner.named_children() if is_dense(inner_module(layer))]
            other = any(word in type(inner).__name__ for word in ("Embedding", "Pooler"))
            found += inside if len(inside) <= 2 and not other else []
    return [(layer, *_shape_of(layer)) for layer in found if layer is not None and _shape_of(layer) != (0, 0)]


def _shape_of(layer: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a dense layer."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or len(whole_shape(weight)) != 2:
        return 0, 0
    rows, columns = whole_shape(weight)
    return (rows, columns) if type(layer).__name__ == "Conv1D" else (columns, rows)


def _is_doubled(site: Site) -> bool:
    """Tell whether a layer's outputs are twice the width that the layer behind it reads: gate and up in one."""
    scope = _scope(site)
    if scope is None or (channel_role(site) or role_by_shapes(site)) is not Role.MLP_IN:
        return False
    _, outputs = _shape_of(site.module)
    widths = [width for layer, width, _ in _dense_layers(scope) if layer is not site.module]
    return len(widths) == 1 and outputs == 2 * widths[0]


def _is_depthwise(module: nn.Module) -> bool:
    """Tell whether a module is a convolution of every channel by itself."""
    shape = whole_shape(module.weight) if isinstance(getattr(module, "weight", None), Tensor) else ()  # type: ignore[arg-type]
    return len(shape) in (3, 4) and shape[1] == 1 and shape[0] > 1 and (len(shape) == 3 or is_convolution(module))


def _size(owner: nn.Module | None, name: str) -> int:
    """Return a size that a module has as an attribute; 0 without one."""
    value = getattr(owner, name, 0)
    return int(value) if isinstance(value, int) else 0
