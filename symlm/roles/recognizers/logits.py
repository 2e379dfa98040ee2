"""Whether a loss ignores a shift of all logits, which a softmax does, and a sigmoid or a capped head does not."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from symlm.roles.code import functions_called
from symlm.roles.role import Site
from symlm.roles.storage import whole_shape

HEADS = (
    *("lm_head", "output", "embed_out", "output_projection", "unembed", "head", "score", "classifier"),
    *("seq_relationship",),
    *("to_logits", "logits", "unembedding", "vocab_proj"),
)
CAPS = re.compile(r"soft_?cap|cap_logits|clamp_logits", re.IGNORECASE)
OTHER_SCORES = {"relu", "softplus", "tanh", "exp", "elu"}  # of routers without a softmax or a sigmoid
NOT_INVARIANT = ("PhimoeTopKRouter",)  # thresholds are relative to the largest logit's size


def ignores_a_shift(site: Site) -> bool:
    """Tell whether a router's logits go through a softmax alone, by what the code of its class and its parent calls.

    Where both functions are called, the config says which.

    Args:
        site: The site of a router.
    """
    if type(site.module).__name__ in NOT_INVARIANT or "noise" in site.leaf:
        return False
    around = (site.module, *site.ancestors[:2])
    if any(map(normalizes, around[:2])):
        return False
    for module in around:
        scoring = [type(child).__name__.lower() for name, child in module.named_children() if name.startswith("scor")]
        if scoring:
            return "softmax" in scoring[0]
        called = {score for name in _functions(module) for score in ("softmax", "sigmoid") if score in name}
        if len(called) == 2:
            return not any("sigmoid" in value for value in _texts(module))
        if called:
            return called == {"softmax"}
    return not any(_functions(module) & OTHER_SCORES for module in around)


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
    called = functions_called(type(module))
    return True if called & {"tanh", "sigmoid"} or any(CAPS.search(name) for name in called) else None


def normalizes(module: nn.Module) -> bool:
    """Tell whether the code of a module normalizes vectors, those of its weights it may be, or takes cosines.

    Args:
        module: The module that holds a head or a router.
    """
    return bool(functions_called(type(module)) & {"normalize", "cosine_similarity"})


def scales_rows(owner: nn.Module, rows: int) -> bool:
    """Tell whether a module has a factor for each token, which makes the logits feel a shift of all rows.

    Args:
        owner: A module around a head.
        rows: The number of tokens.
    """
    vectors = [name for name, p in owner.named_parameters(recurse=False) if whole_shape(p) == (rows,)]
    return not isinstance(owner, nn.Linear) and any("bias" not in name for name in vectors)


def is_called_head(name: str) -> bool:
    """Tell whether a name is one of a head, where the shape says the same.

    Args:
        name: The name of a layer.
    """
    return name in HEADS or name.endswith("_head")


def _functions(module: nn.Module) -> frozenset[str]:
    """Return what the code of a module calls, and the activations that stand in it, by their names in small letters."""
    children = {type(child) for child in module.children()}
    acts = {kind.__name__.lower() for kind in children if kind.__module__ == "torch.nn.modules.activation"}
    return functions_called(type(module)) | acts


def _texts(module: nn.Module) -> Iterator[str]:
    """Yield the text options of a module and of its config, where a scoring function may be named."""
    for owner in (module, getattr(module, "config", None)):
        yield from (value for value in vars(owner or object).values() if isinstance(value, str))
