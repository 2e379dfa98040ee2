"""A saved state is matched to an optimizer's parameters by name; where it differs, it is refused before any change."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from symlm.polar.precision import accumulation_dtype
from symlm.routing.options import DEFAULTS, ROUTED, check_group, named_parameters
from symlm.routing.values import COUNTS, check_values
from symlm.rules import get_rule
from symlm.state.checks import flaw_of
from symlm.state.creation import stored_keys
from symlm.state.names import Place, names_of, places_of, some

FORMAT = 1  # of what state_dict() returns; a state without a number is of before there was one
# What decides how a state is stored and what it means. Rates, means and how a polar factor is computed differ freely.
HOW_A_RULE_STORES = ("rule", "view", "outputs")
HOW_A_STEP_IS_MADE = ("scale", "constraint", "nesterov", "momentum_of", "momentum_dtype", "rounding", "rotation")
DECIDING = ("role", *HOW_A_RULE_STORES, *HOW_A_STEP_IS_MADE)

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
        ValueError: The state is of another optimizer, a newer format, other parameters, another table, other shapes, or
            incomplete.
    """
    result: State = {"state": {}, "param_groups": []}
    for (theirs, order), ours in zip(_pairs(_groups_in(state_dict), groups), groups, strict=True):
        first = sum(len(group["params"]) for group in result["param_groups"])
        indices = [theirs["params"][k] for k in order]
        for number, (index, (name, p)) in enumerate(zip(indices, named_parameters(ours), strict=True), start=first):
            if index in state_dict["state"]:
                result["state"][number] = _completed({**DEFAULTS, **theirs}, name, p, state_dict["state"][index])
        options: State = {**DEFAULTS, **theirs}
        options.pop("param_names", None)
        own_names: State = {key: ours[key] for key in ("param_names", "name") if key in ours}
        check_group({**options, "params": [], "param_names": []})
        numbers = list(range(first, first + len(indices)))
        result["param_groups"].append({**options, **own_names, "params": numbers})
    return {**state_dict, **result}


def fitting(state_dict: State, groups: Sequence[State]) -> State:
    """Return what a saved state has for an optimizer of another table or of other parameters, and warn of the rest.

    A mean is taken where it is of the same, gradients or directions, and of the parameter's shape; what a rule stores,
    where the rule, its view and its rotation are the same. Groups stay as they are, and count on.

    Args:
        state_dict: As `SymOptimizer.state_dict` gives it.
        groups: The optimizer's parameter groups.

    Returns:
        A state dict that `torch.optim.Optimizer.load_state_dict` takes, without what begins anew.

    Raises:
        ValueError: The state is of another optimizer, or of a newer format.
    """
    saved = _groups_in(state_dict)
    places, extra = places_of(saved, groups)
    result: State = {"state": {}, "param_groups": []}
    lost = Counter(f"{name}, which this optimizer does not have" for name in extra)
    number = 0
    for ours, row in zip(groups, places, strict=True):
        counted = {"step": max((theirs.get("step", 0) for theirs, _ in filter(None, row)), default=0)}
        numbers = list(range(number, number + len(ours["params"])))
        result["param_groups"].append({**ours, **counted, "params": numbers})
        for place, (name, p) in zip_longest(row[: len(numbers)], named_parameters(ours)):
            before, taken = _taken(place, ours, name, p, state_dict["state"])
            result["state"] |= {number: taken} if taken else {}
            left = ", ".join(sorted(before.keys() - taken.keys()))
            lost.update([f"{left} of {ours['role']}"] if left else [] if place else [f"{name}, which it does not have"])
            number += 1
    if lost:
        lines = [f"{line} ({count} parameters)" if count > 1 else line for line, count in lost.items()]
        warnings.warn(f"not taken from the state, and begun anew: {'; '.join(lines)}", stacklevel=5)
    return {**state_dict, **result}


def restore_dtypes(state: Mapping[Tensor, State], saved: Mapping[int, State], groups: Sequence[State]) -> None:
    """Undo torch's cast of a loaded state to its parameter's dtype: a bf16 parameter's momentum stays fp32.

    Between a float64 parameter and others it is cast: the one computes in float64, the others in fp32.

    Args:
        state: The optimizer's state after torch loaded it; changed in place.
        saved: The state by index that was loaded.
        groups: The optimizer's parameter groups.
    """
    parameters = (p for group in groups for p in group["params"])
    for index, p in enumerate(parameters):
        for key, value in saved.get(index, {}).items():
            loaded = state[p][key]
            if not isinstance(value, Tensor):
                continue
            dtype = _dtype_beside(p, key, value)
            if dtype != loaded.dtype or loaded.device != p.device:
                state[p][key] = value.to(device=p.device, dtype=dtype, copy=True)


def _dtype_beside(p: Tensor, key: str, value: Tensor) -> torch.dtype:
    """Return the dtype in which a saved tensor is loaded beside a parameter."""
    if key == "step" or not value.is_floating_point() or torch.float64 not in (p.dtype, value.dtype):
        return value.dtype
    return accumulation_dtype(p.dtype)


