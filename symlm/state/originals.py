"""Which parameters a ZeRO partition holds: DeepSpeed puts flat partitions in the place of an optimizer's parameters."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn

from symlm.distributed.partitions import Fragment, fragments_of, is_partition
from symlm.distributed.tensors import local


class Originals:
    """The model's parameters by name, found again through the modules that hold them, and the partitions made of them.

    Modules are referenced weakly, and parameters not at all: FSDP2 frees the tensors that it replaces, and
    `torch.utils.swap_tensors` refuses a parameter with a weak reference.
    """

    def __init__(self) -> None:
        self._modules: dict[str, ReferenceType[nn.Module]] = {}
        self._fragments: dict[Tensor, list[Fragment]] = {}

    def register(self, holders: Iterable[tuple[str, nn.Module]]) -> None:
        """Remember which module holds each parameter.

        Args:
            holders: Pairs of a parameter's full name and its module.
        """
        self._modules |= {name: ref(module) for name, module in holders}

    @property
    def partitioned(self) -> bool:
        """Whether this rank holds ZeRO partitions."""
        return bool(self._fragments)

    def fragments(self, group: dict[str, Any], p: Tensor) -> list[Fragment]:
        """Return what a ZeRO partition holds, looked up once; nothing for an ordinary parameter.

        Args:
            group: The parameter group that holds `p`; its `param_names` name the partition's parameters.
            p: A parameter of the group.
        """
        if "deepspeed" not in sys.modules:  # which alone makes partitions
            return []
        if p not in self._fragments:
            named = self._named(group.get("param_names", ()))
            first = next(named, None)
            if first is None or not is_partition(p, first[1]):
                return []
            self._fragments[p] = fragments_of(p, [first, *named])
        return self._fragments[p]

    def entries(self, p: Tensor) -> int:
        """Return how many entries of a parameter are on this rank, without padding.

        Args:
            p: A parameter, or a partition whose fragments were looked up.
        """
        parts = self._fragments.get(p)
        return sum(part.stop - part.start for part in parts) if parts else local(p).numel()

    def _named(self, names: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
        for name in names:
            module = self._modules.get(name, lambda: None)()
            original = getattr(module, name.rpartition(".")[2], None)
            if isinstance(original, nn.Parameter):
                yield name, original
