"""The assignment of exactly one role to every trainable parameter, or an error that names the parameter."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn

from symlm.roles.ends import EndMatrices
from symlm.roles.role import Role, Site
from symlm.roles.structure import classify


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
        ValueError: An unknown role, a pattern that matches nothing, a tied parameter with two roles, or an embedding
            with sparse gradients.
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
        ValueError: As `assign_roles`.
    """
    patterns = {pattern: _parse_role(role) for pattern, role in (roles or {}).items()}
    sites = list(_sites(model))
    ends = EndMatrices(model)
    placed: dict[int, tuple[Site, Role]] = {}
    unplaced, used = [], set()
    for site in sites:
        matches = [pattern for pattern in patterns if fnmatchcase(site.name, pattern)]
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
        lines = "\n".join(f"  {site}" for site in unplaced)
        remedy = {site.name: "matrix" if len(site.shape) == 2 else "vector" for site in unplaced[:2]}
        raise UnplacedParameters(
            f"{len(unplaced)} parameters fit no role:\n{lines}\nAssign roles by name or pattern, e.g. roles={remedy}, "
            f"'vector' for what is not a matrix (elementwise AdamW); the roles are {[str(role) for role in Role]}"
        )
    return list(placed.values())


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
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                name = f"{path}.{key}" if path else key
                yield Site(name, parameter, module, modules.get(path.rpartition(".")[0]) if path else None)
