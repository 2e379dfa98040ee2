"""In which order a projection fuses q, k and v, by how the code around it takes its outputs apart."""

import ast

from torch import nn

from symlm.roles.flow import Step, flow_of
from symlm.roles.recognizers.names import projection

CUTS = {"split", "chunk", "tensor_split"}
SHAPES = {"view", "reshape", "unflatten", "rearrange"}
LAST = (-1, 2)  # the axis of the channels
PARTS = {("q", "k", "v"): 3, ("k", "v"): 2}


def order_by_code(owner: nn.Module, leaf: str) -> str | None:
    """Return the order of a fused projection's outputs: blocks one after the other, or heads that have all parts.

    Args:
        owner: The module whose code calls the projection.
        leaf: The projection's name.

    Returns:
        "q k v", "k v" or "heads of q k v"; "" for parts in another order; None where the code shows none.
    """
    flow = flow_of(owner, leaf)
    steps = [step for step in flow.steps if step.name in CUTS | SHAPES] if flow else []
    if flow is None or not steps:
        return None
    named = (tuple(str(projection(name))[-1:] for name in names) for names in flow.names)
    parts = next((parts for parts in named if {*parts} in map(set, PARTS)), None)
    if parts is None or parts not in PARTS:
        return "" if parts else None
    blocks = _are_blocks(steps[0], PARTS[parts])
    if blocks is None or (not blocks and len(parts) == 2):
        return None
    return " ".join(parts) if blocks else "heads of q k v"


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
        return len(sizes) - places[-1] > 2 if len(sizes) - places[-1] > 1 else None
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
