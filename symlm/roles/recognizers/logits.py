"""Whether a loss ignores a shift of all logits, which a softmax does, and a sigmoid or a capped head does not."""

from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

from symlm.roles.role import Site

HEADS = (
    *("lm_head", "output", "embed_out", "output_projection", "unembed", "head", "score", "classifier"),
    *("to_logits", "logits", "unembedding", "vocab_proj"),
)
NOT_INVARIANT = ("PhimoeTopKRouter",)  # thresholds are relative to the largest logit's size


def ignores_a_shift(site: Site) -> bool:
    """Tell whether a router's logits go through a softmax alone, by what the code of its class and its parent calls.

    Where both functions are called, the config says which.

    Args:
        site: The site of a router.
    """
    if type(site.module).__name__ in NOT_INVARIANT or "noise" in site.leaf:
        return False
    for module in (site.module, *site.ancestors[:2]):
        scoring = [type(child).__name__.lower() for name, child in module.named_children() if name.startswith("scor")]
        if scoring:
            return "softmax" in scoring[0]
        called = functions_called(type(module)) & {"softmax", "sigmoid"}
        if len(called) == 2:
            return not any("sigmoid" in value for value in _texts(module))
        if called:
            return called == {"softmax"}
    return True


def caps_logits(module: nn.Module) -> bool | None:
    """Tell whether a model passes its logits through a tanh, by its config or by its code; None where it shows neither.

    Args:
        module: A module around a head.
    """
    config: Any = getattr(module, "config", None)
    for one in (config, getattr(config, "text_config", None)):
        caps = [name for name in vars(one or object) if "cap" in name and "logit" in name and "attn" not in name]
        if caps:
            return any(bool(getattr(one, name)) for name in caps)
    return True if "tanh" in functions_called(type(module)) else None


def functions_called(kind: type) -> set[str]:
    """Return the names that the methods of a class call or read, without those of other classes.

    Args:
        kind: A class.
    """
    if kind.__module__.startswith("torch."):
        return set()
    methods = (getattr(value, "__wrapped__", value) for value in vars(kind).values())
    codes = (method.__code__ for method in methods if isinstance(method, FunctionType))
    return {name for code in codes for name in code.co_names}


def _texts(module: nn.Module) -> Iterator[str]:
    """Yield the text options of a module and of its config, where a scoring function may be named."""
    for owner in (module, getattr(module, "config", None)):
        yield from (value for value in vars(owner or object).values() if isinstance(value, str))
