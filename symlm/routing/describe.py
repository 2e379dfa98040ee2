"""A description of the routing: which update each parameter gets, and why."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from symlm_kernels.selection import LARGEST_ROW, choose
from torch import nn

from symlm.polar.precision import fastest_dtype
from symlm.roles.assignment import place
from symlm.roles.role import Role, Site
from symlm.routing.costs import BATCH_ELEMENTS, Moved, least_bytes, moved, products_of
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
        constraint: What a step may do to the weight's size, see `symlm.sizes.constraints`, with a λ that the
            table or an override sets; "none" where a decay is multiplied by 0.
        lr_multiplier: Its rate over the dial.
        products: Whose matrix products or fused rows its update takes, "torch", "triton" or "triton, fused"; "" for
            neither.
        why: The reason for the route.
        operations: Those of the matrix products of a step, see `symlm.routing.costs`.
        bytes: The least that a step reads and writes, of fp32.
        moved: Launches and bytes of a step in kernels' passes; None where no kernel does it whole.
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
    operations: int
    bytes: int
    moved: Moved | None


class Routing(list[RoutedParameter]):
    """List the routed parameters; `str` is a table with one line for each role and view.

    Args:
        rows: The parameters.
        costs: Whether the table has what a step costs.
    """

    def __init__(self, rows: Iterable[RoutedParameter] = (), costs: bool = False) -> None:
        super().__init__(rows)
        self.costs = costs

    def __str__(self) -> str:
        lines: dict[tuple[str, ...], list[RoutedParameter]] = {}
        for row in self:
            multiplier = f"{row.lr_multiplier:g}"
            key = (row.role, row.view, row.rule, row.scale, row.constraint, multiplier, row.products, row.why)
            lines.setdefault(key, []).append(row)
        costs = COSTS if self.costs else ()
        head = [
            "role",
            "tensors",
            "parameters",
            *costs,
            "view",
            "rule",
            "scale",
            "constraint",
            "lr ×",
            "products",
            "why",
        ]
        body = [[key[0], *_sizes(rows)[: 2 + len(costs)], *key[1:]] for key, rows in lines.items()]
        widths = [max(len(cells[k]) for cells in (head, *body)) for k in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if title in NUMBERS else cell.ljust(width)
                for title, cell, width in zip(head, cells, widths, strict=True)
            ).rstrip()
            for cells in (head, ["-" * width for width in widths], *body)
        )


COSTS = ("GFLOP", "least MB", "passes MB", "operands MB", "launches")
NUMBERS = ("tensors", "parameters", *COSTS, "lr ×")


def _sizes(rows: list[RoutedParameter]) -> tuple[str, ...]:
    """Return the cells of a line: tensors, parameters, billions of operations, millions of bytes, and launches."""
    entries, operations, least = (
        sum(values) for values in zip(*((prod(row.shape), row.operations, row.bytes) for row in rows), strict=True)
    )
    passes, operands = (sum(row.moved[k] for row in rows if row.moved) for k in (1, 2))
    counts = (f"{passes / 1e6:,.1f}", f"{operands / 1e6:,.1f}", f"{launches(rows):,}")
    if any(row.moved is None for row in rows):
        counts = ("", "", "")
    return str(len(rows)), f"{entries:,}", f"{operations / 1e9:,.1f}", f"{least / 1e6:,.1f}", *counts


def launches(rows: Iterable[RoutedParameter]) -> int:
    """Count the launches of kernels and products for some parameters of one role, see `symlm.routing.costs.moved`.

    One launch serves all matrices of a shape, up to `BATCH_ELEMENTS`; a row rule's serves one parameter, and AdamW's
    all.

    Args:
        rows: The parameters; those that no kernel updates whole count nothing.
    """
    alike: dict[tuple[Any, ...], list[Moved]] = {}
    for row in rows:
        if row.moved:
            rule = get_rule(row.rule)
            apart = row.name if rule.row_map and rule.fused and not rule.spectral else ""
            alike.setdefault(() if rule.elementwise else (row.shape, apart), []).append(row.moved)
    total = 0
    for key, some in alike.items():
        each = max(1, BATCH_ELEMENTS // prod(key[0])) if key else len(some)
        total += ceil(len(some) / each) * some[0].launches
    return total


def describe_routing(
    model: nn.Module,
    preset: str = "default",
    roles: Mapping[str, str] | None = None,
    kernels: str = "auto",
    lr: float = 0.02,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    costs: bool = False,
) -> Routing:
    """Describe which update each parameter gets, and why; print the result for a table.

    Args:
        model: The model.
        preset: As for `param_groups`.
        roles: As for `param_groups`.
        kernels: As for `symlm.polar.polar`; it decides `products` on the model's device.
        lr: As for `param_groups`; it matters only beside absolute rates in `overrides`.
        overrides: As for `param_groups`.
        costs: Whether the table has what a step costs: the operations of its matrix products (GFLOP), the least bytes
            that it reads and writes, and those of the kernels' passes and of the products' operands, see
            `symlm.routing.costs.moved`, and the launches of both.

    Returns:
        One `RoutedParameter` for each trainable parameter, in agreement with `param_groups` of the same arguments.

    Raises:
        ValueError: As `param_groups`, for the arguments that they share.
        RuntimeError: Triton is asked for and cannot run here.
    """
    settings = check_overrides(overrides or {})
    placed = place(model, roles)
    table = overridden(get_preset(preset), settings)
    rows = (_routed(site, role, table[role], settings.get(role, {}), lr, kernels) for site, role in placed)
    return Routing(rows, costs)


def _routed(
    site: Site, role: Role, route: Route, settings: Mapping[str, Any], lr: float, kernels: str
) -> RoutedParameter:
    """Return one parameter's row."""
    rule = get_rule(route.rule)
    view = view_of(site, role, route.view, bool(rule.state))
    chosen = {**route.options, **settings}
    return RoutedParameter(
        site.name,
        str(role),
        site.shape,
        str(view),
        route.rule,
        route.scale,
        _constraint(route, settings),
        settings.get("lr", lr * route.lr) / lr,
        _products(site, role, route, {"kernels": kernels, **settings}),
        "set by overrides" if set(settings) & {"rule", "view"} else route.why,
        products_of(site, view, rule, chosen),
        least_bytes(site, view, rule),
        moved(site, view, rule, {"kernels": kernels, **chosen}),
    )


def _constraint(route: Route, settings: Mapping[str, Any]) -> str:
    """Name a route's constraint: with λ where the table or an override has one, and none where a decay is times 0."""
    if route.constraint == "decay" and route.weight_decay == 0 and "weight_decay" not in settings:
        return "none"
    value = {**route.options, **settings}.get("weight_decay", 0)
    return f"{route.constraint} {value:g}" if value else route.constraint


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
