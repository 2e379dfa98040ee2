"""Parameters that no dense layer holds: filters, learned tokens and positions, decays, mixes, stacks."""

import re

from torch import nn

from symlm.roles.recognizers.channels import BY_NAME
from symlm.roles.recognizers.layers import is_convolution, is_pointwise
from symlm.roles.recognizers.names import QKV, is_fused, projection
from symlm.roles.role import Role, Site, whole_shape

TABLES = {"pos", "position", "positions", "positional", "embedding", "embeddings", "embed", "emb", "token", "tokens"}
TABLES |= {"latent", "latents", "query", "queries", "probe", "cls", "mask", "register", "prompt", "ape", "feature"}
TABLES |= {"codevectors"}
ELEMENTS = {"a_log", "d", "dt_bias", "scale", "decay", "gamma", "beta", "alpha", "b1", "b2", "bias", "biases"}
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
    if isinstance(site.module, nn.RNNBase | nn.RNNCellBase):
        return Role.MLP_OUT if name.startswith("weight_hr") else Role.MLP_IN
    if _is_of_one_block(site) or (is_pointwise(site.module) and is_fused(site.leaf)):
        return None  # stored as x @ W or as W @ x, or in an order that only the code shows
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


def _is_of_one_block(site: Site) -> bool:
    """Tell whether a matrix that no layer holds is a projection of an attention or of an MLP, by those beside it."""
    names = [name for name, p in site.module.named_parameters(recurse=False) if len(whole_shape(p)) == 2]
    roles, blocks = {projection(name) for name in names}, {BY_NAME.get(name) for name in names}
    of_block = site.leaf in BY_NAME and blocks >= {Role.MLP_IN, Role.MLP_OUT}
    return site.leaf in names and (of_block or (projection(site.leaf) is not None and roles >= QKV))


def _groups(module: nn.Module) -> int:
    """Return the number of groups of a convolution."""
    return int(getattr(module, "groups", 1))