def refuse_other_than_mapping(state_dict: Any) -> None:
    """Refuse what is no state at all.

    Args:
        state_dict: What may be the state of a SymOptimizer.

    Raises:
        ValueError: It is no mapping.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError("this is not the state of a SymOptimizer: it has no 'state' and 'param_groups'")


def _groups_in(state_dict: State) -> list[State]:
    """Return the groups of a saved state.  Raises: ValueError for another optimizer's, or a format from the future."""
    if not ({"state", "param_groups"} <= set(state_dict) and _is_one(state_dict)):
        raise ValueError("this is not the state of a SymOptimizer: it has no 'state' and 'param_groups'")
    if (version := state_dict.get("format", FORMAT)) not in range(1, FORMAT + 1):
        raise ValueError(
            f"the state has format {version!r}, and this symlm reads formats up to {FORMAT}: load it with the version "
            "of symlm that saved it, or a newer one"
        )
    for group in state_dict["param_groups"]:
        if missing := [key for key in (*ROUTED, "params") if key not in group]:
            raise ValueError(f"this is not the state of a SymOptimizer: a group of it has no {missing[0]!r}")
        check_values(f"group {group['role']} of the state", {key: group[key] for key in COUNTS if key in group})
        if lists := [key for key in ("params", "param_names") if not isinstance(group.get(key, []), list | tuple)]:
            raise ValueError(f"group {group['role']} of the state: {lists[0]} must be a list, got {group[lists[0]]!r}")
    return state_dict["param_groups"]


def _is_one(state_dict: State) -> bool:
    """Return whether states and groups are mappings, in the containers that a state has."""
    states, groups = state_dict["state"], state_dict["param_groups"]
    parts = [*states.values(), *groups] if isinstance(states, Mapping) and isinstance(groups, list | tuple) else [None]
    return all(isinstance(part, Mapping) for part in parts)


def _pairs(saved: Sequence[State], groups: Sequence[State]) -> list[tuple[State, list[int]]]:
    """Return for each of our groups the saved one, and where in it each of our parameters is."""
    places, extra = places_of(saved, groups)
    known = [[place for place in row if place] for row in places]
    if extra or any(None in row for row in places):
        pairs_of_names = (zip(names_of(group), row, strict=True) for group, row in zip(groups, places, strict=True))
        missing = sorted(name for row in pairs_of_names for name, place in row if place is None)
        raise ValueError(
            "the state has other parameters than this optimizer: "
            f"it lacks {some(missing)} and has {some(extra)} besides; load it into the model that it was saved with"
        )
    pairs = []
    for ours, row in zip(groups, known, strict=True):
        holders = list({id(theirs): theirs for theirs, _ in row}.values()) or [ours]
        for theirs in holders:
            _check_table(theirs, ours)
        if len(holders) > 1 or len(holders[0]["params"]) != len(row):
            raise ValueError(f"the state has the parameters of group {ours['role']} in other groups: use its preset")
        pairs.append((holders[0], [place for _, place in row]))
    return pairs


def _check_table(theirs: State, ours: State) -> None:
    """Raises: ValueError with all that makes a saved group another than ours."""
    saved = {key: theirs.get(key, DEFAULTS.get(key)) for key in DECIDING}
    if changed := [key for key in DECIDING if saved[key] != ours[key]]:
        before, now = (", ".join(f"{key} {group[key]!r}" for key in changed) for group in (saved, ours))
        raise ValueError(
            f"the state was saved with {before} for {ours['role']}, this optimizer has {now}: build it with the "
            "preset, overrides, roles and options of the run that saved the state, or take what fits by strict=False"
        )


def _taken(place: Place | None, ours: State, name: str, p: Tensor, states: Mapping[Any, State]) -> tuple[State, State]:
    """Return one parameter's saved state, and what of it means the same in our group."""
    if place is None:
        return {}, {}
    theirs, k = place
    state = _with_count(states.get(theirs["params"][k], {}))
    stores = HOW_A_RULE_STORES + (("rotation",) if get_rule(ours["rule"]).pull else ())
    same = all(theirs.get(key, DEFAULTS.get(key)) == ours[key] for key in stores)
    wanted = stored_keys(ours) if same or get_rule(ours["rule"]).elementwise else {"momentum"}
    of_its_kind = theirs.get("momentum_of", DEFAULTS["momentum_of"]) == ours["momentum_of"]
    besides = {"compensation"} if ours["rounding"] == "compensated" else set()
    taken = {key: state[key] for key in (wanted | besides) & state.keys()}
    M, dtype = taken.get("momentum"), getattr(torch, ours["momentum_dtype"])
    if isinstance(M, Tensor) and accumulation_dtype(p.dtype) == torch.float32:
        taken["momentum"] = M.to(dtype) if M.is_floating_point() and dtype.is_floating_point else M
    return state, (taken if of_its_kind and not flaw_of(ours, name, p, taken, wanted) else {})


def _completed(group: State, name: str, p: Tensor, state: State) -> State:
    """Return one parameter's saved state with its count of steps as a tensor.

    Raises: ValueError for a state from which no step can go on.
    """
    state = _with_count(state)
    if flaw := flaw_of(group, name, p, state, stored_keys(group)):
        raise ValueError(f"the state of {name} ({group['role']}, {group['rule']}) {flaw}")
    return state


def _with_count(state: State) -> State:
    """Return a parameter's state with its count of steps as a tensor, which others store as a number."""
    step = state.get("step")
    return (
        {**state, "step": torch.tensor(float(step), dtype=torch.float32)}
        if isinstance(step, int | float)
        else {**state}
    )
