"""Whether a loss ignores a shift of all logits, which a softmax does, and a sigmoid or a capped head does not."""

import ast
import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from torch import nn

from symlm.roles.recognizers.layers import shape_of
from symlm.roles.role import Site
from symlm.roles.source.calls import functions_called
from symlm.roles.source.flow import Step, flow_of
from symlm.roles.storage import whole_shape

HEADS = (
    *("lm_head", "output", "embed_out", "output_projection", "unembed", "head", "score", "classifier"),
    *("seq_relationship", "output_layer"),
    *("to_logits", "logits", "unembedding", "vocab_proj"),
)
CAPS = re.compile(r"soft_?cap|cap_logits|clamp_logits", re.IGNORECASE)
FEELS = {
    "clamp",
    "clamp_",
    "clamp_min",
    "clamp_max",
    "clip",
    "clip_",
    "normalize",
    "rms_norm",
    "rmsnorm",
    "rsqrt",
    "relu",
}
FEELS |= {"tanh", "sigmoid", "softsign", "logsumexp"}  # what a shift of all logits changes
FLATTENS = {"view", "reshape", "flatten", "rearrange"}
OTHER_SCORES = {"relu", "softplus", "tanh", "exp", "elu"}  # of routers without a softmax or a sigmoid
OTHER_LOSS = re.compile(r"mse_?loss|l1_?loss|huber_?loss|binary_cross_entropy|BCE|logsigmoid|nll_gauss", re.IGNORECASE)
SOFTMAX = re.compile(r"cross_?entropy(?!_with_logits)|softmax|nll_?loss|loss_function", re.IGNORECASE)
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
    if any("sigmoid" in text for module in around for name, text in _texts(module) if "scor" in name):
        return False
    if (feels := _feels_a_shift(site)) is not None:
        return not feels
    for module in around:
        scoring = [type(child).__name__.lower() for name, child in module.named_children() if name.startswith("scor")]
        if scoring:
            return "softmax" in scoring[0]
        called = {score for name in _functions(module) for score in ("softmax", "sigmoid") if score in name}
        if len(called) == 2:
            said = {score for _, value in _texts(module) for score in called if score in value}
            return said == {"softmax"}
        if called:
            return called == {"softmax"}
    return not any(_functions(module) & OTHER_SCORES for module in around)


def caps_logits(module: nn.Module, leaf: str) -> bool | None:
    """Tell whether a model passes its logits through a tanh, by its config or by its code; None where it shows neither.

    Args:
        module: A module around a head.
        leaf: The name of the head, or of what is around it, in the module.
    """
    config: Any = getattr(module, "config", None)
    for one in (config, getattr(config, "text_config", None)):
        caps = [name for name in _settings(one) if "cap" in name and "logit" in name and "attn" not in name]
        if caps:
            return any(bool(_settings(one)[name]) for name in caps)
    from_transformers = type(module).__module__.startswith("transformers.")  # whose configs weigh a z-loss, or none
    not_here = {"logsumexp"} if from_transformers else set()
    if flow := flow_of(module, leaf):
        called, feels = frozenset(step.name for step in flow.steps), FEELS - not_here
    else:
        called, feels = functions_called(type(module)), {"tanh", "sigmoid", "logsumexp"} - not_here
    return True if called & feels or any(CAPS.search(name) for name in called) else None


def normalizes(module: nn.Module) -> bool:
    """Tell whether the code of a module normalizes vectors, those of its weights it may be, or takes cosines.

    Args:
        module: The module that holds a head or a router.
    """
    return bool(functions_called(type(module)) & {"normalize", "cosine_similarity"})


def has_other_loss(module: nn.Module) -> bool:
    """Tell whether a module's code, or a loss in it, compares outputs without a softmax: distances, single classes.

    Args:
        module: A module around a layer with the name of a head.
    """
    called = functions_called(type(module)) | {type(child).__name__ for child in module.children()}
    return any(OTHER_LOSS.search(name) for name in called) and not any(SOFTMAX.search(name) for name in called)


