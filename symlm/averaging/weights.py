"""The weights that an average is of: those of an optimizer, whose state has a place for the average beside them."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from symlm.distributed.partitions import deepspeed_runs
from symlm.polar.precision import accumulation_dtype

STATES = ("tail_mean", "iterate", "mean_step")  # what averages store beside an optimizer's own


class StepFollower:
    """Act behind every step of an optimizer, and count the steps in its first group, where checkpoints have them.

    Args:
        optimizer: Any of torch's or symlm's.
        key: The count's key in the group.

    Raises:
        RuntimeError: DeepSpeed runs in this process.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, key: str) -> None:
        refuse_partitions()
        self.optimizer, self._key = optimizer, key
        self._aside: dict[Tensor, dict[str, Any]] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    @property
    def steps(self) -> int:
        """How many steps were followed."""
        return int(self.optimizer.param_groups[0].get(self._key, 0))

    @torch.no_grad()
    def _before_step(self) -> None:
        """Set aside what averages store of parameters that no step has reached: torch's begin at an empty state."""
        for p in averaged(self.optimizer):
            state = self.optimizer.state.get(p)
            if state and state.keys() <= set(STATES):
                self._aside[p] = self.optimizer.state.pop(p)

    @torch.no_grad()
    def _after_step(self) -> None:
        for p, state in self._aside.items():
            self.optimizer.state[p] |= state
        self._aside = {}
        self.optimizer.param_groups[0][self._key] = self.steps + 1
        self._follow()

    def _follow(self) -> None:
        """Do what is to be done behind a step, without gradients."""
        raise NotImplementedError

    def remove(self) -> None:
        """Follow the optimizer no more."""
        for hook in self._hooks:
            hook.remove()


def refuse_partitions() -> None:
    """Refuse to average where weights are not in the model's parameters.

    Raises:
        RuntimeError: DeepSpeed runs, which steps partitions of its own and copies them into the parameters.
    """
    if deepspeed_runs():
        raise RuntimeError("averages are of whole weights or DTensors, and DeepSpeed has partitions: use DDP or FSDP2")


def averaged(optimizer: torch.optim.Optimizer, excluded: Collection[str] = ()) -> list[Tensor]:
    """Return the parameters of an optimizer, in its order.

    Args:
        optimizer: Any of torch's or symlm's.
        excluded: Roles that are left out; a group without a role is not.

    Returns:
        The parameters.

    Raises:
        RuntimeError: As `refuse_partitions`.
    """
    refuse_partitions()
    groups = [group for group in optimizer.param_groups if group.get("role") not in excluded]
    return [p for group in groups for p in group["params"]]


def wide_copy(p: Tensor) -> Tensor:
    """Return a copy of a weight in fp32 or wider, in which small shares of it do not vanish."""
    return p.detach().to(accumulation_dtype(p.dtype), copy=True)


def stored(state: dict[str, Any], key: str, first: Tensor) -> Tensor:
    """Return a tensor of a parameter's state, and have it there from now on, so that checkpoints have it too.

    Args:
        state: The parameter's state.
        key: The tensor's name.
        first: Its first value; torch's optimizers load a state in their parameter's dtype, and this has the right one.
    """
    state[key] = state[key].to(first.dtype) if key in state else first.clone()
    return state[key]


def with_steps(total_steps: int, **shares: float) -> list[int]:
    """Return shares of a run as steps.

    Args:
        total_steps: The steps of the run.
        shares: By name, from 0 to 1.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be the number of the run's steps, got {total_steps!r}")
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {share!r}")
    return [round(float(share) * total_steps) for share in shares.values()]


@contextmanager
def swapped(parameters: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Give parameters other values, and their own again afterwards, bit for bit.

    Args:
        parameters: The parameters.
        values: A value for each, in any dtype.
    """
    with torch.no_grad():
        own = [p.detach().clone() for p in parameters]
    try:
        write(parameters, values)
        yield
    finally:
        write(parameters, own)


@torch.no_grad()
def write(parameters: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into parameters.

    Args:
        parameters: The parameters, none or more.
        values: A value for each, in any dtype.
    """
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
