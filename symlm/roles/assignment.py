"""The assignment of exactly one role to every trainable parameter, or an error that names the parameter."""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from symlm.roles.ends import EndMatrices
from symlm.roles.recognizers.attention import fuses_a_gate
from symlm.roles.recognizers.fused import ORDERS
from symlm.roles.recognizers.logits import HEADS
from symlm.roles.recognizers.names import is_fused
from symlm.roles.role import Role, Site
from symlm.roles.structure import classify
from symlm.roles.wrappers import unwrapped_path, wrapping_parts


class UnplacedParameters(ValueError):
    """Report trainable parameters that fit no role; the message names each, and how to assign one."""


def assign_roles(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, Role]:
    """Assign a role to every trainable parameter.

    Args:
        model: The model.
        roles: Ordered `{pattern: role}` that comes before the structure; a pattern is a shell glob over full names, and
            the first match wins.

    Returns:
        `{parameter name: Role}`; a tied parameter has one entry, under its first name.

    Raises:
        UnplacedParameters: Parameters fit no role; the message names each.
        TypeError: The model is no module.
        ValueError: An unknown role, a pattern that matches nothing, a tied parameter with two roles, a lazy parameter
            without a shape, or an embedding with sparse gradients.
    """
    return {site.name: role for site, role in place(model, roles)}