def is_adaptive(site: Site) -> bool:
    """Tell whether a layer makes the logits of torch's adaptive softmax: its head, or the last of a cluster's two.

    Args:
        site: The site of a dense layer.
    """
    kinds = [isinstance(module, nn.AdaptiveLogSoftmaxWithLoss) for module in site.ancestors[:3]]
    last = [*site.parent.children()][-1] if isinstance(site.parent, nn.Sequential) else None
    return any(kinds) and len(site.shape) == 2 and (kinds[0] or last is site.module)


def scales_rows(owner: nn.Module, rows: int) -> bool:
    """Tell whether a module has a factor for each token, which makes the logits feel a shift of all rows.

    Args:
        owner: A module around a head.
        rows: The number of tokens.
    """
    own = {name: whole_shape(p) for name, p in owner.named_parameters(recurse=False)}
    vectors = [name for name, shape in own.items() if rows in shape and prod(shape) == rows]
    return not isinstance(owner, nn.Linear) and any("bias" not in name for name in vectors)


def is_called_head(name: str) -> bool:
    """Tell whether a name is one of a head, where the shape says the same.

    Args:
        name: The name of a layer.
    """
    return name in HEADS or name.endswith("_head")


def _feels_a_shift(site: Site) -> bool | None:
    """Tell whether the code around a router does to its logits what a shift of them changes, up to their softmax.

    Or the softmax is over the tokens, as where experts choose them. None is where the code shows no softmax alone.
    """
    places = zip((site.leaf, *site.path[::-1]), (site.module, *site.ancestors[:2]), strict=False)
    scores: set[str] = set()
    for leaf, module in places:
        steps = flow.steps if (flow := flow_of(module, leaf)) else ()
        scores |= {step.name for step in steps} & {"softmax", "sigmoid"}
        last = max((place for place, step in enumerate(steps) if step.name == "softmax"), default=-1)
        chosen = any(step.name == "topk" for step in steps[:last])  # among experts, whose scores the softmax is of
        if any(_changes(step, module, shape_of(site.module)[1], chosen) for step in steps[: last + 1]):
            return True
    return False if scores == {"softmax"} else None


def _changes(step: Step, module: nn.Module, experts: int, chosen: bool) -> bool:
    """Tell whether a shift of all logits changes what a step makes of them."""
    factors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    factor = factors.get(step.by) if isinstance(step.by, str) else None
    by_expert = factor is not None and whole_shape(factor)[-1:] == (experts,)
    flat = chosen or bool(functions_called(type(module)) & FLATTENS)
    return step.name in FEELS or by_expert or (step.name == "softmax" and _is_over_tokens(step, flat))


def _is_over_tokens(softmax: Step, flat: bool) -> bool:
    """Tell whether a softmax is not over the last axis, of logits with an axis of tokens or with more."""
    value = softmax.argument(1, "dim")
    try:
        axis = softmax.by.dim if isinstance(softmax.by, nn.Softmax) else value and ast.literal_eval(value)
    except ValueError:
        return False
    return axis in (0, -2) or (axis == 1 and not flat)


def _functions(module: nn.Module) -> frozenset[str]:
    """Return what the code of a module calls, and the activations that stand in it, by their names in small letters."""
    children = {type(child) for child in module.children()}
    acts = {kind.__name__.lower() for kind in children if kind.__module__ == "torch.nn.modules.activation"}
    return functions_called(type(module)) | acts


def _texts(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the text options of a module and of its config by name, where a scoring function may be named."""
    for owner in (module, *(getattr(module, name, None) for name in ("config", "args", "cfg"))):
        yield from ((str(name), value) for name, value in _settings(owner).items() if isinstance(value, str))


def _settings(owner: Any) -> Mapping[str, Any]:
    """Return the attributes of a config or its entries, of whatever kind it is."""
    return owner if isinstance(owner, Mapping) else getattr(owner, "__dict__", {})
