"""Modules that only wrap another one: their parts of a parameter's path say nothing about its role."""

from torch import nn

TRANSPARENT = {
    "module",  # DataParallel, DDP
    "_orig_mod",  # torch.compile
    "_checkpoint_wrapped_module",  # checkpoint_wrapper
    "_fsdp_wrapped_module",
    "base_layer",  # PEFT's adapters
    "original_module",  # PEFT's modules_to_save, the frozen original
}
NAMED = {"modules_to_save", "parametrizations"}  # the next part is the name of an adapter or of a tensor


def unwrapped_path(parts: list[str]) -> list[str]:
    """Return the path of a module without the wrappers at its end.

    Args:
        parts: The parts of the path, as `"layers.0.q_proj.modules_to_save.default".split(".")`.

    Returns:
        The path of the outermost wrapper, whose last part names the module.
    """
    while True:
        if len(parts) > 1 and parts[-2] in NAMED:
            parts = parts[:-2]
        elif len(parts) > 1 and parts[-1] in TRANSPARENT:
            parts = parts[:-1]
        else:
            return parts


def inner_module(module: nn.Module | None) -> nn.Module | None:
    """Return the module inside wrappers, whose attributes a model's own code sets.

    Args:
        module: A module, wrapped any number of times or not at all.

    Returns:
        The innermost module.
    """
    while module is not None:
        children = dict(module.named_children())
        inner = next((children[name] for name in TRANSPARENT if name in children and len(children) == 1), None)
        if inner is None:
            return module
        module = inner
    return None
