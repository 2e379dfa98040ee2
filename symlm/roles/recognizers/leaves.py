"""Parameters that no dense layer holds: filters, learned tokens and positions, decays, mixes, stacks."""

import re

from torch import nn

from symlm.roles.role import Role, Site

TABLES = {"pos", "position", "positions", "positional", "embedding", "embeddings", "embed", "emb", "token", "tokens"}
TABLES |= {"latent", "latents", "query", "queries", "probe", "cls", "mask", "register", "prompt", "ape", "feature"}
ELEMENTS = {"a_log", "d", "dt_bias", "scale", "decay", "gamma", "beta", "alpha", "b1", "b2", "bias"}
PROJECTIONS = {  # stored [d, heads, head_dim]
    **{"q": Role.ATTENTION_Q, "k": Role.ATTENTION_K, "v": Role.ATTENTION_V, "o": Role.ATTENTION_O},
    **dict.fromkeys(("r", "r_kernel"), Role.ATTENTION_K),  # keys of relative positions
}
STACKS = ("gate_weight", "x_proj_weight", "dt_proj_weight")
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
    if is_convolution(site.module):
        return Role.VECTOR if shape[1] == 1 and _groups(site.module) > 1 else Role.MATRIX
    words = set(re.sub(r"\d+$", "", name).split("_")) | {name}
    if words & ELEMENTS or name in ("time_mix_key", "time_mix_value"):
        return Role.VECTOR
    if len(shape) == 3 and "attention" in type(site.module).__name__.lower() and name in PROJECTIONS:
        return PROJECTIONS[name]
    if len(shape) == 3 and name.endswith(STACKS):
        return Role.MLP_OUT if name == "x_proj_weight" else Role.MLP_IN if "dt" in name else Role.MATRIX
    if len(shape) == 2 and name in STREAMS:
        return Role.MLP_IN
    if len(shape) == 2 and name.endswith(MATRICES):
        return Role.MATRIX
    inside = {word for part in site.path[-2:] for word in part.lower().split("_")}
    if words & TABLES or (name.isdigit() and inside & TABLES) or "extensor" in words:
        return Role.EMBEDDING if len(shape) == 2 else Role.VECTOR
    return None


def is_convolution(module: nn.Module) -> bool:
    """Tell whether a module is a convolution, of torch or of a name that says so.

    Args:
        module: The module that holds the parameter.
    """
    return isinstance(module, nn.modules.conv._ConvNd)


def is_pointwise(module: nn.Module) -> bool:
    """Tell whether a module is a convolution over single places: a dense layer of every place.

    Args:
        module: The module that holds the parameter.
    """
    return isinstance(module, nn.modules.conv._ConvNd) and set(module.kernel_size) == {1}


def _groups(module: nn.Module) -> int:
    """Return the number of groups of a convolution."""
    return int(getattr(module, "groups", 1))
