"""The order in which a projection fuses q, k and v: stated by its module, read from its code, or known by its class."""

import ast
import re

from torch import nn

from symlm.roles.recognizers.names import projection
from symlm.roles.role import Site
from symlm.roles.source.flow import Step, flow_of

OF_LATENTS = ("kv_b_proj", "wkv_b")
FUSED_ORDERS = (
    # The order of the outputs of fused projections by the class of the attention, which alone knows it. A new model is
    # one line here, and a case of tests/roles/test_loss.py, which moves the blocks and looks at the loss.
    (r"Phi3Attention|Phi4MultimodalAttention", "qkv_proj", "q k v"),
    (r"(GPT2|OpenAIGPT|GPTBigCode|ImageGPT)Attention|CausalSelfAttention", "c_attn", "q k v"),
    (r"MptAttention|ModernBert\w*Attention", "Wqkv", "q k v"),
    (r"CausalSelfAttention", "qkv", "q k v"),  # litgpt
    (r"SelfAttention", "linear_qkv", "groups of q k v"),  # Megatron
    (r"FusedQKVLinear", "wqkv", "groups of q k v"),  # torchtitan
    (r"\w*(Vision|Sam|Blip|Window|Channel)\w*Attention", "qkv", "q k v"),
    (r"(Blip2|InstructBlip|InstructBlipVideo|VitDet|HieraMaskUnit|TimesformerSelf)Attention", "qkv", "q k v"),
    (r"MultiheadAttention", "in_proj_weight", "q k v"),
    (r"JetMoeAttention", "kv_proj", "k v"),
    (r"(Granite|Evolla)\w+Attention", "to_kv", "k v"),
    (r"(GPTNeoX|GPTNeoXJapanese|Bloom|Persimmon|Falcon)Attention", "query_key_value", "heads of q k v"),
    (r"DisentangledSelfAttention", "in_proj", "heads of q k v"),
    (r"AXK2Attention", "q_gate_proj", "heads of q gate"),
    (r"CodeGenAttention", "qkv_proj", "four of q v k"),
)
ORDERS = ("q k v", "k v", "heads of q k v", "groups of q k v")  # that a module of one's own may state
CUTS = {"split", "chunk", "tensor_split"}
SHAPES = {"view", "reshape", "unflatten", "rearrange"}
LAST = (-1, 2)  # the axis of the channels
PARTS = (("q", "k", "v"), ("k", "v"))


def fused_order(site: Site) -> str | None:
    """Return the order of a fused projection's outputs, if its module's `fused_order`, structure or class shows it.

    Args:
        site: The site of the projection.

    Returns:
        "q k v" one after the other, "k v", "heads of q k v", "groups of q k v" (query heads, then the k and v that they
        share), "four of q v k" (four blocks, each with all three), "heads of k v" (of latent attention) or "heads of q
        gate"; None for any other layer.

    Raises:
        ValueError: The module's `fused_order` is none of these.
    """
    owner = site.module if isinstance(getattr(site.module, site.leaf, None), nn.Parameter) else site.parent
    if stated := getattr(owner, "fused_order", None):
        if stated not in ORDERS:
            raise ValueError(f"{site}: the fused_order of {type(owner).__name__} is {stated!r}, choose one of {ORDERS}")
        return str(stated)
    if site.leaf in OF_LATENTS and hasattr(owner, "qk_nope_head_dim") and hasattr(owner, "v_head_dim"):
        return "heads of k v"
    name = type(owner).__name__
    if name == "Attention" and "openai" in type(owner).__module__:
        name = "OpenAIGPTAttention"
    if not type(owner).__module__.startswith(("transformers.", "torch.")) and owner is not None:
        order = _order_by_code(owner, site.leaf)
        if order is not None or name in ("VisionAttention", "Attention"):
            return order or None
    order = next((o for pattern, leaf, o in FUSED_ORDERS if leaf == site.leaf and re.fullmatch(pattern, name)), None)
    if order == "q k v" and getattr(owner, "is_cross_attention", False):
        return "k v"
    if order is None or name not in ("GPTBigCodeAttention", "FalconAttention"):
        return order
    if getattr(owner, "new_decoder_architecture", False):
        return "groups of q k v"
    return "q k v" if getattr(owner, "multi_query", True) else "heads of q k v"


