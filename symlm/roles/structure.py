"""The role of one parameter, from the structure around it first and from its name last."""

from torch import nn

from symlm.roles.ends import EndMatrices
from symlm.roles.role import Role, Site

ATTENTION = {
    "q_proj": Role.ATTENTION_Q,
    "q_b_proj": Role.ATTENTION_Q,
    "q_attn": Role.ATTENTION_Q,
    "k_proj": Role.ATTENTION_K,
    "v_proj": Role.ATTENTION_V,
    **dict.fromkeys(("o_proj", "out_proj", "c_proj", "dense"), Role.ATTENTION_O),
}


FUSED_LEAVES = ("qkv_proj", "query_key_value", "c_attn", "qkv", "Wqkv", "wqkv", "in_proj", "kv_b_proj")


MLP = {
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"), Role.MLP_IN),
    **dict.fromkeys(("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h"), Role.MLP_OUT),
}


EXPERTS = {
    **dict.fromkeys(("gate_up_proj", "gate_proj", "up_proj"), Role.EXPERT_IN),
    "down_proj": Role.EXPERT_OUT,
}


ADAPTERS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")


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
    if len(shape) <= 1 or site.name.endswith("bias") or (len(shape) == 2 and 1 in shape):
        return Role.VECTOR
    if any(name in site.name for name in ADAPTERS):
        return Role.LORA
    if len(shape) == 2 and _is_router(site, owner):
        return Role.ROUTER
    if len(shape) != 2 or not (isinstance(site.module, nn.Linear) or owner == "Conv1D"):
        return None
    return _classify_linear(site)


def _classify_linear(site: Site) -> Role | None:
    """Find the role of a dense projection by its block: attention, MLP, or neither."""
    if site.fused:
        return Role.ATTENTION_QKV
    if site.leaf in FUSED_LEAVES:
        return None
    if "attention" in type(site.parent).__name__.lower() and site.leaf in ATTENTION:
        return ATTENTION[site.leaf]
    children = {name for name, _ in site.parent.named_children()} if site.parent else set()
    if site.leaf in MLP and {MLP.get(name) for name in children} >= {Role.MLP_IN, Role.MLP_OUT}:
        return MLP[site.leaf]
    return None if site.leaf == "gate_up_proj" else Role.MATRIX


def _is_router(site: Site, owner: str) -> bool:
    """Decide by the class of the module or its parent, or by experts beside a linear layer named gate or router."""
    if owner.lower().endswith("router") or type(site.parent).__name__.lower().endswith("router"):
        return True
    return isinstance(site.module, nn.Linear) and hasattr(site.parent, "experts") and site.leaf in ("gate", "router")
