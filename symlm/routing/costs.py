"""What a step of one parameter costs on one process, counted from its route: products, bytes and launches."""

from math import ceil, prod
from typing import Any, NamedTuple

import torch

from symlm.polar.counting import operations, traffic
from symlm.polar.factor import choose_iteration
from symlm.polar.inverse_roots import LAUNCHES as ROOT_LAUNCHES
from symlm.polar.newton_schulz import gram_newton_schulz
from symlm.polar.precision import resolve_dtype
from symlm.roles.role import Site
from symlm.routing.options import DEFAULTS
from symlm.rules import Rule
from symlm.views.matrix_view import MatrixView

WORD = 4  # bytes of fp32, in which weights are updated
BATCH_ELEMENTS = 2**26  # a batch of equal shapes has at most this many, which bounds the temporary memory
ROWS_AT_A_TIME = 2**15  # of a vocabulary's whitened directions, which bounds their temporary memory
ITERATIONS = ("auto", "newton_schulz", "gram_newton_schulz")


class Moved(NamedTuple):
    """Count what the kernels of a step launch and move; see `moved`.

    Args:
        launches: Kernels and matrix products of a batch of equal parameters, which one launch serves.
        passes: Bytes that the passes around the products read and write.
        operands: Bytes of the products' operands and results, each counted once a product.
    """

    launches: int
    passes: int
    operands: int


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


def moved(site: Site, view: MatrixView, rule: Rule, settings: dict[str, Any]) -> Moved | None:
    """Count the launches and bytes of a step in the kernels' passes, of an fp32 parameter.

    In bytes an entry, h those of the products' dtype: the passes around a polar factor take `24 + 2h`, with Nesterov
    momentum `28 + 2h`; a row step 20; a centered one 28, with Nesterov momentum 36; around a whitened rule's two
    products `24 + 2h` or `28 + 2h`. Numbers by row or matrix are left out, and so are the few operations that count
    steps and look at all gradients.

    Args:
        site: The parameter's place in the model; its device decides the products' dtype.
        view: Its view.
        rule: Its rule.
        settings: The options that are set for its role.

    Returns:
        The counts; None for an update that no kernel does whole.
    """
    chosen, count = DEFAULTS | settings, prod(site.shape)
    if rule.elementwise:
        return Moved(1, 7 * WORD * count, 0)
    if not rule.fused or chosen["momentum_of"] != "gradients" or chosen["constraint"] != "decay":
        return None
    like = torch.empty((), device=site.parameter.device)
    if rule.spectral:
        return _around_polar_factors(like, view.shape(site.shape), chosen) if view.consecutive(site.shape) else None
    again = 2 * WORD if chosen["nesterov"] else WORD  # a further look at the rule's input reads M, or G and M
    if not rule.whitens:
        return Moved(3, (5 * WORD + 2 * again) * count, 0) if rule.symmetry.shift else Moved(1, 5 * WORD * count, 0)
    half, n = resolve_dtype(like, chosen["compute_dtype"]).itemsize, site.shape[-1]
    blocks = ceil(count / n / ROWS_AT_A_TIME)
    fixed = 2 + 1 + ROOT_LAUNCHES + rule.symmetry.shift  # the directions, their Gram matrix, its root, the mean row
    operands = half * count * 3 + WORD * n * n + half * n * n * blocks
    return Moved(fixed + 2 * blocks, (5 * WORD + again + 2 * half) * count, operands)


def _around_polar_factors(like: torch.Tensor, shape: tuple[int, int, int], chosen: dict[str, Any]) -> Moved | None:
    """Count the passes before and behind the products of a stack (b, m, n), and these."""
    if chosen["polar_method"] not in ITERATIONS:
        return None
    b, m, n = shape[0], min(shape[1:]), max(shape[1:])
    options = (chosen[key] for key in ("polar_method", "schedule", "steps", "compute_dtype", "kernels"))
    iteration = choose_iteration(like.expand(b, m, n), *options)
    products, elements = traffic(m, n, chosen["steps"], iteration.function is gram_newton_schulz)
    half = iteration.dtype.itemsize
    passes = ((7 if chosen["nesterov"] else 6) * WORD + 2 * half) * b * m * n
    return Moved(3 + products + 1, passes, half * b * elements)
