"""Phase 3 under a constraint that measures: inner products of every matrix of the view, summed over its shards."""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.collectives import summed
from symlm.distributed.layout import Layout
from symlm.sizes.constraints import Step, effective_decay, get_constraint
from symlm.step.directions import scale_of
from symlm.step.member import Member
from symlm.views.matrix_view import MatrixView


def factors(
    group: dict[str, Any], members: list[Member], updates: list[Tensor], lr: Any
) -> list[tuple[Tensor, Tensor]]:
    """Compute the factors of `W <- κW − γU` of a bucket; ranks that store shards of it call this together.

    Args:
        group: The parameter group.
        members: Members of one layout.
        updates: `s·U` of each member's part.
        lr: The rate η.

    Returns:
        κ and γ of each member, in a shape that multiplies its part.
    """
    view, layout = MatrixView.parse(group["view"]), members[0].layout
    local_view = view if layout.whole else view.of_interval(layout.shape, layout.intervals)
    pairs = [(member.master, U) for member, U in zip(members, updates, strict=True)]
    products = torch.stack([_products(view, local_view, layout, W, U) for W, U in pairs])
    if local_view is None:
        products = summed(products, layout)  # three numbers a matrix travel
    weight, product, direction = products.unbind(1)
    lr = torch.as_tensor(lr, dtype=weight.dtype, device=weight.device)
    step = Step(
        lr,
        effective_decay(group),
        group["floor"],
        torch.ones_like(weight),
        lr.expand_as(weight),
        weight,
        product,
        direction,
    )
    step = get_constraint(group["constraint"]).function(step)
    spread = partial(_spread, view, local_view, layout)
    return [(spread(step.keep[k], W), spread(step.move[k], W)) for k, (W, _) in enumerate(pairs)]


def nuclear_norms(group: dict[str, Any], members: list[Member], directions: list[Tensor]) -> list[Tensor]:
    """Compute `ν = ⟨G, sU⟩/s` of every matrix, the nuclear norm of its gradient where U is its polar factor.

    Args:
        group: The parameter group.
        members: Members of one layout.
        directions: This rank's part of each `s·U`, s the scale.

    Returns:
        ν of each member, in a shape that multiplies its part; ranks that store shards call this together.
    """
    view, layout = MatrixView.parse(group["view"]), members[0].layout
    local_view = view if layout.whole else view.of_interval(layout.shape, layout.intervals)
    pairs = [(member.gradient.to(U.dtype), U) for member, U in zip(members, directions, strict=True)]
    products = torch.stack([_products(view, local_view, layout, G, U)[1] for G, U in pairs])
    norms = (summed(products, layout) if local_view is None else products).clamp(min=0)
    shape = layout.shape if local_view is None else tuple(directions[0].shape)
    norms = norms / norms.new_tensor(_scales(group, local_view or view, shape))
    return [_spread(view, local_view, layout, nu, U) for nu, (_, U) in zip(norms, pairs, strict=True)]


def _products(view: MatrixView, local_view: MatrixView | None, layout: Layout, W: Tensor, U: Tensor) -> Tensor:
    """Return `⟨W, W⟩`, `⟨W, U⟩` and `⟨U, U⟩` of this rank's part of each matrix, (3, b)."""
    if local_view is None:
        places = _matrix_of_entries(str(view), layout.shape, *layout.interval, W.device)
        zeros = W.new_zeros(_count(view, layout.shape))
        return torch.stack([zeros.index_add(0, places, (x * y).flatten()) for x, y in ((W, W), (W, U), (U, U))])
    parts = zip(local_view.sections(W), local_view.sections(U), strict=True)
    stacks = [(section.to_matrices(w), section.to_matrices(u)) for (section, w), (_, u) in parts]
    return torch.cat([torch.stack([(x * y).sum((1, 2)) for x, y in ((w, w), (w, u), (u, u))]) for w, u in stacks], 1)


def _spread(view: MatrixView, local_view: MatrixView | None, layout: Layout, factor: Tensor, W: Tensor) -> Tensor:
    """Return one factor of each matrix, (b,), in a shape that multiplies this rank's part W."""
    if len(factor) == 1:
        return factor[0]
    if local_view is None:
        return factor[_matrix_of_entries(str(view), layout.shape, *layout.interval, W.device)].view_as(W)
    return _by_matrix(local_view, factor, torch.empty_like(W, memory_format=torch.contiguous_format))


def _scales(group: dict[str, Any], view: MatrixView, shape: tuple[int, ...]) -> list[float]:
    """Return the scale of every matrix of a view."""
    parts = [(section, tuple(part.shape)) for section, part in view.sections(torch.empty(shape, device="meta"))]
    return [scale_of(group, section, part) for section, part in parts for _ in range(section.shape(part)[0])]


def _count(view: MatrixView, shape: tuple[int, ...]) -> int:
    """Return the number of matrices of a view, those of all sections."""
    parts = view.sections(torch.empty(shape, device="meta"))
    return sum(section.shape(tuple(part.shape))[0] for section, part in parts)


def _by_matrix(view: MatrixView, values: Tensor, into: Tensor) -> Tensor:
    """Write one value a matrix to all entries of it."""
    first = 0
    for section, part in view.sections(into):
        b, m, n = section.shape(tuple(part.shape))
        part.copy_(section.from_matrices(values[first : first + b, None, None].expand(b, m, n), tuple(part.shape)))
        first += b
    return into


@lru_cache(maxsize=256)  # an entry is as large as the part, and asked for in every step
def _matrix_of_entries(view: str, shape: tuple[int, ...], start: int, stop: int, device: torch.device) -> Tensor:
    """Return which matrix each entry of a flat part belongs to, where the part cuts matrices."""
    parsed = MatrixView.parse(view)
    numbers = torch.arange(_count(parsed, shape), dtype=torch.int32)
    return _by_matrix(parsed, numbers, torch.empty(shape, dtype=torch.int32)).flatten()[start:stop].to(device)
