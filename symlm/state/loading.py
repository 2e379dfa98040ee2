"""A saved state is matched to an optimizer's parameters by name; where it differs, it is refused before any change."""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from symlm.routing.options import DEFAULTS, ROUTED, check_group, named_parameters
from symlm.state.creation import stored_keys

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

State = dict[str, Any]


def matched(state_dict: State, groups: Sequence[State]) -> State:
    """Return a saved state in the order of an optimizer's own groups and parameters.

    Groups are matched by their parameters' names, in which wrappers' prefixes (`module.`, `_orig_mod.`) and one common
    prefix may differ. Options are the saved ones, names stay the optimizer's own.

    Args:
        state_dict: As `SymOptimizer.state_dict` gives it.
        groups: The optimizer's parameter groups.

    Returns:
        A state dict that `torch.optim.Optimizer.load_state_dict` takes. The argument is not changed.

    Raises:
        ValueError: The state is of another optimizer, of other parameters, rules, views or shapes, or incomplete.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("this is not the state of a SymOptimizer: it has no 'state' and 'param_groups'")
    saved = state_dict["param_groups"]
    for group in saved:
        if missing := [key for key in (*ROUTED, "params") if key not in group]:
            raise ValueError(f"this is not the state of a SymOptimizer: a group of it has no {missing[0]!r}")
    pairs = [(theirs, order) for theirs, order in _pairs(saved, groups)]
    result: State = {"state": {}, "param_groups": []}
    for (theirs, order), ours in zip(pairs, groups, strict=True):
        _check_route(theirs, ours)
        first = sum(len(group["params"]) for group in result["param_groups"])
        indices = [theirs["params"][k] for k in order]
        for number, (index, (name, p)) in enumerate(zip(indices, named_parameters(ours), strict=True), start=first):
            if index in state_dict["state"]:
                result["state"][number] = _completed(theirs, name, p, state_dict["state"][index])
        options: State = {**DEFAULTS, **theirs}
        options.pop("param_names", None)
        own_names: State = {key: ours[key] for key in ("param_names", "name") if key in ours}
        check_group({**options, "params": [], "param_names": []})
        numbers = list(range(first, first + len(indices)))
        result["param_groups"].append({**options, **own_names, "params": numbers})
    complete = dict(state_dict)
    complete.update(result)
    return complete


def restore_dtypes(state: Mapping[Tensor, State], saved: Mapping[int, State], groups: Sequence[State]) -> None:
    """Undo torch's cast of a loaded state to its parameter's dtype: a bf16 parameter's momentum stays fp32.

    Args:
        state: The optimizer's state after torch loaded it; changed in place.
        saved: The state by index that was loaded.
        groups: The optimizer's parameter groups.
    """
    parameters = (p for group in groups for p in group["params"])
    for index, p in enumerate(parameters):
        for key, value in saved.get(index, {}).items():
            loaded = state[p][key]
            if isinstance(value, Tensor) and (value.dtype != loaded.dtype or loaded.device != p.device):
                state[p][key] = value.to(device=p.device, copy=True)


def _pairs(saved: Sequence[State], groups: Sequence[State]) -> list[tuple[State, list[int]]]:
    """Return for each of our groups the saved one, and where in it each of our parameters is."""
    ours, theirs = ([_names(group) for group in some] for some in (groups, saved))
    if ours == theirs:  # also of groups without names, as long as both have none
        return [(group, list(range(len(group["params"])))) for group in saved]
    flat_ours, flat_theirs = ([name for names in some for name in names] for some in (ours, theirs))
    translate = _translation(flat_theirs, flat_ours)
    where = {translate(name): (k, place) for k, names in enumerate(theirs) for place, name in enumerate(names)}
    if set(where) != set(flat_ours) or len(flat_ours) != len(flat_theirs):
        missing, extra = sorted(set(flat_ours) - set(where)), sorted(set(where) - set(flat_ours))
        raise ValueError(
            "the state has other parameters than this optimizer: "
            f"it lacks {_some(missing)} and has {_some(extra)} besides; load it into the model that it was saved with"
        )
    result = []
    for names, group in zip(ours, groups, strict=True):
        holders = {where[name][0] for name in names}
        if len(holders) != 1 or len(theirs[next(iter(holders))]) != len(names):
            raise ValueError(f"the state has the parameters of group {group['role']} in other groups: use its preset")
        result.append((saved[holders.pop()], [where[name][1] for name in names]))
    return result


def _names(group: State) -> list[str]:
    """Return a group's parameter names; places where it has none.

    torch.distributed.checkpoint writes names in the place of indices, and these are those of the parameters' order.
    """
    if group["params"] and all(isinstance(p, str) for p in group["params"]):
        return list(group["params"])
    return list(group.get("param_names", ())) or [f"{group['role']}[{k}]" for k in range(len(group["params"]))]


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


def _check_route(theirs: State, ours: State) -> None:
    for key in ("rule", "view", "scale", "constraint", "role"):
        if (saved := theirs.get(key, DEFAULTS.get(key))) != ours[key]:
            raise ValueError(
                f"the state was saved with {key} {saved!r} for {ours['role']}, this optimizer has {ours[key]!r}: "
                "build it with the preset, overrides and roles of the run that saved the state"
            )


def _completed(group: State, name: str, p: Tensor, state: State) -> State:
    """Return one parameter's saved state with its count of steps as a tensor.

    Raises: ValueError for a state of another shape, or without what the rule stores.
    """
    tensors = {key for key, value in state.items() if isinstance(value, Tensor)}
    known = tensors | ({"step"} if isinstance(state.get("step"), int | float) else set())
    if missing := sorted(stored_keys(group) - known):
        raise ValueError(
            f"the state of {name} ({group['role']}, {group['rule']}) lacks {missing}: it is incomplete, save it anew"
        )
    for key in ("momentum", "exp_avg", "exp_avg_sq"):
        if key in state and state[key].shape != p.shape:
            raise ValueError(f"{name}: its saved {key} is {list(state[key].shape)}, the parameter is {list(p.shape)}")
    step = state.get("step")
    if step is None or isinstance(step, Tensor):
        return dict(state)
    return {**state, "step": torch.tensor(float(step), dtype=torch.float32)}


def _some(names: Sequence[str]) -> str:
    return "nothing" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
