"""Layers that read into channels which nothing mixes, and out of them: MLPs, gates, state spaces, short convolutions.

A channel may change its place among the others, in all layers that read into it or out of it together.
"""

import re
from typing import NamedTuple

from torch import Tensor, nn

from symlm.roles.recognizers.attention import fuses, fuses_a_gate, has_qkv, is_attention
from symlm.roles.recognizers.chains import deep_layers, if_chained, is_apart, is_stack, reads_a_recurrence, role_by_flow
from symlm.roles.recognizers.layers import (
    activates,
    dense_children,
    heads_of,
    is_alone,
    is_convolution,
    is_dense,
    shape_of,
)
from symlm.roles.recognizers.names import (
    ALONE,
    BY_NAME,
    IN_AND_OUT,
    SQUARE,
    is_fused,
    is_gate,
    last_word,
    parts_of,
    projection,
)
from symlm.roles.recognizers.shapes import dense_layers, role_by_shapes, scope_of, without_others
from symlm.roles.role import Role, Site
from symlm.roles.storage import whole_shape

POINTWISE = {  # convolutions over single places, by the classes and the names of their boxes
    ("ConvDropoutLayerNorm", "post_attention"): Role.ATTENTION_O,
    ("ConvActivation", "intermediate"): Role.MLP_IN,
    ("ConvDropoutLayerNorm", "output"): Role.MLP_OUT,
    **{
        ("MobileViTV2ConvLayer", box): Role.MLP_IN for box in ("qkv_proj", "conv1")
    },  # k and v by channel, one q for all
    **{("MobileViTV2ConvLayer", box): Role.MLP_OUT for box in ("out_proj", "conv2")},
}
TOKENS_IN_COLUMNS = (("MobileBertLMPredictionHead", "dense"),)  # the head of the channels that an embedding has not
ATTENDING = ("attention", "lstm", "mla", "compressor")  # parts of the names of classes
LEAVES_MIXER = ("out_proj", "o_proj", "linear_out", "output", "down_proj", "dense", "x_proj")
MODULATES = re.compile(
    r"ada_?ln|ada_?layer_?norm|ada_?norm|norm_?zero|modulation|(^|_)mod$|film$|to_(gamma|beta|scale|shift)",
    re.IGNORECASE,
)
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
    "gru_rel_pos_linear",
    "relative_pos_embeddings",
)


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
    if mixer := mixer_of(site):
        leaf = site.leaf if mixer is parent else site.path[-2]
        if is_fused(leaf) and _blocks_of_mixer(leaf, mixer, site.shape[int(site.transposed)]) is None:
            return None
        leaves = leaf in LEAVES_MIXER or projection(leaf) is Role.ATTENTION_O or "down" in parts_of(leaf)
        return Role.MLP_OUT if leaves else Role.MLP_IN
    if (is_fused(site.leaf) and len(set(site.shape)) > 1) or fuses_a_gate(site):
        return None
    if _modulates(site):
        return Role.MLP_IN  # rows are factors of the stream's coordinates
    if reads_a_recurrence(site):
        return Role.MLP_OUT
    if site.leaf in ALONE:
        return ALONE[site.leaf]
    if (type(parent).__name__, site.leaf) in TOKENS_IN_COLUMNS:
        return Role.MLP_OUT
    if any(part.startswith("gate_up_proj_adapter") for part in site.path[:-1]) and site.leaf != "0":
        return Role.MLP_IN  # the second factor of what is added to the neurons
    if site.leaf in GATES and any(word in type(parent).__name__.lower() for word in ATTENDING):
        return Role.MLP_IN
    boxed = isinstance(parent, nn.Sequential) and is_alone(parent) and len(site.ancestors) > 1
    around = site.ancestors[1] if boxed else parent
    if heads_of(around) == shape_of(site.module)[1] > 1 and is_attention(around) and projection(site.leaf) is None:
        return Role.MLP_IN  # a number a head
    if is_gate(site.leaf) and any(is_attention(module) for module in site.ancestors[:2]):
        return Role.MLP_IN
    if isinstance(parent, nn.Sequential) and is_gate("".join(site.path[-2:-1])) and is_attention(site.ancestors[1]):
        return Role.MLP_IN if [*dense_children(parent).values()][-1] is site.module else Role.MATRIX  # a low rank
    if (role := role_by_flow(site)) or is_apart(site):
        return role
    square = len(set(site.shape)) == 1 and activates(parent)
    words = SQUARE if square else IN_AND_OUT if activates(parent) else {}
    layers = {name: shape_of(layer) for name, layer in dense_children(parent).items()}
    named = {name: BY_NAME.get(name) or words.get(last_word(name)) for name, _ in parent.named_children()}
    numbered, every = deep_layers(site)
    if site.module in numbered:
        return Role.MLP_OUT if site.module is numbered[-1] else Role.MLP_IN
    if {last_word(name) for name in named if named[name]} <= {"in", "out"} and any(map(is_stack, parent.children())):
        named = {}  # of a model, whose layers may be in front of its blocks and behind them
    if role := if_chained(named, layers).get(site.leaf):
        return role
    if site.module not in every:
        return None
    return Role.MLP_OUT if site.module is every[-1] else Role.MLP_IN


