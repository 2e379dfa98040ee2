"""Every trainable parameter of a model gets exactly one role, or an error that names it."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn

from symlm.roles.ends import EndMatrices
from symlm.roles.role import Role, Site
from symlm.roles.structure import classify


class UnplacedParameters(ValueError):
    """Some trainable parameters fit no role; the message names each, and the way to place it."""


def assign_roles(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, Role]:
    """Return `{parameter name: Role}` for every trainable parameter, tied ones once, under their first name.

    roles: ordered `{pattern: role}`; a pattern is a shell glob over full names, the first match wins.

    Raises: UnplacedParameters, naming each parameter without a role; ValueError for an unknown role or a pattern
    that matches nothing.
    """
    return {site.name: role for site, role in place(model, roles)}


def place(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[tuple[Site, Role]]:
    """Return each trainable parameter's site with its role; `assign_roles` for those who need the site too."""
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
                f"one tensor has two roles: {first} is {before}, {site} is {role}; untie it, or say with roles= "
                f"what it is, e.g. {{{first.name!r}: 'matrix', {site.name!r}: 'matrix'}}"
            )
    dead = [pattern for pattern in patterns if pattern not in used]
    if dead:
        like = f"; the names are like {sites[0].name!r}" if sites else ", and the model has no trainable one"
        raise ValueError(f"roles {dead} place no parameter{like}")
    if unplaced:
        lines = "\n".join(f"  {site}" for site in unplaced)
        remedy = {site.name: "matrix" if len(site.shape) == 2 else "vector" for site in unplaced[:2]}
        raise UnplacedParameters(
            f"{len(unplaced)} parameters fit no role:\n{lines}\nPlace them by name or pattern, e.g. roles={remedy}, "
            f"'vector' for what is no matrix (elementwise AdamW); roles are {[str(role) for role in Role]}"
        )
    return list(placed.values())


def _parse_role(role: str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise ValueError(f"unknown role {role!r}; choose one of {[str(role) for role in Role]}") from None


def _sites(model: nn.Module) -> Iterator[Site]:
    """Yield every place of every trainable parameter, a tied one more than once."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                name = f"{path}.{own}" if path else own
                yield Site(name, parameter, module, modules.get(path.rpartition(".")[0]) if path else None)
