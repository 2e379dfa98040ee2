"""Projections of attention: what q, k, v and o are called, where they stand, and in which order they are fused."""

import re

from torch import nn

from symlm.roles.role import Role, Site
from symlm.roles.wrappers import inner_module

TOKENS = {  # parts of the names of projections, as `w_q`, `Wq`, `to_query`, `q_lin` or `query_global` have them
    Role.ATTENTION_Q: {"q", "qs", "query", "queries", "wq"},
    Role.ATTENTION_K: {"k", "ks", "key", "keys", "wk"},
    Role.ATTENTION_V: {"v", "vs", "value", "values", "wv"},
    Role.ATTENTION_O: {"o", "out", "output", "dense", "wo"},
}
FILLERS = {"w", "to", "c", "add", "linear", "lin", "fc", "proj", "project", "net", "attn", "b", "layer", "global"}
FILLERS |= {"attention", "w2e", "e2w", "e2e", "projection", "head"}
OUTPUTS = ("c_proj", "proj")
FUSED_TOKENS = {
    *("qkv", "kqv", "qvk", "vqk", "qk", "kv", "qv", "qkvz", "qkvo", "qkvg", "ba", "zba", "pack"),
    *("wqkv", "wkv", "wqk", "wpack"),
}
FUSED_NAMES = ("c_attn", "query_key_value", "key_value", "in_proj", "in_proj_weight")
NOT_FUSED = ("kv_a_proj_with_mqa", "kv_a_proj", "index_qk_proj")  # low ranks; what only chooses keys
FUSED_ORDERS = (
    # The order of the outputs of fused projections by the class of the attention, which alone knows it. A new model is
    # one line here, and a case of tests/roles/test_loss.py, which moves the blocks and looks at the loss.
    (r"Phi3Attention|Phi4MultimodalAttention", "qkv_proj", "q k v"),
    (r"GPT2Attention|OpenAIGPTAttention|CausalSelfAttention|GPTBigCodeAttention", "c_attn", "q k v"),
    (r"MptAttention|ModernBert\w*Attention", "Wqkv", "q k v"),
    (r"CausalSelfAttention", "qkv", "q k v"),  # litgpt
    (r"\w*(Vision|Sam|Blip|Window|Channel)\w*Attention", "qkv", "q k v"),
    (r"Blip2Attention|InstructBlip(Video)?Attention", "qkv", "q k v"),
    (r"MultiheadAttention", "in_proj_weight", "q k v"),
    (r"JetMoeAttention", "kv_proj", "k v"),
    (r"(Granite|Evolla)\w+Attention", "to_kv", "k v"),
    (
        r"GPTNeoX(Japanese)?Attention|BloomAttention|PersimmonAttention|FalconAttention",
        "query_key_value",
        "heads of q k v",
    ),
    (r"DisentangledSelfAttention", "in_proj", "heads of q k v"),
    (r"CodeGenAttention", "qkv_proj", "four of q v k"),
)
ONE_HEAD = (r"DeepseekV4\w+", "kv_proj")  # which is k and v at once
BESIDE_FUSED = {
    **dict.fromkeys(("q_proj", "q_b_proj", "q_attn", "q", "to_q", "query", "pos_q_proj"), Role.ATTENTION_Q),
    **dict.fromkeys(("k_proj", "pos_proj"), Role.ATTENTION_K),
    "v_proj": Role.ATTENTION_V,
    **dict.fromkeys(
        (
            "o_proj",
            "out_proj",
            "c_proj",
            "dense",
            "proj",
            "projection",
            "projection_layer",
            "to_out",
            "Wo",
            "output",
            "post_proj",
        ),
        Role.ATTENTION_O,
    ),
}
QKV = {Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V}


