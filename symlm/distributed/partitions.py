"""The flat partitions of DeepSpeed's ZeRO, read as parts of a model's parameters.

Under ZeRO-1, 2 and 3 an optimizer is given 1-D tensors that hold this rank's parts of many parameters, end to end.
ZeRO records on each parameter where its part is. Some settings of ZeRO are refused.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from symlm.distributed.layout import Layout, intervals_of_all, rank_in, rows_held
from symlm.roles.storage import whole_shape


def refuse_settings() -> None:
    """Check the DeepSpeed configuration of accelerate, if there is one.

    Raises:
        ValueError: The configuration offloads the optimizer, which accelerate then replaces silently by DeepSpeed's own
            Adam; or it has a setting that symlm was never run with, or whose checkpoints nobody reads.
    """
    accelerate: Any = sys.modules.get("accelerate")
    # The shared state is read directly: AcceleratorState() would overwrite FSDP's distributed type in it.
    shared = accelerate.state.AcceleratorState._shared_state if accelerate else {}
    if shared.get("distributed_type") != "DEEPSPEED":
        return
    plugin = accelerate.utils.get_active_deepspeed_plugin(SimpleNamespace(**shared))
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    if device not in ("none", None):
        raise ValueError(
            f"DeepSpeed's configuration offloads the optimizer to {device!r}, where its own Adam takes symlm's place: "
            'remove "offload_optimizer" (offload_optimizer_device: none in accelerate\'s yaml); ZeRO partitions the '
            "state already"
        )
    device = (zero.get("offload_param") or {}).get("device", "none")
    if device not in ("none", None):
        raise ValueError(f'symlm was never run with parameters offloaded to {device!r}: remove "offload_param"')
    quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key) is True]
    if quantized:
        raise ValueError(f"symlm was never run with DeepSpeed's {quantized}, which need a GPU: leave them out")
    if zero.get("elastic_checkpoint") is True:
        raise ValueError(
            "DeepSpeed writes elastic checkpoints of any optimizer and reads those of Adam alone: remove "
            '"elastic_checkpoint"'
        )


@dataclass(frozen=True)
class Fragment:
    """Describe one parameter's part of a flat partition, `flat[start:stop]`.

    Args:
        name: The parameter's name.
        start: Where the part begins in the partition.
        stop: Where it ends.
        layout: The layout of the whole parameter over the ranks.
    """

    name: str
    start: int
    stop: int
    layout: Layout

    @property
    def rows(self) -> int:
        """The number of rows of the parameter of which this part has at least a piece."""
        first, last = rows_held(self.layout)
        return last - first

    def of(self, flat: Tensor) -> Tensor:
        """Return this part of the partition, or of a state tensor of its shape.

        Args:
            flat: The partition or the state tensor, 1-D.

        Returns:
            A view: rows of the parameter, or flat if any rank's part splits a row.
        """
        part, row = flat[self.start : self.stop], self.layout.shape[1:]
        splits_row = any(edge % prod(row) for interval in self.layout.intervals for edge in interval)
        return part if splits_row else part.view(-1, *row)


def deepspeed_runs() -> bool:
    """Return whether DeepSpeed was initialized in this process."""
    deepspeed: Any = sys.modules.get("deepspeed")
    return deepspeed is not None and bool(deepspeed.comm.is_initialized())


def is_partition(p: Tensor, original: nn.Parameter) -> bool:
    """Return whether p is a partition of ZeRO that can hold a part of this parameter.

    Args:
        p: What the optimizer is given.
        original: A parameter of the model.

    Returns:
        False if they are one tensor, or if the parameter has no marks of ZeRO.
    """
    return p is not original and (hasattr(original, "_hp_mapping") or hasattr(original, "ds_tensor"))


def fragments_of(flat: Tensor, named: Sequence[tuple[str, nn.Parameter]]) -> list[Fragment]:
    """Return the fragments of a partition; all ranks call this together.

    Args:
        flat: The partition, 1-D.
        named: Names and parameters of the model that may have a part in it, in the model's order.

    Returns:
        The fragments in the model's order, the empty ones too.

    Raises:
        RuntimeError: The partition is on another device than the parameters (offload), or has them in another order.
    """
    device = named[0][1].device
    if flat.device.type != device.type:
        raise RuntimeError(
            f"DeepSpeed stores the optimizer's partition on {flat.device} and the model on {device}: symlm does not "
            'run offloaded; remove "offload_optimizer" from the DeepSpeed configuration'
        )
    stage_3 = hasattr(named[0][1], "ds_tensor")
    places = [] if stage_3 else [p.data_ptr() for _, p in named]  # its marks are of the model's order, whatever its own
    if places != sorted(places):
        raise RuntimeError(
            "DeepSpeed stores the parameters in another order than it says where they are: remove "
            '"round_robin_gradients", which is for an offloaded optimizer'
        )
    parts = [(name, p, *part) for name, p in named if (part := _part_of_3(p, flat) if stage_3 else _part_of_1_and_2(p))]
    group = _group_of(parts[0][1]) if parts else None
    of_ranks = intervals_of_all([interval for *_, interval, _ in parts], group, flat.device)
    return [
        Fragment(name, offset, offset + stop - start, Layout(whole_shape(p), intervals, shards=group))
        for (name, p, (start, stop), offset), intervals in zip(parts, of_ranks, strict=True)
    ]


Part = tuple[tuple[int, int], int]  # [start, stop) of the flat parameter, and where in the partition it begins


def _part_of_1_and_2(p: Any) -> Part:
    """Return this rank's part under ZeRO-1 and 2, empty for a parameter without one."""
    if p._hp_mapping is None:
        return (0, 0), 0
    in_parameter, in_partition = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
    return (in_parameter.start, in_parameter.start + in_parameter.numel), in_partition.start


def _part_of_3(p: Any, flat: Tensor) -> Part | None:
    """Return this rank's part under ZeRO-3, ⌈numel / world⌉ elements without padding; None in another sub-group."""
    zero = p._z3_optimizer
    subgroup, offset, size = zero.grad_position[zero.get_param_id(p)]
    if zero.fp32_partitioned_groups_flat[subgroup] is not flat:
        return None
    start = min(rank_in(_group_of(p)) * size, p.ds_numel)
    return (start, min(start + size, p.ds_numel)), offset


def _group_of(p: Any) -> Any:
    """Return the process group over which ZeRO partitions a parameter."""
    return p.ds_process_group if hasattr(p, "ds_tensor") else p._dp_group
