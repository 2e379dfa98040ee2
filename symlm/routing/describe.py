"""A description of the routing: which update each parameter gets, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from symlm_kernels.selection import LARGEST_ROW, choose
from torch import nn

from symlm.polar.precision import fastest_dtype
from symlm.roles.assignment import place
from symlm.roles.role import Role, Site
from symlm.routing.param_groups import check_overrides, overridden
from symlm.routing.presets import get_preset
from symlm.routing.table import Route
from symlm.rules import get_rule
from symlm.views.storage import view_of


@dataclass(frozen=True)
class RoutedParameter:
    """Describe one parameter, in `describe_routing`.

    Args:
        name: The parameter's name.
        role: The role it is assigned.
        shape: Its full shape.
        view: The view as text, see `symlm.views.MatrixView`.
        rule: The name of the rule.
        scale: The name of the scale.
        constraint: What a step may do to the weight's size, see `symlm.rules.constraints`.
        lr_multiplier: Its rate over the dial.
        products: Whose matrix products or fused rows its update takes, "torch", "triton" or "triton, fused"; "" for
            neither.
        why: The reason for the route.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    view: str
    rule: str
    scale: str
    constraint: str
    lr_multiplier: float
    products: str
    why: str


class Routing(list[RoutedParameter]):
    """List the routed parameters; `str` is a table with one line for each role and view."""

    def __str__(self) -> str:
        lines: dict[tuple[str, ...], list[int]] = {}
        for row in self:
            multiplier = f"{row.lr_multiplier:g}"
            key = (row.role, row.view, row.rule, row.scale, row.constraint, multiplier, row.products, row.why)
            count = lines.setdefault(key, [0, 0])
            count[0] += 1
            count[1] += prod(row.shape)
        head = ("role", "tensors", "parameters", "view", "rule", "scale", "constraint", "lr ×", "products", "why")
        body = [(key[0], str(tensors), f"{count:,}", *key[1:]) for key, (tensors, count) in lines.items()]
        widths = [max(len(cells[k]) for cells in (head, *body)) for k in range(len(head))]
        right = (1, 2, 7)
        return "\n".join(
            "  ".join(
                cell.rjust(width) if k in right else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in (head, tuple("-" * width for width in widths), *body)
        )


def describe_routing(
    model: nn.Module,
    preset: str = "default",
    roles: Mapping[str, str] | None = None,
    kernels: str = "auto",
    lr: float = 0.02,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Routing:
    """Describe which update each parameter gets, and why; print the result for a table.

    Args:
        model: The model.
        preset: As for `param_groups`.
        roles: As for `param_groups`.
        kernels: As for `symlm.polar.polar`; it decides `products` on the model's device.
        lr: As for `param_groups`; it matters only beside absolute rates in `overrides`.
        overrides: As for `param_groups`.

    Returns:
        One `RoutedParameter` for each trainable parameter, in agreement with `param_groups` of the same arguments.

    Raises:
        ValueError: As `param_groups`, for the arguments that they share.
        RuntimeError: Triton is asked for and cannot run here.
    """
    settings = check_overrides(overrides or {})
    table = overridden(get_preset(preset), settings)
    return Routing(
        RoutedParameter(
            site.name,
            str(role),
            site.shape,
            str(view_of(site, role, table[role].view, bool(get_rule(table[role].rule).state))),
            table[role].rule,
            table[role].scale,
            table[role].constraint,
            settings.get(role, {}).get("lr", lr * table[role].lr) / lr,
            _products(site, role, table[role], {"kernels": kernels, **settings.get(role, {})}),
            "set by overrides" if set(settings.get(role, ())) & {"rule", "view"} else table[role].why,
        )
        for site, role in place(model, roles)
    )


def _products(site: Site, role: Role, route: Route, settings: Mapping[str, Any]) -> str:
    """Name whose products a polar factor takes, and whether its passes are fused; of a row rule its fused step."""
    rule, device, kernels = get_rule(route.rule), site.parameter.device.type, settings["kernels"]
    view = view_of(site, role, route.view, bool(rule.state))
    _, m, n = view.shape(site.shape)
    if not rule.spectral:
        fusible = rule.fused and n <= LARGEST_ROW and site.parameter.dtype == torch.float32
        return "triton, fused" if fusible and choose(device, torch.float32, n, kernels, "rows") == "triton" else ""
    if settings.get("polar_method") in ("svd", "qdwh"):
        return "torch"
    fusible = rule.fused and view.consecutive(site.shape) is not None
    fused = fusible and choose(device, torch.float32, min(m, n), kernels, "stacks") == "triton"
    return choose(device, fastest_dtype(device), min(m, n), kernels) + ", fused" * fused
