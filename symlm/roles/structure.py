"""The role of one parameter, from the structure around it first and from its name last."""

import re

from torch import nn

from symlm.roles.ends import EndMatrices
from symlm.roles.role import Role, Site

QUERIES = ("q_proj", "q_b_proj", "q_attn", "query", "q", "wq", "Wq", "to_q", "c_q", "q_lin", "query_proj", "linear_q")
KEYS = ("k_proj", "key", "k", "wk", "Wk", "to_k", "c_k", "k_lin", "key_proj", "linear_k")
VALUES = ("v_proj", "value", "v", "wv", "Wv", "to_v", "c_v", "v_lin", "value_proj", "linear_v")
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "o", "wo", "Wo", "to_out", "out_lin", "linear_out", "proj")
ATTENTION = {
    **dict.fromkeys(QUERIES, Role.ATTENTION_Q),
    **dict.fromkeys(KEYS, Role.ATTENTION_K),
    **dict.fromkeys(VALUES, Role.ATTENTION_V),
    **dict.fromkeys(OUTPUTS, Role.ATTENTION_O),
}
BESIDE_FUSED = ("q_proj", "q_b_proj", "q_attn", "k_proj", "v_proj", "o_proj", "out_proj", "c_proj", "dense")
FUSED = re.compile(r"(.*_)?(qkv|qkvz|kv|ba)(_.*|\d*)|[wW](qkv|pack)|c_attn|query_key_value|in_proj|qkv_proj|kv_b_proj")
NOT_FUSED = ("kv_a_proj_with_mqa",)  # a view splits it


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
    if ends.is_unclear(site):
        return None
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
    return _classify_linear(site)


def _classify_linear(site: Site) -> Role | None:
    """Find the role of a dense projection by its block: attention, MLP, or neither."""
    if site.fused:
        return Role.ATTENTION_QKV
    if is_fused(site.leaf):
        return None
    children = {name for name, _ in site.parent.named_children()} if site.parent else set()
    together = all(children & set(names) for names in (QUERIES, KEYS, VALUES))
    if together and site.leaf in ATTENTION:
        return ATTENTION[site.leaf]
    if "attention" in type(site.parent).__name__.lower() and site.leaf in BESIDE_FUSED:
        return ATTENTION[site.leaf]
    if site.leaf in MLP and {MLP.get(name) for name in children} >= {Role.MLP_IN, Role.MLP_OUT}:
        return MLP[site.leaf]
    return None if site.leaf == "gate_up_proj" else Role.MATRIX


def is_fused(leaf: str) -> bool:
    """Tell whether a projection's name says that it fuses several, in an order that only the module's code shows.

    Args:
        leaf: The name of the projection.
    """
    return leaf not in NOT_FUSED and FUSED.fullmatch(leaf) is not None


def _is_router(site: Site, owner: str) -> bool:
    """Decide by the class of the module or its parent, or by experts beside a linear layer named gate or router."""
    if owner.lower().endswith("router") or type(site.parent).__name__.lower().endswith("router"):
        return True
    return isinstance(site.module, nn.Linear) and hasattr(site.parent, "experts") and site.leaf in ("gate", "router")


def _is_linear(site: Site) -> bool:
    """Decide by the class; of a parametrized layer, whose weight is in a list of its own, by what the list holds."""
    return isinstance(site.module, nn.Linear) or (type(site.module).__name__ == "ParametrizationList")
