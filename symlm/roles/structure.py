"""The role of one parameter, from the structure around it first and from its name last."""

import re

from torch import nn

from symlm.roles.ends import EndMatrices
from symlm.roles.role import Role, Site

TOKENS = {  # parts of the names of projections, as `w_q`, `Wq`, `to_query` or `q_lin` have them
    Role.ATTENTION_Q: {"q", "qs", "query", "queries", "wq"},
    Role.ATTENTION_K: {"k", "ks", "key", "keys", "wk"},
    Role.ATTENTION_V: {"v", "vs", "value", "values", "wv"},
    Role.ATTENTION_O: {"o", "out", "output", "dense", "wo"},
}
FILLERS = {"w", "to", "c", "add", "linear", "lin", "fc", "proj", "project", "net", "attn", "b", "layer"}
OUTPUTS = ("c_proj", "proj")
FUSED_TOKENS = {
    *("qkv", "kqv", "qvk", "vqk", "qk", "kv", "qv", "qkvz", "qkvo", "qkvg", "ba", "zba", "pack"),
    *("wqkv", "wkv", "wqk", "wpack"),
}
FUSED_NAMES = ("c_attn", "query_key_value", "key_value", "in_proj", "in_proj_weight")
NOT_FUSED = ("kv_a_proj_with_mqa",)  # a view splits it
BESIDE_FUSED = {
    **dict.fromkeys(("q_proj", "q_b_proj", "q_attn"), Role.ATTENTION_Q),
    "k_proj": Role.ATTENTION_K,
    "v_proj": Role.ATTENTION_V,
    **dict.fromkeys(("o_proj", "out_proj", "c_proj", "dense"), Role.ATTENTION_O),
}


MLP = {
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"), Role.MLP_IN),
    **dict.fromkeys(("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h"), Role.MLP_OUT),
}


EXPERTS = {
    **dict.fromkeys(("gate_up_proj", "gate_proj", "up_proj"), Role.EXPERT_IN),
    "down_proj": Role.EXPERT_OUT,
}


ADAPTERS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_a.", ".lora_b.")


def classify(site: Site, ends: EndMatrices) -> Role | None:
    """Find the role of one parameter; the order of the tests is the order of trust.

    Args:
        site: The parameter's site.
        ends: The token matrices of its model.

    Returns:
        The role, or None if the structure does not show one.
    """
    shape, owner = site.shape, type(site.module).__name__
    if role := ends.role(site):
        return role
    if len(shape) == 3 and owner.endswith("Experts"):
        return EXPERTS.get(site.leaf)
    if len(shape) == 2 and any(name in site.name for name in ADAPTERS):
        return Role.LORA
    if len(shape) <= 1 or site.name.endswith("bias") or (len(shape) == 2 and 1 in shape):
        return Role.VECTOR
    if len(shape) == 2 and _is_router(site, owner):
        return Role.ROUTER
    if len(shape) != 2 or not (_is_linear(site) or owner == "Conv1D"):
        return None
    role = _classify_linear(site)
    return None if role is Role.MATRIX and ends.is_unclear(site) else role


def _classify_linear(site: Site) -> Role | None:
    """Find the role of a dense projection by its block: attention, MLP, or neither."""
    if site.fused:
        return Role.ATTENTION_QKV
    if is_fused(site.leaf):
        return None
    children = {name for name, _ in site.parent.named_children()} if site.parent else set()
    if site.leaf in MLP and {MLP.get(name) for name in children} >= {Role.MLP_IN, Role.MLP_OUT}:
        return MLP[site.leaf]
    beside = {projection(name) for name in children}
    if beside >= {Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V} and (role := projection(site.leaf)):
        return role
    if "attention" in type(site.parent).__name__.lower() and site.leaf in BESIDE_FUSED:
        return BESIDE_FUSED[site.leaf]
    return None if site.leaf == "gate_up_proj" else Role.MATRIX


def projection(leaf: str) -> Role | None:
    """Return which projection of an attention a name is for, if any; it counts where q, k and v stand together.

    Args:
        leaf: The name of the projection.
    """
    tokens = set(_parts(leaf)) - FILLERS
    roles = [role for role, names in TOKENS.items() if tokens and tokens <= names]
    return roles[0] if roles else Role.ATTENTION_O if leaf in OUTPUTS else None


def is_fused(leaf: str) -> bool:
    """Tell whether a projection's name says that it fuses several, in an order that only the module's code shows.

    Args:
        leaf: The name of the projection.
    """
    return leaf not in NOT_FUSED and (leaf.lower() in FUSED_NAMES or bool(FUSED_TOKENS & set(_parts(leaf))))


def _parts(leaf: str) -> list[str]:
    """Cut a name at underscores, at numbers behind it, and where a capital follows a small letter."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])|\d+$", "_", leaf).lower().strip("_").split("_")


def _is_router(site: Site, owner: str) -> bool:
    """Decide by the class of the module or its parent, or by experts beside a linear layer named gate or router."""
    if owner.lower().endswith("router") or type(site.parent).__name__.lower().endswith("router"):
        return True
    return isinstance(site.module, nn.Linear) and hasattr(site.parent, "experts") and site.leaf in ("gate", "router")


def _is_linear(site: Site) -> bool:
    """Decide by the class; of a parametrized layer, whose weight is in a list of its own, by what the list holds."""
    return isinstance(site.module, nn.Linear) or (type(site.module).__name__ == "ParametrizationList")
