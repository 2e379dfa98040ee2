"""From a model to parameter groups: its roles, the table and a user's overrides together."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from symlm.roles.assignment import place
from symlm.roles.role import Role, Site
from symlm.routing.options import DEFAULTS, ROUTED, refuse_unknown
from symlm.routing.presets import get_preset
from symlm.routing.table import ADAMW, GRANULARITIES, Route, Table
from symlm.routing.values import check_values, is_number
from symlm.rules import get_rule
from symlm.sizes.constraints import get_constraint
from symlm.views.storage import view_of


class PlacedParameters(list[tuple[str, nn.Parameter]]):
    """List a group's named parameters; `holders` has the module of each, in which DeepSpeed may replace it."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: list[tuple[str, nn.Module]] = []

    def add(self, site: Site) -> None:
        """Append the parameter of a site."""
        self.append((site.name, site.parameter))
        self.holders.append((site.name, site.module))


def param_groups(
    model: nn.Module,
    lr: float | Tensor = 0.02,
    preset: str = "default",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    roles: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Make the parameter groups of a model for `SymOptimizer`, one for each role and view, with plain values.

    Args:
        model: The model.
        lr: The one dial; a group's rate is `lr` times the multiple of its route.
        preset: The table, a name of `symlm.PRESETS`.
        overrides: `{role: {key: value}}`, absolute values for the groups of a role, e.g. `{"lm_head": {"lr": 5e-3}}`.
        roles: Ordered `{pattern: role}` for parameters whose role the structure does not show, see `assign_roles`.

    Returns:
        The groups.

    Raises:
        ValueError: lr <= 0, complex parameters, no trainable parameter, or an unknown preset, role, key, rule, scale
            or view.
        UnplacedParameters: Parameters fit no role.
        TypeError: The model is no module.
    """
    if not is_number(lr) or not lr > 0:
        raise ValueError(f"lr must be a positive number, got {lr!r}")
    if isinstance(lr, Tensor):
        lr = lr.detach().view(())  # shares its memory, so that what a caller writes there arrives
    settings = check_overrides(overrides or {})
    placed = place(model, roles)
    table = overridden(get_preset(preset), settings)
    asked = settings.get(Role.VECTOR, {}).get("momentum_dtype")
    if asked == "int8" and get_rule(table[Role.VECTOR].rule).elementwise:  # an option of all roles leaves vectors out
        raise ValueError(
            "overrides['vector']: momentum_dtype='int8' has no effect on AdamW's means of vectors, which stay in "
            "float32; leave it out"
        )
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for site, role in placed:
        if site.parameter.is_complex():
            raise ValueError(f"{site}: complex parameters have no route; store real and imaginary parts, or freeze it")
        view = str(view_of(site, role, table[role].view, bool(get_rule(table[role].rule).state)))
        group = groups.setdefault((role, view), _group(role, view, table[role], lr, settings.get(role, {})))
        group["params"].add(site)
    if not groups:
        raise ValueError("the model has no trainable parameter; set requires_grad on those to train")
    first, *_ = groups.values()
    if "lr" not in settings.get(first["role"], {}):  # frameworks log the rate of the first group
        first |= {"lr": lr, "lr_multiplier": table[first["role"]].lr}
    for key in groups:
        same = [other for other in groups if other[0] == key[0]]
        groups[key]["name"] = f"{key[0]}-{same.index(key) + 1}" if key is not same[0] else str(key[0])
    return list(groups.values())


ROUTE_KEYS = ("rule", "view", "scale", "constraint")


# What a bad gradient does, and what a parameter is, are not a role's options.
OVERRIDABLE = {*DEFAULTS, *ROUTED} - {"nonfinite", "lr_multiplier", "role", "outputs"}


def check_overrides(overrides: Mapping[str, Mapping[str, Any]]) -> dict[Role, dict[str, Any]]:
    """Check overrides and return them by role.

    Args:
        overrides: `{role: {key: value}}`, as for `param_groups`.

    Returns:
        The same, with roles as keys.

    Raises:
        ValueError: An unknown role, key, rule, scale or view, or a rate that is not positive.
    """
    if not isinstance(overrides, Mapping) or not all(isinstance(values, Mapping) for values in overrides.values()):
        raise ValueError(f"overrides must be {{role: {{option: value}}}}, got {overrides!r}")
    names = [str(role) for role in Role]
    for role, values in overrides.items():
        if role not in names:
            raise ValueError(f"overrides name an unknown role {role!r}; choose one of {names}")
        for key in values:
            refuse_unknown(f"overrides[{role!r}] key", key, OVERRIDABLE)
        if not is_number(values.get("lr", 1.0)) or not values.get("lr", 1.0) > 0:
            raise ValueError(f"overrides[{role!r}]: lr must be a positive number, got {values['lr']!r}")
        check_values(f"overrides[{role!r}]", {key: value for key, value in values.items() if key != "view"})
        get_constraint(values.get("constraint", "none"))
        if values.get("view", "whole") not in list(GRANULARITIES):
            raise ValueError(
                f"overrides[{role!r}]: unknown view {values['view']!r}; choose one of {list(GRANULARITIES)}"
            )
    return {Role(role): dict(values) for role, values in overrides.items()}


def overridden(table: Table, settings: Mapping[Role, Mapping[str, Any]]) -> dict[Role, Route]:
    """Return a table with the rules, views and scales that a user set.

    Args:
        table: The route of every role.
        settings: The overrides by role, of which the keys in `ROUTE_KEYS` count.

    Returns:
        The changed table.
    """
    changes = {role: {k: v for k, v in values.items() if k in ROUTE_KEYS} for role, values in settings.items()}
    return {role: _changed_route(route, changes.get(role, {})) for role, route in table.items()}


def _changed_route(route: Route, changes: Mapping[str, Any]) -> Route:
    """Change a route; one that becomes elementwise takes `ADAMW`'s rates, as its own were for another scale."""
    becomes = get_rule(changes.get("rule", route.rule)).elementwise and not get_rule(route.rule).elementwise
    return replace(replace(ADAMW, view=route.view) if becomes else route, **changes)


def _group(role: Role, view: str, route: Route, lr: float | Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter group without parameters: the route's values, then those that the user set."""
    options = {key: value for key, value in settings.items() if key not in ROUTE_KEYS}
    return {
        "params": PlacedParameters(),
        "lr": lr * route.lr,
        "lr_multiplier": 1.0,
        "role": str(role),
        "view": view,
        "outputs": "columns" if route.view == "transposed" else "rows",
        "rule": route.rule,
        "scale": route.scale,
        "constraint": route.constraint,
        "weight_decay_multiplier": 1.0 if "weight_decay" in options else route.weight_decay,
        **route.options,
        **options,
    }