def attention_role(site: Site) -> Role | None:
    """Return the role of a dense layer in an attention, None elsewhere.

    Args:
        site: The site of a dense layer.
    """
    if fused_order(site):
        return Role.ATTENTION_QKV
    parent = site.parent
    if is_value_too(site):
        return Role.ATTENTION_K
    if parent is None or is_fused(site.leaf):
        return None
    role = projection(site.leaf)
    if role and _has_qkv(parent):
        return role
    if len(site.ancestors) > 1 and is_alone(parent):  # a layer in a box of its own: what the box is called counts
        box = projection(site.path[-2])
        if box and _has_qkv(site.ancestors[1]):
            return box
        cores = (child for _, child in site.ancestors[1].named_children() if child is not parent)
        if site.leaf in BESIDE_FUSED and any(_has_qkv(core) or _fuses(core) for core in cores):
            return Role.ATTENTION_O
    named = any(word in type(parent).__name__.lower() for word in ("attention", "mla")) or _fuses(parent)
    return BESIDE_FUSED.get(site.leaf) if named else None


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
    around = site.ancestors[1] if len(site.ancestors) > 1 else None
    beside = [child for module in (site.parent, around) if module is not None for _, child in module.named_children()]
    cores = (core for core in (site.parent, around, *beside) if core is not None and (_has_qkv(core) or _fuses(core)))
    return next(cores, site.parent)


def is_alone(module: nn.Module) -> bool:
    """Tell whether a module holds one dense layer and nothing else that has a matrix, as BERT's output layers do.

    Args:
        module: A module around a dense layer.
    """
    dense = [child for _, child in module.named_children() if is_dense(inner_module(child))]
    return len(dense) == 1


def is_dense(module: nn.Module | None) -> bool:
    """Tell whether a module is a dense layer, by its class, a subclass's name, or what a parametrization holds.

    Args:
        module: A module.
    """
    name = type(module).__name__
    return isinstance(module, nn.Linear) or name.endswith("Linear") or name in ("Conv1D", "ParametrizationList")


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


def fused_order(site: Site) -> str | None:
    """Return the order of a fused projection's outputs, if the structure or the class shows it.

    Args:
        site: The site of the projection.

    Returns:
        "q k v" one after the other, "k v", "heads of q k v", "groups of q k v" (query heads, then the k and v that they
        share), "four of q v k" (four blocks, each with all three), or "heads of k v" (of latent attention); None for
        any other layer.
    """
    owner = site.module if isinstance(getattr(site.module, site.leaf, None), nn.Parameter) else site.parent
    if site.leaf == "kv_b_proj" and hasattr(owner, "qk_nope_head_dim") and hasattr(owner, "v_head_dim"):
        return "heads of k v"
    name = type(owner).__name__
    if name == "Attention" and "openai" in type(owner).__module__:
        name = "OpenAIGPTAttention"
    if name in ("VisionAttention", "Attention") and not type(owner).__module__.startswith("transformers"):
        return None
    order = next((o for pattern, leaf, o in FUSED_ORDERS if leaf == site.leaf and re.fullmatch(pattern, name)), None)
    if order == "q k v" and getattr(owner, "is_cross_attention", False):
        return "k v"
    if order is None or name not in ("GPTBigCodeAttention", "FalconAttention"):
        return order
    if getattr(owner, "new_decoder_architecture", False):
        return "groups of q k v"
    return "q k v" if getattr(owner, "multi_query", True) else "heads of q k v"


def _fuses(module: nn.Module) -> bool:
    """Tell whether a module holds a fused projection."""
    return any(is_fused(name) for name, child in module.named_children() if is_dense(inner_module(child)))


def _has_qkv(module: nn.Module) -> bool:
    """Tell whether q, k and v stand side by side in a module."""
    return {projection(name) for name, _ in module.named_children()} >= QKV


def _parts(leaf: str) -> list[str]:
    """Cut a name at underscores, at numbers behind it, and where a capital follows a small letter."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])|\d+$", "_", leaf).lower().strip("_").split("_")
