"""Modules that only wrap another one: their parts of a parameter's path say nothing about its role."""

from collections.abc import Mapping

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


def wrapping_parts(parts: list[str], modules: Mapping[str, nn.Module]) -> set[int]:
    """Return the places in a path whose part is what a wrapper calls the module in it, as a checkpoint's in a block's.

    Args:
        parts: The parts of the path.
        modules: The modules of the model by path.
    """
    return {k for k, part in enumerate(parts) if _wrapped(modules[".".join(parts[:k])]) == part}


def inner_module(module: nn.Module | None) -> nn.Module | None:
    """Return the module inside wrappers, whose attributes a model's own code sets.

    Args:
        module: A module, wrapped any number of times or not at all.

    Returns:
        The innermost module.
    """
    while module is not None and (name := _wrapped(module)):
        module = dict(module.named_children())[name]
    return module


def _wrapped(module: nn.Module) -> str | None:
    """Return the name of the one module in a wrapper, an adapter with its factors, what is called a layer; or None."""
    names = [name for name, _ in module.named_children()]
    if len(names) != 1:
        return None
    own = [name for name, _ in module.named_parameters(recurse=False)]
    adapts = bool(own) and all(name.startswith("lora") for name in own)
    called = type(module).__name__.endswith("Linear") and names == ["linear"]
    return names[0] if adapts or called or names[0] in TRANSPARENT else None


def inner_children(module: nn.Module) -> list[nn.Module]:
    """Return what stands in a module, without wrappers.

    Args:
        module: A module.
    """
    return [inner_module(child) or child for child in module.children()]


def by_unwrapped_path(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return modules by their paths, and what is in wrappers by the paths without them.

    Args:
        modules: The modules of the model by path.
    """
    paths = {path: path.split(".") for path in modules if path}
    clean = {path: wrapping_parts(parts, modules) for path, parts in paths.items()}
    inner = {path: [part for k, part in enumerate(paths[path]) if k not in inside] for path, inside in clean.items()}
    return {**modules, **{".".join(parts): modules[path] for path, parts in inner.items()}}