def place(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[tuple[Site, Role]]:
    """Assign a role to every trainable parameter, as `assign_roles`, and return the sites too.

    Args:
        model: The model.
        roles: Ordered `{pattern: role}`, see `assign_roles`.

    Returns:
        `(site, role)` of each trainable parameter, a tied one once, at its first site.

    Raises:
        UnplacedParameters: As `assign_roles`.
        TypeError: As `assign_roles`.
        ValueError: As `assign_roles`.
    """
    if roles is not None and not isinstance(roles, Mapping):
        raise ValueError(f"roles must be {{pattern: role}}, got {roles!r}")
    patterns = {pattern: _parse_role(role) for pattern, role in (roles or {}).items()}
    refuse_other_than_module(model)
    sites = list(_sites(model))
    ends = EndMatrices(model)
    placed: dict[int, tuple[Site, Role]] = {}
    unplaced, used = [], set()
    for site in sites:
        matches = [pattern for pattern in patterns if fnmatchcase(site.name, str(pattern))]
        used.update(matches)
        role = patterns[matches[0]] if matches else classify(site, ends)
        if role is None:
            unplaced.append(site)
            continue
        first, before = placed.setdefault(id(site.parameter), (site, role))
        if before is not role:
            raise ValueError(
                f"one tensor has two roles: {first} is {before}, {site} is {role}; untie it, or assign one role to "
                f"both names, e.g. roles={{{first.name!r}: 'matrix', {site.name!r}: 'matrix'}}"
            )
    unmatched = [pattern for pattern in patterns if pattern not in used]
    if unmatched:
        example = f"; names look like {sites[0].name!r}" if sites else ", and the model has no trainable one"
        raise ValueError(f"the patterns {unmatched} in roles match no trainable parameter{example}")
    if unplaced:
        raise UnplacedParameters(_report(unplaced, ends))
    return list(placed.values())


def refuse_other_than_module(model: object) -> None:
    """Refuse what is no model.

    Args:
        model: What may be one.

    Raises:
        TypeError: It is no module, as `model.parameters()` or a list of models.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is a torch.nn.Module, got {type(model).__name__}: join several by nn.ModuleList")


def refuse_without_weights(model: nn.Module) -> None:
    """Refuse a model on the meta device, which has no weights to initialize, and one whose weights are cut.

    Args:
        model: The model.

    Raises:
        ValueError: A parameter has a shape alone, or is sharded.
    """
    if empty := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"{empty[0]} is on the meta device: call model.to_empty(device=...), then initialize")
    if cut := [name for name, p in model.named_parameters() if hasattr(p, "placements")]:
        raise ValueError(f"{cut[0]} is sharded: initialize the model before it is sharded, and load the weights there")


def _report(unplaced: list[Site], ends: EndMatrices) -> str:
    """Return the error message: the remedy first, then the parameters, those that differ in numbers alone together."""
    groups: dict[str, list[Site]] = {}
    for site in unplaced:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", site.name), []).append(site)
    remedy = {pattern: _remedy(sites[0], ends) for pattern, sites in list(groups.items())[:LINES]}
    lines = [
        f"  {pattern} {list(sites[0].shape)} in {type(sites[0].module).__name__}"
        + (f", {len(sites)} times" if len(sites) > 1 else "")
        for pattern, sites in list(groups.items())[:LINES]
    ]
    more = [f"  and {len(groups) - LINES} more patterns"] if len(groups) > LINES else []
    return "\n".join(
        [
            f"{len(unplaced)} parameters fit no role. Assign roles by name or pattern where you know better, e.g. "
            f"roles={remedy}; 'vector' is elementwise AdamW, and the roles are {[str(role) for role in Role]}",
            *lines,
            *more,
            *([FUSED] if any(is_fused(site.leaf) for site in unplaced) else []),
        ]
    )


LINES = 12
FUSED = f"Of a fused projection, let its module state the order: self.fused_order = one of {ORDERS}."


def _remedy(site: Site, ends: EndMatrices) -> str:
    """Return the role that a person would most likely assign."""
    if site.leaf in HEADS and ends.vocabulary in site.shape[1:]:
        return "matrix"  # of [d, tokens]: rows are not tokens
    if site.leaf in HEADS or (ends.is_unclear(site) and not is_fused(site.leaf)):
        return "lm_head"
    if any(name in site.name for name in ("lora_A", "lora_B", "lora_a", "lora_b")):
        return "lora"
    if fuses_a_gate(site):
        return "attention_q"  # whose heads are matrices: of queries or of gates, in either order
    if is_fused(site.leaf):
        return "attention_qkv"
    if any(name in site.name.lower() for name in ("trainable_tokens", "oft_", ".hada_", ".lokr_")):
        return "vector"
    return "matrix" if len(site.shape) in (2, 3) and 1 not in site.shape[-2:] else "vector"


def _parse_role(role: str) -> Role:
    """Return the role of that name, or raise ValueError with the names."""
    try:
        return Role(role)
    except ValueError:
        raise ValueError(f"unknown role {role!r}; choose one of {[str(role) for role in Role]}") from None


def _sites(model: nn.Module) -> Iterator[Site]:
    """Yield every site of every trainable parameter, of a tied one more than once."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        parts = unwrapped_path(path.split(".")) if path else []
        if len(parts) > 1 and parts[-1].isdigit() and parts[-2] in IN_A_LIST:
            parts = parts[:-1]
        inside = wrapping_parts(parts, modules)
        places = [k for k in range(len(parts) - 1, -1, -1) if k not in inside] if path else []
        above = tuple(modules[".".join(parts[:k])] for k in places)
        owner = modules[".".join(parts)] if isinstance(module, ParametrizationList) else module
        parts = [part for k, part in enumerate(parts) if k not in inside]
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and not is_quantized(parameter):
                name = f"{path}.{key}" if path else key
                if is_lazy(parameter):
                    raise ValueError(f"{name} has no shape yet: run a forward pass, then build the optimizer")
                yield Site(name, parameter, owner, above, tuple(parts))


IN_A_LIST = ("to_out",)  # a projection that stands first in a list, its dropout behind it


def is_quantized(p: nn.Parameter) -> bool:
    """Tell whether a parameter is a quantized weight, which no gradient moves though it may ask for one.

    Args:
        p: The parameter.
    """
    return type(p).__module__.partition(".")[0] in ("optimum", "quanto") or type(p.data).__module__.startswith(
        ("optimum.quanto", "quanto.")
    )