def _order_by_code(owner: nn.Module, leaf: str) -> str | None:
    """Return the order by the code that calls the projection: blocks one after the other, or heads that have all parts.

    "" is for parts in another order; None is where the code shows none.
    """
    flow = flow_of(owner, leaf)
    steps = [step for step in flow.steps if step.name in CUTS | SHAPES] if flow else []
    if flow is None or not steps:
        return None
    named = [tuple(str(projection(name))[-1:] for name in names) for names in flow.names if len(names) in (2, 3)]
    parts = named[0] if named else ()
    if parts not in PARTS:
        return "" if {*parts} in map(set, PARTS) else None
    chunks = _chunks(steps[0])
    if chunks and chunks != len(parts):  # beside queries of another layer
        parts = parts[-chunks:] if "q" not in leaf.lower() else ()
    blocks = _are_blocks(steps[0], len(parts)) if parts else None
    if blocks is None or (not blocks and len(parts) == 2):
        return None
    return " ".join(parts) if blocks else "heads of q k v"


def has_equal_parts(owner: nn.Module | None, leaf: str) -> bool:
    """Tell whether the code takes a fused projection apart into equal parts, so that k and v have all heads.

    Args:
        owner: The module whose code calls the projection.
        leaf: The projection's name.
    """
    flow = flow_of(owner, leaf) if owner is not None else None
    steps = [step for step in flow.steps if step.name in CUTS | SHAPES] if flow else []
    return bool(steps) and _chunks(steps[0]) is not None


def _chunks(step: Step) -> int | None:
    """Return the number of equal parts that a step makes; None where it is no such step."""
    return _number(step.argument(1, "chunks")) if step.name in ("chunk", "tensor_split") else None


def _are_blocks(step: Step, parts: int) -> bool | None:
    """Tell whether the first step takes the parts as blocks, or heads with all parts; None where it shows neither."""
    if step.name in CUTS:
        axis = _number(step.argument(2, "dim"))
        return True if axis in LAST else None
    if step.call is None:
        return None
    if step.name == "rearrange":
        return _in_pattern(step, parts)
    sizes = step.call.args[-1].elts if isinstance(step.call.args[-1], ast.Tuple | ast.List) else step.call.args
    places = [place for place, size in enumerate(sizes) if _number(size) == parts]
    if places:
        before, after = places[-1] + 2 * (step.name == "unflatten"), len(sizes) - places[-1] - 1
        if after == 1:  # one axis behind that of the parts: heads stand before it, or nothing but rows and tokens
            return False if before > 2 else True if step.name == "unflatten" else None
        return True if after else None
    multiple = any(_number(part) == parts for part in ast.walk(sizes[-1])) and isinstance(sizes[-1], ast.BinOp)
    return False if multiple else None


def _in_pattern(step: Step, parts: int) -> bool | None:
    """Read the order from an einops pattern, `b n (three h d) -> ...`, whose number of parts is a keyword."""
    pattern = _text(step.argument(1, "pattern"))
    axes = [word.arg for word in step.call.keywords if _number(word.value) == parts] if step.call is not None else []
    if pattern is None or "(" not in pattern.partition("->")[0] or len(axes) != 1:
        return None
    group = pattern.partition("(")[2].partition(")")[0].split()
    if axes[0] not in group or len(group) != 3:
        return None
    return {0: True, 1: False}.get(group.index(axes[0]))


def _number(value: ast.expr | ast.AST | None) -> int | None:
    """Return a whole number that stands in the code; None for anything else."""
    try:
        number = ast.literal_eval(value) if isinstance(value, ast.expr) else None
    except (ValueError, TypeError):
        return None
    return number if isinstance(number, int) else None


def _text(value: ast.expr | None) -> str | None:
    """Return a text that stands in the code; None for anything else."""
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None
