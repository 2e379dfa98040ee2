"""Projections of attention: what q, k, v and o are called, where they stand, and in which order they are fused."""

import re

from torch import nn

from symlm.roles.recognizers.fused import fused_order
from symlm.roles.recognizers.layers import CONTAINERS, dense_children, heads_of, is_alone, shape_of
from symlm.roles.recognizers.names import QKV, gated_projection, is_fused, is_gate, parts_of, projection
from symlm.roles.role import Role, Site
from symlm.roles.source.calls import functions_called
from symlm.roles.storage import whole_shape
from symlm.roles.wrappers import inner_children

ONE_HEAD = (r"DeepseekV4\w+", "kv_proj")  # which is k and v at once
BESIDE_FUSED = {
    **dict.fromkeys(
        ("q_proj", "q_b_proj", "wq_b", "wq", "q_attn", "q", "to_q", "query", "pos_q_proj", "vision_proj"),
        Role.ATTENTION_Q,
    ),
    **dict.fromkeys(("k_proj", "pos_proj", "relative_k_proj", "linear_pos", "r_net", "text_proj"), Role.ATTENTION_K),
    **dict.fromkeys(("v_proj", "conv_out_layer"), Role.ATTENTION_V),
    **dict.fromkeys(
        ("o_proj", "out_proj", "output_proj", "post_proj", "c_proj", "proj", "linear_proj"), Role.ATTENTION_O
    ),
    **dict.fromkeys(
        ("to_out", "Wo", "wo", "output", "dense", "projection", "projection_layer", "linear_proj"), Role.ATTENTION_O
    ),
}
CHOOSES = re.compile(r"Indexer|Scorer")  # which keys a sparse attention reads; the loss does not reach it
ATTENDING = {"scaled_dot_product_attention", "flash_attn_func", "flash_attn_qkvpacked_func", "flex_attention"}
ATTENDS = re.compile(r"attention|attn|multi_?head|mha\b|mla\b", re.IGNORECASE)


def attention_role(site: Site) -> Role | None:
    """Return the role of a dense layer in an attention, None elsewhere.

    Args:
        site: The site of a dense layer.
    """
    if (is_fused(site.leaf) or gated_projection(site.leaf)) and fused_order(site):
        return Role.ATTENTION_QKV
    if isinstance(site.module, nn.MultiheadAttention):  # with keys or values of other widths
        return projection(site.leaf)
    parent = site.parent
    if is_value_too(site):
        return Role.ATTENTION_K
    if (
        parent is None
        or is_fused(site.leaf)
        or any(isinstance(child, nn.MultiheadAttention) for child in parent.children())
    ):
        return None  # what stands in front of torch's attention, whose own projections have the heads
    role = projection(site.leaf)
    if role and has_qkv(parent):
        return role
    if _is_lone_output(site, parent):
        return Role.ATTENTION_O
    if len(site.ancestors) > 1 and _is_boxed(site, parent):  # a layer in a box of its own: the box's name counts
        box = projection(site.path[-2])
        if box and has_qkv(site.ancestors[1]):
            return box if is_alone(parent) else BESIDE_FUSED.get(site.leaf)
        cores = (core for core in inner_children(site.ancestors[1]) if core is not parent)
        if site.leaf in BESIDE_FUSED and any(has_qkv(core) or fuses(core) for core in cores):
            return Role.ATTENTION_O
    if not (ATTENDS.search(type(parent).__name__) or fuses(parent, square=False) or _states_heads(parent)):
        return None
    if heads_of(parent) == shape_of(site.module)[1] > 1:
        return None  # a number a head
    low_rank = {"a", "b"} & set(parts_of(site.leaf))
    return BESIDE_FUSED.get(site.leaf) or (role if role is Role.ATTENTION_O and not low_rank else None)


def is_value_too(site: Site) -> bool:
    """Tell whether a projection makes one head that is key and value at once.

    Args:
        site: The site of a projection of attention.
    """
    return site.leaf == ONE_HEAD[1] and bool(re.fullmatch(ONE_HEAD[0], type(site.parent).__name__))


def core_of(site: Site) -> nn.Module | None:
    """Return the module that holds q, k and v, which knows the heads: the parent, or what is in, beside or around it.

    Args:
        site: The site of a projection of attention.
    """
    if isinstance(site.parent, nn.MultiheadAttention):
        return site.parent
    around = site.ancestors[1] if len(site.ancestors) > 1 else None
    beside = [child for module in (site.parent, around) if module is not None for child in inner_children(module)]
    cores = (core for core in (site.parent, around, *beside) if core is not None and (has_qkv(core) or fuses(core)))
    return next(cores, site.parent)


