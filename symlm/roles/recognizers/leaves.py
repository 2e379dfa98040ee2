"""Parameters that no dense layer holds: filters, learned tokens and positions, decays, mixes, stacks."""

import re

from torch import nn

from symlm.roles.recognizers.layers import activates, heads_of, is_convolution, is_dense, is_norm, is_pointwise, kind_of
from symlm.roles.recognizers.names import BY_NAME, QKV, is_fused, projection
from symlm.roles.recognizers.shapes import INERT
from symlm.roles.role import Role, Site
from symlm.roles.source.calls import looks_up, makes_logits
from symlm.roles.storage import whole_shape
from symlm.roles.wrappers import inner_module

TABLES = {"pos", "position", "positions", "positional", "embedding", "embeddings", "embed", "emb", "token", "tokens"}
TABLES |= {"latent", "latents", "query", "queries", "probe", "cls", "mask", "register", "prompt", "ape", "feature"}
TABLES |= {"codevectors", "slot", "slots", "embeds", "mem"}
ELEMENTS = {"a_log", "d", "dt_bias", "scale", "decay", "gamma", "beta", "alpha", "b1", "b2", "bias", "biases"}
ELEMENTS |= {"lambda", "lambdas", "scales", "gammas", "betas", "alphas", "gain", "gains", "slopes"}
PROJECTIONS = {  # stored [d, heads, head_dim]
    **{"q": Role.ATTENTION_Q, "k": Role.ATTENTION_K, "v": Role.ATTENTION_V, "o": Role.ATTENTION_O},
    **dict.fromkeys(("r", "r_kernel"), Role.ATTENTION_K),  # keys of relative positions
}
STACKS = ("gate_weight", "x_proj_weight", "dt_proj_weight")
FACTORS = {"fn", "w1", "w2", "proj", "projs", "projection", "projections", "linear"}  # of a matrix that makes elements
LISTS = (nn.ParameterList, nn.ParameterDict)
STREAMS = ("fn", "hc_fn")  # a row is a number of single streams
MATRICES = ("proj", "projection_weight", "static_weight", "compress_gate")


def leaf_role(site: Site) -> Role | None:
    """Return the role of a parameter outside dense layers, from its module's class, its shape, and its name.

    Args:
        site: The parameter's site.

    Returns:
        `matrix` for a convolution, `vector` for one of single channels, for learned tokens with more than two axes and
        for what acts entry by entry; `embedding` for tables of learned tokens; None for what nothing explains.
    """
    shape, name = site.shape, site.leaf.lower()
    if sum(length > 1 for length in shape) <= 1:
        return Role.VECTOR
    if isinstance(site.module, nn.RNNBase | nn.RNNCellBase):
        return Role.MLP_OUT if name.startswith("weight_hr") else Role.MLP_IN
    if _is_of_one_block(site) or (is_pointwise(site.module) and is_fused(site.leaf)):
        return None  # stored as x @ W or as W @ x, or in an order that only the code shows
    if is_convolution(site.module):
        return Role.VECTOR if shape[1] == 1 and _groups(site.module) > 1 else Role.MATRIX
    if is_norm(site.module) and site.name.endswith(".weight"):
        return Role.VECTOR  # a gain for each entry
    if type(site.module).__module__.startswith("torch.nn.modules") and not isinstance(site.module, LISTS):
        return None  # of a layer that is not known, whatever it is called
    words = set(re.sub(r"\d+$", "", name).split("_")) | {name}
    if (words & ELEMENTS and not words & FACTORS) or name in ("time_mix_key", "time_mix_value"):
        return Role.VECTOR
    if len(shape) == 3 and "attention" in type(site.module).__name__.lower() and name in PROJECTIONS:
        heads = heads_of(site.module) or heads_of(getattr(site.module, "config", None))
        return PROJECTIONS[name] if heads == shape[1] else None
    if len(shape) == 3 and name.endswith(STACKS):
        return Role.MLP_OUT if name == "x_proj_weight" else Role.MLP_IN if "dt" in name else Role.MATRIX
    if len(shape) == 2 and name in STREAMS:
        return Role.MLP_IN
    if len(shape) == 2 and name.endswith(MATRICES):
        into_channels = name in ("in_proj", "out_proj") and activates(site.module)
        return None if into_channels else Role.MATRIX
    inside = {word for part in site.path[-2:] for word in part.lower().split("_")}
    if len(shape) == 2 and name.isdigit() and inside & FACTORS:
        return Role.MATRIX
    if len(shape) == 2 and words & TABLES and heads_of(site.module) in shape and "rel" in name:
        return Role.VECTOR  # a number for each distance and head
    if words & TABLES and words & {"weight", "weights"}:
        return None
    if words & TABLES or (name.isdigit() and inside & TABLES) or "extensor" in words:
        kind = type(site.module)
        tied = makes_logits(site.module, site.leaf) and looks_up(kind, site.leaf)
        return (Role.TIED_EMBEDDING if tied else Role.EMBEDDING) if len(shape) == 2 else Role.VECTOR
    return None


def _is_of_one_block(site: Site) -> bool:
    """Tell whether a matrix that no layer holds is a projection of an attention or of an MLP, by those beside it."""
    names = [name for name, p in site.module.named_parameters(recurse=False) if len(whole_shape(p)) == 2]
    roles, blocks = {projection(name) for name in names}, {BY_NAME.get(name) for name in names}
    of_block = site.leaf in BY_NAME and blocks >= {Role.MLP_IN, Role.MLP_OUT}
    return site.leaf in names and (of_block or (projection(site.leaf) is not None and roles >= QKV))


def _groups(module: nn.Module) -> int:
    """Return the number of groups of a convolution."""
    return int(getattr(module, "groups", 1))


def role_by_filters(site: Site) -> Role | None:
    """Return the role of one of two convolutions over single places, into a width and out of it; None elsewhere.

    Between them may be an activation, norms, and filters of single channels.

    Args:
        site: The site of a convolution.
    """
    children = [inner_module(child) for child in site.parent.children()] if site.parent is not None else []
    if site.parent is None or not activates(site.parent) or any(is_dense(child) for child in children):
        return None
    filters = [child for child in children if isinstance(child, nn.modules.conv._ConvNd) and child.groups == 1]
    mixing = [child for child in children if isinstance(child, nn.modules.conv._ConvNd) and not _is_by_channel(child)]
    if len(filters) != 2 or mixing != filters or not all(is_pointwise(child) for child in filters):
        return None
    between = children[children.index(filters[0]) + 1 : children.index(filters[1])]
    active = not isinstance(site.parent, nn.Sequential) or any(not INERT.search(kind_of(child)) for child in between)
    fits = filters[0].out_channels in (filters[1].in_channels, 2 * filters[1].in_channels)
    return (Role.MLP_IN if site.module is filters[0] else Role.MLP_OUT) if active and fits else None


def halves_of_filters(site: Site) -> int:
    """Return 2 for a convolution over single places whose outputs are values and gates, one after the other; else 1.

    Args:
        site: The site of a convolution into channels.
    """
    beside = [*site.parent.children()] if site.parent is not None and is_pointwise(site.module) else []
    filters = [child for child in beside if isinstance(child, nn.modules.conv._ConvNd) and child is not site.module]
    doubled = any(site.shape[0] == 2 * filter_.in_channels for filter_ in filters if is_pointwise(filter_))
    return 2 if doubled or any(isinstance(child, nn.GLU) for child in beside) else 1


def _is_by_channel(module: nn.modules.conv._ConvNd) -> bool:
    """Tell whether a convolution has a filter for each channel."""
    return module.groups == module.in_channels == module.out_channels > 1
