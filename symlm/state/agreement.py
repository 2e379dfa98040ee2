"""At a group's first step all ranks compare what they are about to do: names, shapes and options."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from symlm.distributed.collectives import check_agreement
from symlm.distributed.tensors import local
from symlm.routing.options import UNCOMPARED, named_parameters
from symlm.state.originals import Originals
from symlm.views.matrix_view import MatrixView


def compare_plans(groups: Sequence[dict[str, Any]], originals: Originals) -> None:
    """Compare a digest of these groups over all ranks, which call this together.

    Args:
        groups: Parameter groups with parameters.
        originals: The parameters of ZeRO's partitions.

    Raises:
        RuntimeError: On every rank, with all digests, where they differ.
    """
    lines = [
        f"{name} {shape} {missing} {settings}"
        for group in groups
        for settings in [" ".join(f"{key}={_plain(group[key])}" for key in sorted(group) if key not in UNCOMPARED)]
        for name, shape, missing in common_shapes(group, originals)
    ]
    check_agreement("\n".join(lines), local(groups[0]["params"][0]).device)


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