def is_attention(module: nn.Module | None) -> bool:
    """Tell whether a module is an attention: by its class's name, or by what stands in it; a block around one is none.

    Args:
        module: A module.
    """
    if module is None:
        return False
    named = bool(ATTENDS.search(type(module).__name__)) or has_qkv(module) or fuses(module, square=False)
    return named and not _holds_attention(module)


def is_inside_attention(site: Site) -> bool:
    """Tell whether one of the two nearest modules around a layer that are more than a list is an attention.

    A module is one too that states a number of heads, or calls torch's attention, and has no attention inside.

    Args:
        site: The site of a dense layer.
    """
    around = [module for module in site.ancestors if not isinstance(module, CONTAINERS)][:2]
    chooses = any(CHOOSES.search(type(module).__name__) for module in around)
    states = (heads_of(module) or functions_called(type(module)) & ATTENDING for module in around)
    attends = (
        is_attention(m) or (of_heads and not _holds_attention(m)) for m, of_heads in zip(around, states, strict=True)
    )
    return not chooses and any(attends)


def fuses_a_gate(site: Site) -> bool:
    """Tell whether a projection of an attention holds a gate too: its name says both, and no other is the projection.

    Args:
        site: The site of a dense layer.
    """
    role = gated_projection(site.leaf)
    if role is None or site.parent is None or not is_inside_attention(site):
        return False
    return all(projection(name) is not role for name in dense_children(site.parent))


def mixes_heads(site: Site) -> bool:
    """Tell whether a matrix has a row and a column for each head of the attention around it: nothing rotates heads.

    Args:
        site: The parameter's site.
    """
    owners = [
        module for module in (site.module, *site.ancestors[:2]) if not isinstance(module, nn.modules.conv._ConvNd)
    ]
    heads = next((count for module in owners if (count := heads_of(module))), 0)
    if CHOOSES.search(type(site.parent).__name__) or projection(site.leaf) or is_gate(site.leaf):
        return False
    return site.shape[0] == site.shape[1] == heads and all(length == 1 for length in site.shape[2:])


def fuses(module: nn.Module, square: bool = True) -> bool:
    """Tell whether a module holds a fused projection.

    Args:
        module: A module.
        square: Whether one with as many outputs as inputs is one: `in_proj` may be the first layer of an MLP.
    """
    fused = [shape_of(layer) for name, layer in dense_children(module).items() if is_fused(name)]
    return any(square or inputs != outputs for inputs, outputs in fused)


def has_qkv(module: nn.Module) -> bool:
    """Tell whether q, k and v stand side by side in a module.

    Args:
        module: A module.
    """
    return {projection(name) for name, _ in module.named_children()} >= QKV


def _states_heads(module: nn.Module) -> bool:
    """Tell whether a module states a number of heads and has one of the projections of an attention."""
    named = any(projection(name) in QKV for name in dense_children(module))
    return named and bool(heads_of(module)) and not _holds_attention(module)


def _holds_attention(module: nn.Module) -> bool:
    """Tell whether an attention with matrices of its own is inside a module."""
    inside = (other for other in module.modules() if other is not module and ATTENDS.search(type(other).__name__))
    return any(len(whole_shape(p)) > 1 for other in inside for p in other.parameters())


def _is_boxed(site: Site, box: nn.Module) -> bool:
    """Tell whether a layer is alone in a box, or with gates of what it reads."""
    return all(name == site.leaf or is_gate(name) for name in dense_children(box)) and not is_gate(site.leaf)


def _is_lone_output(site: Site, core: nn.Module) -> bool:
    """Tell whether a layer is the only one beside q, k and v that has no name of theirs, and reads what they write."""
    layers = dense_children(core)
    roles = {name: projection(name) for name in layers}
    if (
        _holds_attention(core)
        or not has_qkv(core)
        or [name for name, role in roles.items() if role not in QKV] != [site.leaf]
    ):
        return False
    widths = {shape_of(layers[name])[1] for name, role in roles.items() if role in QKV}
    return shape_of(layers[site.leaf])[0] in widths and not is_gate(site.leaf) and "skip" not in site.leaf
