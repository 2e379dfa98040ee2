"""The role of one parameter, from the structure around it first and from its name last."""

from torch import nn

from symlm.roles.ends import EndMatrices
from symlm.roles.recognizers.attention import (
    attention_role,
    fuses_a_gate,
    is_attention,
    is_inside_attention,
    mixes_heads,
)
from symlm.roles.recognizers.chains import is_apart
from symlm.roles.recognizers.channels import POINTWISE, channel_role, mixer_of
from symlm.roles.recognizers.layers import is_computed, is_dense, is_pointwise, is_weight_of_dense, shape_of
from symlm.roles.recognizers.leaves import leaf_role, role_by_filters
from symlm.roles.recognizers.logits import HEADS, ignores_a_shift
from symlm.roles.recognizers.names import is_fused
from symlm.roles.recognizers.shapes import (
    is_activated_alone,
    is_activated_first,
    is_ambiguous,
    role_by_shapes,
)
from symlm.roles.role import Role, Site
from symlm.roles.source.calls import functions_called
from symlm.roles.storage import block_of_experts, number_of_experts, router_weights, whole_shape

EXPERTS = {
    **dict.fromkeys(("gate_up_proj", "gate_proj", "up_proj", "input_linear", "w1", "w3", "wi", "w13"), Role.EXPERT_IN),
    **dict.fromkeys(("down_proj", "output_linear", "w2", "wo"), Role.EXPERT_OUT),
}


QUERIES = {"input_linear": Role.ATTENTION_Q, "output_linear": Role.ATTENTION_O}


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
        return Role.CAPPED_LM_HEAD if role is Role.LM_HEAD and ends.is_capped(site) else role
    block = block_of_experts(site.module) if len(shape) == 3 and site.leaf in EXPERTS else None
    if block or (len(shape) == 3 and owner.endswith("Experts")):
        if site.inputs_first is None:
            return None
        if block:
            return Role.EXPERT_OUT if site.parameter is block[1] else Role.EXPERT_IN
        queries = type(site.parent).__name__.endswith("MoA")  # experts that are queries and outputs of an attention
        return (QUERIES if queries else EXPERTS).get(site.leaf)
    if len(shape) == 2 and any(name in f"{site.name}." for name in ADAPTERS):
        return Role.LORA
    if len(shape) <= 1 and _is_flat(site, owner):
        return None
    if len(shape) <= 1 or site.name.endswith("bias") or (len(shape) == 2 and 1 in shape):
        return Role.VECTOR
    if len(shape) == 2 and _is_router(site, owner):
        role = Role.ROUTER if ignores_a_shift(site) else Role.SIGMOID_ROUTER
        return role if site.inputs_first is not None else None
    if mixes_heads(site):
        return Role.VECTOR
    if is_pointwise(site.module) and len(shape) > 2:
        box = (type(site.parent).__name__, "".join(site.path[-2:-1]))
        if role := attention_role(site) or POINTWISE.get(box) or role_by_filters(site):
            return role
        if is_activated_alone(site):
            return Role.MLP_IN
    if len(shape) != 2 or not is_weight_of_dense(site):
        return leaf_role(site)
    if site.inputs_first is None or is_computed(site):
        return None
    mixes = mixer_of(site) is not None
    role = channel_role(site) if mixes else attention_role(site) or channel_role(site)
    if role is Role.MLP_OUT and not mixes and ends.is_unclear(site):
        return None  # the last of an MLP, or a head
    if role or fuses_a_gate(site) or (is_fused(site.leaf) and shape[0] != shape[1]) or site.leaf == "gate_up_proj":
        return role
    if ends.is_unclear(site):
        return None
    if role := None if is_apart(site) else role_by_shapes(site, ends.inputs | ends.outputs):
        return role
    if is_inside_attention(site) or is_ambiguous(site):  # what none of its names says is never one matrix
        return None
    return Role.MLP_IN if is_activated_alone(site) or is_activated_first(site) else Role.MATRIX


def _is_flat(site: Site, owner: str) -> bool:
    """Tell whether a vector is a matrix that is stored flat: a router's (OLMo-core), or FSDP1's of many layers."""
    return site.leaf == "_flat_param" or (owner.lower().endswith("router") and site.name.endswith(".weight"))


def _is_router(site: Site, owner: str) -> bool:
    """Decide by the class of the module or its parent, or by experts beside a linear layer named gate or router."""
    above = [*site.ancestors[:2], None, None]
    if owner.lower().endswith("router") or _scores_experts(site):
        return True
    for module in site.ancestors[:2]:
        if type(module).__name__.lower().endswith("router") and not _holds_experts(module):
            last = [layer for layer in module.modules() if is_dense(layer)][-1:]  # behind an MLP, or one of several
            return any(shape_of(layer) == shape_of(site.module) for layer in last)
    gates = ("Gate", "Gating")
    boxed = type(above[0]).__name__.endswith(gates) and hasattr(above[1], "experts")
    held = owner.endswith(gates) and hasattr(above[0], "experts")
    experts = getattr(above[0], "experts", None)
    named = site.path[-1:] in (("gate",), ("router",), ("gating",)) or site.path[-2:-1] == ("router",)
    beside = named and (experts is not None or "router" in site.path)
    scores = isinstance(experts, nn.ModuleList) and shape_of(site.module)[1] == len(experts) > 1
    scores |= _counts_experts(site)
    return boxed or held or (isinstance(site.module, nn.Linear) and (beside or scores))


def _scores_experts(site: Site) -> bool:
    """Tell whether a matrix that no layer holds has a row or a column for each expert beside it, and is scored."""
    experts = block_of_experts(site.module) or _holds_experts(site.module)
    scored = functions_called(type(site.module)) & {"softmax", "sigmoid", "topk"}
    return site.leaf in router_weights(site.module) and bool(experts and scored)


def _counts_experts(site: Site) -> bool:
    """Tell whether a layer has an output for each of the MLPs in a list or in stacks beside it, or beside its list."""
    listed = isinstance(site.parent, nn.ModuleList) and len(site.ancestors) > 1
    around, name = (site.ancestors[1], site.path[-2]) if listed else (site.parent, site.leaf)
    if around is None or name in HEADS or (count := shape_of(site.module)[1]) < 2:
        return False
    lists = [child for child in around.children() if isinstance(child, nn.ModuleList) and child is not site.parent]
    stacks = [p for p in around.parameters(recurse=False) if len(whole_shape(p)) == 3 and len(p) == count]
    boxed = any(block_of_experts(child) and count in number_of_experts(child) for child in around.children())
    layers = [child for child in lists if len(child) == count and all(map(is_dense, child))]  # one of each expert
    return (
        len(stacks) > 1
        or boxed
        or len(layers) > 1
        or any(len(experts) == count and all(map(_is_mlp, experts)) for experts in lists)
    )


def _holds_experts(module: nn.Module) -> bool:
    """Tell whether a module has a list of MLPs."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    return any(all(map(_is_mlp, child)) for child in lists)


def _is_mlp(module: nn.Module | None) -> bool:
    """Tell whether a module has two dense layers or more inside, and no attention."""
    inside = [*module.modules()] if module is not None else []  # of a list with gaps
    return sum(map(is_dense, inside)) > 1 and not any(is_attention(other) for other in inside)
