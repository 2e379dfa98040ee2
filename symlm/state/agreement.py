"""At a group's first step all ranks compare what they are about to do: programs, names, shapes and options."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.collectives import check_agreement, largest_everywhere, world_size
from symlm.distributed.tensors import local
from symlm.routing.options import UNCOMPARED, key_of, named_parameters
from symlm.state.names import some
from symlm.state.originals import Originals
from symlm.views.matrix_view import MatrixView

APART = 0.01  # of the norms of one gradient on two ranks; rounding is far below, and other batches are above


class Agreement:
    """Remember which groups all ranks have compared."""

    def __init__(self) -> None:
        self._agreed: set[tuple[str, str]] = set()

    def compare(self, groups: Sequence[dict[str, Any]], originals: Originals) -> bool:
        """Compare a digest of the groups at their first step over all ranks, which call this together.

        Args:
            groups: All parameter groups.
            originals: The parameters of ZeRO's partitions.

        Returns:
            Whether a group has its first step.

        Raises:
            RuntimeError: On every rank, with all digests, where they differ.
        """
        first = [group for group in groups if group["params"] and key_of(group) not in self._agreed]
        if not first:
            return False
        lines = [
            f"{name} {shape} {missing} {settings}"
            for group in first
            for settings in [" ".join(f"{key}={_plain(group[key])}" for key in sorted(group) if key not in UNCOMPARED)]
            for name, shape, missing in common_shapes(group, originals)
        ]
        check_agreement("\n".join([program(), *lines]), local(first[0]["params"][0]).device)
        warn_of_own_gradients(first, originals)
        self._agreed |= {key_of(group) for group in first}
        return True


def warn_of_own_gradients(groups: Sequence[dict[str, Any]], originals: Originals) -> None:
    """Warn of plain parameters that count as replicated and have another gradient on every rank.

    Args:
        groups: Parameter groups, the same on all ranks, which call this together.
        originals: The parameters of ZeRO's partitions.
    """
    found = {
        name: p.grad.norm().float()
        for group in groups
        for name, p in named_parameters(group)
        if group["shared"] and local(p) is p and p.grad is not None and not originals.fragments(group, p)
    }
    if world_size() == 1 or not found:
        return
    norms = torch.stack([norm.to(local(groups[0]["params"][0]).device) for norm in found.values()]).nan_to_num()
    most, least = largest_everywhere(torch.stack([norms, -norms]))
    if apart := [name for name, differ in zip(found, (most + least > APART * most).tolist(), strict=True) if differ]:
        warnings.warn(
            f"the gradients of {some(apart)} differ between ranks, which share plain parameters: one rank's direction "
            "moves them on all. Average them, as DDP does, or pass shared=False where parameters belong to one rank",
            stacklevel=6,
        )


@cache
def program() -> str:
    """Return torch's version and a digest of symlm's source: the number of its version says nothing of a checkout."""
    package = Path(__file__).parents[1]
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return f"torch {torch.__version__}, symlm {source.hexdigest()}"


def shapes_of_several_ranks(groups: Sequence[dict[str, Any]], originals: Originals) -> dict[str, tuple[int, ...]]:
    """Return name and whole shape of the parameters that several ranks hold; nothing on one process.

    Args:
        groups: Parameter groups.
        originals: The parameters of ZeRO's partitions.
    """
    several = groups if world_size() > 1 else ()
    return {name: shape for group in several for name, shape, _ in common_shapes(group, originals)}


def common_shapes(group: dict[str, Any], originals: Originals) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield name, whole shape and whether the gradient is missing of each parameter that several ranks hold.

    Raises:
        RuntimeError: A wrapper flattened a parameter in a way that cannot be read back.
    """
    axes = MatrixView.parse(group["view"]).axes
    for name, p in named_parameters(group):
        if fragments := originals.fragments(group, p):
            yield from ((fragment.name, fragment.layout.shape, p.grad is None) for fragment in fragments)
        elif p.ndim != axes:
            raise RuntimeError(
                f"{name} has {p.ndim} axes in the step and had {axes} at construction: a wrapper that is none of "
                "DDP, FSDP2 and DeepSpeed cut it flat; FSDP1 is one, use FSDP2 (fsdp_version: 2)"
            )
        elif group["shared"] or local(p) is not p:
            yield name, tuple(p.shape), p.grad is None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value  # whose text would name the rank's device
