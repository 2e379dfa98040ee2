"""The flat partitions that DeepSpeed's ZeRO cuts a model into, read as parts of its parameters.

Under ZeRO-1, 2 and 3 an optimizer is given 1-D tensors that hold this rank's parts of many parameters, end to end.
Where each part lies is known to the parameters themselves, which ZeRO marks. Some settings of ZeRO are refused.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from symlm.distributed.layout import Layout, intervals_of_all, rank_in, rows_held
from symlm.roles.role import whole_shape


def refuse_settings() -> None:
    """Look at the DeepSpeed configuration of accelerate, if there is one.

    Raises: ValueError where it would not run symlm: accelerate puts DeepSpeed's own Adam in the place of an optimizer
    that is offloaded, without a word; and where nobody knows whether it would.
    """
    accelerate: Any = sys.modules.get("accelerate")
    # Read, not asked: AcceleratorState() writes the process's own type over FSDP's in what all of them share.
    shared = accelerate.state.AcceleratorState._shared_state if accelerate else {}
    if shared.get("distributed_type") != "DEEPSPEED":
        return
    plugin = accelerate.utils.get_active_deepspeed_plugin(SimpleNamespace(**shared))
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    if device not in ("none", None):
        raise ValueError(
            f"DeepSpeed's configuration offloads the optimizer to {device!r}, where its own Adam takes symlm's place: "
            'remove "offload_optimizer" (offload_optimizer_device: none in accelerate\'s yaml); ZeRO cuts the state'
        )
    device = (zero.get("offload_param") or {}).get("device", "none")
    if device not in ("none", None):
        raise ValueError(f'symlm was never run with parameters offloaded to {device!r}: remove "offload_param"')
    quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key) is True]
    if quantized:
        raise ValueError(f"symlm was never run with DeepSpeed's {quantized}, which need a GPU: leave them out")


@dataclass(frozen=True)
class Fragment:
    """One parameter's part of a flat partition: `flat[start:stop]`, which lies in the whole as `layout` says."""

    name: str
    start: int
    stop: int
    layout: Layout

    @property
    def rows(self) -> int:
        """How many rows of the parameter this part has any of."""
        first, last = rows_held(self.layout)
        return last - first

    def of(self, flat: Tensor) -> Tensor:
        """Return this part of the partition, or of a state shaped like it: in rows where no rank's part cuts one."""
        part, row = flat[self.start : self.stop], self.layout.shape[1:]
        cut = any(edge % prod(row) for interval in self.layout.intervals for edge in interval)
        return part if cut else part.view(-1, *row)


def is_partition(p: Tensor, original: nn.Parameter) -> bool:
    """Tell whether p is a partition of ZeRO's that holds a part of this parameter, or of others like it."""
    return p is not original and (hasattr(original, "_hp_mapping") or hasattr(original, "ds_tensor"))


def fragments_of(flat: Tensor, named: Sequence[tuple[str, nn.Parameter]]) -> list[Fragment]:
    """Return the fragments of a partition, in the model's order, the empty ones too; all ranks call this together.

    Raises: RuntimeError for a partition that lies on another device than the parameters (offload).
    """
    device = named[0][1].device
    if flat.device.type != device.type:
        raise RuntimeError(
            f"DeepSpeed keeps the optimizer's partition on {flat.device} and the model on {device}: symlm does not run "
            'offloaded; remove "offload_optimizer" from the DeepSpeed configuration'
        )
    third = hasattr(named[0][1], "ds_tensor")
    found = [(name, p, *part) for name, p in named if (part := _part_of_3(p, flat) if third else _part_of_1_and_2(p))]
    group = _group_of(found[0][1]) if found else None
    everywhere = intervals_of_all([interval for *_, interval, _ in found], group, flat.device)
    return [
        Fragment(name, offset, offset + stop - start, Layout(whole_shape(p), intervals, shards=group))
        for (name, p, (start, stop), offset), intervals in zip(found, everywhere, strict=True)
    ]


Part = tuple[tuple[int, int], int]  # [start, stop) of the flat parameter, and where in the partition it begins


def _part_of_1_and_2(p: Any) -> Part:
    if p._hp_mapping is None:
        return (0, 0), 0
    whole, own = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
    return (whole.start, whole.start + whole.numel), own.start


def _part_of_3(p: Any, flat: Tensor) -> Part | None:
    """Return this rank's slice, ⌈numel / world⌉ elements without padding; None if another sub-group holds it."""
    zero = p._z3_optimizer
    subgroup, offset, size = zero.grad_position[zero.get_param_id(p)]
    if zero.fp32_partitioned_groups_flat[subgroup] is not flat:
        return None
    start = min(rank_in(_group_of(p)) * size, p.ds_numel)
    return (start, min(start + size, p.ds_numel)), offset


def _group_of(p: Any) -> Any:
    return p.ds_process_group if hasattr(p, "ds_tensor") else p._dp_group
