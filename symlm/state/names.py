"""The parameters of a saved state by their names, in which wrappers' prefixes and one common prefix may differ."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

Group = dict[str, Any]
Place = tuple[Group, int]


def places_of(saved: Sequence[Group], groups: Sequence[Group]) -> tuple[list[list[Place | None]], list[str]]:
    """Find every parameter of an optimizer in a saved state.

    Args:
        saved: The saved parameter groups.
        groups: The optimizer's.

    Returns:
        For each of the optimizer's groups the saved group of every parameter and the place in it, None for a parameter
        that the state lacks; and the names that the state has besides.
    """
    ours, theirs = ([names_of(group) for group in some] for some in (groups, saved))
    if ours == theirs:  # also of groups without names, as long as both have none
        return [[(group, place) for place in range(len(group["params"]))] for group in saved], []
    flat_ours, flat_theirs = ([name for names in some for name in names] for some in (ours, theirs))
    translate = _translation(flat_theirs, flat_ours)
    where: dict[str, Place] = {}
    for group, names in zip(saved, theirs, strict=True):
        where |= {translate(name): (group, place) for place, name in enumerate(names)}
    return [[where.get(name) for name in names] for names in ours], sorted(set(where) - set(flat_ours))


def names_of(group: Group) -> list[str]:
    """Return a group's parameter names; places where it has none.

    torch.distributed.checkpoint writes names in the place of indices, and these are those of the parameters' order.

    Args:
        group: A parameter group, of an optimizer or of a saved state.
    """
    if group["params"] and all(isinstance(p, str) for p in group["params"]):
        return list(group["params"])
    return list(group.get("param_names", ())) or [f"{group['role']}[{k}]" for k in range(len(group["params"]))]


def some(names: Sequence[str]) -> str:
    """Return the first of many names as text.

    Args:
        names: The names.
    """
    return "nothing" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "") if name.startswith(wrapper) or f".{wrapper}" in name else name
    return name


def _translation(theirs: Sequence[str], ours: Sequence[str]) -> Callable[[str], str]:
    """Return what maps their names to ours: nothing, without wrappers, or with one common prefix for another."""
    if set(theirs) == set(ours):
        return str
    for change in (_unwrapped, str):
        plain, target = [change(name) for name in theirs], [change(name) for name in ours]
        back = dict(zip(target, ours, strict=True))
        if len(back) < len(ours) or len(set(plain)) < len(theirs):
            continue  # two parameters would share a name
        for a, b in (("", ""), (_common_prefix(plain), _common_prefix(target))):
            if {b + name.removeprefix(a) for name in plain} == set(target):
                names = {name: back[b + change(name).removeprefix(a)] for name in theirs}
                return names.__getitem__
    return str


def _common_prefix(names: Sequence[str]) -> str:
    """Return the modules that all names begin with, and a dot; nothing for no names."""
    paths = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)
