"""A permutation of axes, with merged ones split: from a stored tensor to a stack of matrices and back."""

from math import prod
from typing import NamedTuple

from torch import Tensor

Axis = tuple[str, ...]


class Rearrangement(NamedTuple):
    """Hold the way from stored tensors of one shape to their stack.

    Args:
        split: The stored shape with merged axes split.
        order: The permutation of these axes to the stack's order.
        stack: The stack's shape, (b, m, n).
        back: The inverse permutation.
    """

    split: list[int]
    order: list[int]
    stack: tuple[int, int, int]
    back: list[int]

    @classmethod
    def of(
        cls, stored: list[Axis], stack: list[Axis], lengths: dict[str, int], many: tuple[int, ...]
    ) -> "Rearrangement":
        """Return the rearrangement of axes of these lengths.

        Args:
            stored: The axes of the stored tensor; each a product of named ones.
            stack: The three axes of its stack; "1" is a new one.
            lengths: The length of every named axis.
            many: The number of stored tensors in front, or nothing.
        """
        source = [name for axis in stored for name in axis]
        target = [name for axis in stack for name in axis if name != "1"]
        b, m, n = (prod(lengths[name] for name in axis) for axis in stack)
        first = len(many)
        order, back = [source.index(name) for name in target], [target.index(name) for name in source]
        return cls(
            [*many, *(lengths[name] for name in source)],
            [*range(first), *(first + k for k in order)],
            (prod(many) * b, m, n),
            [*range(first), *(first + k for k in back)],
        )

    def stacked(self, tensor: Tensor) -> Tensor:
        """Return the stack of a stored tensor, a torch view of it where strides allow."""
        return tensor.reshape(self.split).permute(self.order).reshape(self.stack)

    def unstacked(self, stack: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the stored tensor of a stack, in the stored shape."""
        return stack.reshape([self.split[k] for k in self.order]).permute(self.back).reshape(shape)
