"""Gradients as flat rows: this rank's parts of all trainable parameters, end to end, one row a loss."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from symlm.distributed.collectives import averaged_everywhere, summed_everywhere
from symlm.distributed.layout import copies_of
from symlm.distributed.tensors import aligned, gathered, local, placed_like, regrouped
from symlm.roles.wrappers import TRANSPARENT

COLUMNS = 2**20  # what is copied at once in float64


class Place(NamedTuple):
    """Name the columns of one parameter in a row.

    Args:
        name: The parameter's name, without wrappers.
        parameter: The parameter.
        start, stop: The columns of this rank's part.
        copies: The number of ranks that store the same part.
    """

    name: str
    parameter: Any
    start: int
    stop: int
    copies: int

    def of(self, row: Tensor) -> Tensor:
        """Return this rank's part of the parameter in a row, a view of the part's shape."""
        return row[self.start : self.stop].view(local(self.parameter).shape)


def places_of(model: nn.Module) -> list[Place]:
    """Return the places of a model's trainable parameters, in their order; raise ValueError if there are none."""
    places, start = [], 0
    for path, p in model.named_parameters():
        if p.requires_grad:
            name = ".".join(part for part in path.split(".") if part not in TRANSPARENT)
            stop = start + local(p).numel()
            places.append(Place(name, p, start, stop, copies_of(p)))
            start = stop
    if not places:
        raise ValueError("the model has no trainable parameter for a conductor")
    return places


class Rows:
    """Store the gradients of K losses, those of the step before, and the mean of what was written.

    Args:
        places: The places of the parameters.
        losses: K.
        momentum: Whether there is a mean.
        dtype: The dtype of the rows; None is the widest of the parameters', at least fp32.
    """

    def __init__(self, places: list[Place], losses: int, momentum: bool, dtype: torch.dtype | None) -> None:
        self.places = places
        parts = [local(place.parameter) for place in places]
        for part in parts if dtype is None else ():
            dtype = torch.promote_types(dtype or torch.float32, part.dtype)
        shape = (losses, places[-1].stop)
        self.now, self.before = (torch.zeros(shape, dtype=dtype, device=parts[0].device) for _ in range(2))
        self.mean = self.now.new_zeros(shape[1] if momentum else 0)
        self.reached = torch.zeros(losses, len(places), dtype=torch.bool)  # by the passes of this step

    def take(self, k: int) -> bool:
        """Move the gradients of loss k from `p.grad` into its row; return whether there were any."""
        if not self.reached[k].any():
            self.now[k].zero_()
        reached = [n for n, place in enumerate(self.places) if place.parameter.grad is not None]
        for place in (self.places[n] for n in reached):
            place.of(self.now[k]).add_(aligned(place.parameter.grad, place.parameter))
            place.parameter.grad = None
        self.reached[k, reached] = True
        return bool(reached)

    def _segments(self) -> Iterator[tuple[int, int, int, bool]]:
        """Yield (start, stop, copies, plain) of neighbours that are stored alike."""
        for key, group in groupby(
            self.places, lambda place: (place.copies, not hasattr(place.parameter, "placements"))
        ):
            members = list(group)
            yield members[0].start, members[-1].stop, *key

    def average(self) -> None:
        """Average the plain parameters' columns over all ranks; what is sharded was averaged by its backward pass."""
        for start, stop, copies, plain in self._segments():
            for row in self.now if plain and copies > 1 else ():
                averaged_everywhere(row[start:stop])

    def examine(self) -> tuple[Tensor, Tensor]:
        """Compute what all ranks decide by, in one exchange and one read of the device.

        A part that several ranks store counts once, so that the sum over all ranks is that of one process.

        Returns:
            The inner products of whole gradients, these and the ones before, (2K, 2K) in float64; and whether a loss
            reached a parameter on any rank, (K, parameters).
        """
        K = len(self.now)
        total = torch.zeros(2 * K, 2 * K, dtype=torch.float64, device=self.now.device)
        for start, stop, copies, _ in self._segments():
            for first in range(start, stop, COLUMNS):
                columns = slice(first, min(stop, first + COLUMNS))
                X = torch.cat([self.now[:, columns], self.before[:, columns]]).double()
                total.addmm_(X, X.T, alpha=1 / copies)
        numbers = summed_everywhere(torch.cat([total.flatten(), self.reached.to(total).flatten()])).cpu()
        products, reached = numbers.split([total.numel(), self.reached.numel()])
        return products.view_as(total), reached.view_as(self.reached) > 0

    def combined(self, weights: list[float]) -> Tensor:
        """Compute `Σ_k w_k g_k` in fp32 or wider, (columns,)."""
        wide = torch.promote_types(self.now.dtype, torch.float32)
        total = self.now[0].to(wide, copy=True).mul_(weights[0])
        for row, weight in zip(self.now[1:], weights[1:], strict=True):
            total.add_(row.to(wide), alpha=weight)
        return total

    def write(self, total: Tensor, reached: list[bool]) -> None:
        """Write a row to `p.grad` of the parameters that a loss reached on any rank; this step's gradients are over."""
        for place, is_reached in zip(self.places, reached, strict=True):
            if is_reached:
                p = place.parameter
                p.grad = regrouped(place.of(total).to(p.dtype), p)
        self.now, self.before = self.before, self.now

    @property
    def stored(self) -> list[Tensor]:
        """The rows that last from step to step."""
        return [*self.before, *([self.mean] if len(self.mean) else [])]

    def gather(self) -> list[dict[str, Tensor]]:
        """Gather the stored rows from all ranks, on the CPU, by the parameters' names."""
        return [{p.name: gathered(regrouped(p.of(row), p.parameter)).cpu() for p in self.places} for row in self.stored]

    def load(self, rows: list[dict[str, Tensor]]) -> None:
        """Copy this rank's parts of what `gather` returned.

        Raises:
            ValueError: Before anything changed: other parameters, or another number of rows.
        """
        shapes = {place.name: tuple(place.parameter.shape) for place in self.places}
        if any({name: tuple(x.shape) for name, x in row.items()} != shapes for row in rows):
            raise ValueError("the conductor's state is of a model with other parameters")
        if len(rows) != len(self.stored):
            raise ValueError("the conductor's state was saved with momentum and this one has none, or the reverse")
        for row, saved in zip(self.stored, rows, strict=True):
            for place in self.places:
                whole, p = saved[place.name].to(row), place.parameter
                place.of(row).copy_(placed_like(whole, p) if hasattr(p, "placements") else whole)
