"""What a step of one parameter costs on one process, counted from its route: matrix products and bytes."""

from math import prod
from typing import Any

import torch

from symlm.polar.counting import operations
from symlm.roles.role import Site
from symlm.routing.options import DEFAULTS
from symlm.rules import Rule
from symlm.views.matrix_view import MatrixView

WORD = 4  # bytes of fp32, in which weights are updated


def products_of(site: Site, view: MatrixView, rule: Rule, settings: dict[str, Any]) -> int:
    """Count the operations of a step's matrix products, as one polar factor a matrix, or of a whitened rule's rows.

    A whitened rule takes `2mn²(1 + 1/k)` for a Gram matrix every k-th step and its inverse root times the rows; the
    root itself, of n³ a step, is left out, and so are the bases of rules that have any.

    Args:
        site: The parameter's place in the model.
        view: Its view.
        rule: Its rule.
        settings: The options that are set for its role.

    Returns:
        The count of additions and multiplications.
    """
    chosen, meta = DEFAULTS | settings, torch.empty(site.shape, device="meta")
    if rule.whitens:
        m, n = prod(site.shape[:-1]), site.shape[-1]
        return round(2 * m * n * n * (1 + 1 / chosen["gram_every"]))
    shapes = [part_view.shape(tuple(part.shape)) for part_view, part in view.sections(meta)] if rule.spectral else []
    return sum(b * operations(m, n, chosen["steps"], "auto") for b, m, n in shapes)


def least_bytes(site: Site, view: MatrixView, rule: Rule) -> int:
    """Count the bytes of one pass over all that a step reads and writes: the floor of its traffic in fp32.

    Args:
        site: The parameter's place in the model.
        view: Its view.
        rule: Its rule.

    Returns:
        The bytes of the gradient, and twice those of weight, momentum and the rule's state.
    """
    count = prod(site.shape)
    if rule.elementwise:
        return WORD * (1 + 2 + 4) * count
    scalar = torch.empty((), device="meta")
    M = scalar.expand(site.shape if rule.row_map else view.shape(site.shape)) if rule.state else scalar
    stored = sum(kind.start(M).numel() for kind in rule.stored.values())
    return WORD * ((1 + 2 + 2) * count + 2 * stored)