def _modulates(site: Site) -> bool:
    """Tell whether a layer makes shifts, scales and gates for the coordinates of the stream, by the names around it."""
    if MODULATES.search(site.leaf):
        return True
    layers = [*dense_children(site.parent).values()] if site.parent is not None else []
    names = (*site.path[-2:], *([type(site.parent).__name__] if len(layers) == 1 else []))  # a class of one layer
    return any(MODULATES.search(name) for name in names) and layers[-1:] == [site.module]


def mixer_of(site: Site) -> nn.Module | None:
    """Return the module around a layer that works on channels one by one; the layer may stand in a sequence of it.

    Args:
        site: The site of a dense layer.
    """
    above = site.ancestors[: 1 + isinstance(site.parent, nn.Sequential)]
    return next(filter(is_mixer, above), None)


def is_mixer(module: nn.Module) -> bool:
    """Tell whether a module works on channels one by one: it has a short convolution or a decay of its own.

    Args:
        module: The module around a dense layer.
    """
    children = dict(module.named_children())
    names = {name for owner in (module, *children.values()) for name, _ in owner.named_parameters(recurse=False)}
    filters = {name: child for name, child in children.items() if _is_depthwise(child)}
    along = any(name.startswith("conv") and not isinstance(child, nn.Conv2d) for name, child in filters.items())
    filters_of_heads = sum(map(_filters_channels, children.values()))  # of q, k and v, or of all in one: none rotates
    along |= filters_of_heads >= (3 if has_qkv(module) else 1) and (has_qkv(module) or fuses(module))
    convolves = along or bool(filters and "in_proj" in children)  # an image's filters stand in attentions too
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
    if site.leaf in ("kv_a_proj_with_mqa", "wkv_a"):
        return Blocks("m", {"m": (_size(owner, "kv_lora_rank"), _size(owner, "qk_rope_head_dim"))})
    if isinstance(site.module, nn.RNNBase | nn.RNNCellBase) and site.leaf.startswith(("weight_ih", "weight_hh")):
        return Blocks("(p m)", {"p": (rows // int(site.module.hidden_size),)})  # the gates of every unit
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
        state = (rows - _size(owner, "time_step_rank", "dt_rank")) // 2
        return Blocks("m", {"m": (rows - 2 * state, state, state)}) if 0 < 2 * state < rows else None
    convolved = next((child for name, child in owner.named_children() if _is_depthwise(child)), None)
    if leaf != "in_proj" or convolved is None:
        return None
    channels = whole_shape(convolved.weight)[0]  # type: ignore[arg-type]
    if rows in (2 * channels, 3 * channels):  # a state space and its gate; a convolution between two gates
        interleaved = rows == 2 * channels and _size(owner, "n_mamba_heads")
        return Blocks("(m p)" if interleaved else "(p m)", {"p": (rows // channels,)})
    states = _size(owner, "n_groups", "ngroups") * _size(owner, "ssm_state_size", "d_state")
    inner, heads = channels - 2 * states, _size(owner, "num_heads", "nheads")
    rest = rows - inner - channels - heads  # of an MLP beside the state space
    if min(states, inner, heads) <= 0 or rest < 0 or rest % 2:
        return None
    return Blocks("m", {"m": (*((rest // 2,) * 2 if rest else ()), inner, inner, states, states, heads)})


def _is_doubled(site: Site) -> bool:
    """Tell whether a layer's outputs are twice the width that the layer behind it reads: gate and up in one."""
    scope = scope_of(site)
    if scope is None or (channel_role(site) or role_by_shapes(site)) is not Role.MLP_IN:
        return False
    _, outputs = shape_of(site.module)
    widths = [width for layer, width, _ in without_others(scope, dense_layers(scope)) if layer is not site.module]
    return len(widths) == 1 and outputs == 2 * widths[0]


def _filters_channels(module: nn.Module) -> bool:
    """Tell whether a module filters a sequence channel by channel, behind one dense layer of it or behind another's."""
    parts = [part for part in module.modules() if any(len(whole_shape(p)) > 1 for p in part.parameters(recurse=False))]
    others = [part for part in parts if not _is_depthwise(part) or isinstance(part, nn.Conv2d)]
    return len(others) < min(2, len(parts)) and all(map(is_dense, others))


def _is_depthwise(module: nn.Module) -> bool:
    """Tell whether a module is a convolution of every channel by itself."""
    shape = whole_shape(module.weight) if isinstance(getattr(module, "weight", None), Tensor) else ()  # type: ignore[arg-type]
    return len(shape) in (3, 4) and shape[1] == 1 and shape[0] > 1 and (len(shape) == 3 or is_convolution(module))


def _size(owner: nn.Module | None, *names: str) -> int:
    """Return a size that a module has as an attribute of one of these names; 0 without one."""
    values = (getattr(owner, name, 0) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value), 0)
