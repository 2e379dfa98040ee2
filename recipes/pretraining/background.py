"""Checkpoints that are written while the run goes on: the state is copied at once, and files are made of the copy."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import symlm

STATES = "states"  # the folder of weights and optimizer, in torch's distributed format; all else is accelerate's
warnings.filterwarnings("ignore", "torch.distributed is disabled", module="torch.distributed.checkpoint")


class Background:
    """Write one checkpoint at a time behind a run.

    Args:
        accelerator: The run's; its processes have a group of their own here, since a group's exchanges have one order.

    Raises: ValueError under DeepSpeed, which writes its own files, and for an optimizer that may have no state: torch
        would make a step to have one.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type.value == "DEEPSPEED":
            raise ValueError("train.async_save: DeepSpeed writes its own files, before it goes on: leave it out")
        if not isinstance(accelerator._optimizers[0].optimizer, symlm.SymOptimizer):
            raise ValueError("train.async_save copies the state of SymOptimizer, and AGD has none: leave it out")
        self.several = accelerator.num_processes > 1
        self.group = dist.new_group(backend="gloo") if self.several else None
        self.sealing = ThreadPoolExecutor(1, "sealing")
        self._writing: list[Future] = []

    def save(self, accelerator: Accelerator, folder: Path, seal: Callable[[], None]) -> None:
        """Copy the state of all processes, and return; files are written behind it.

        Args:
            accelerator: The run's.
            folder: What is written.
            seal: What the main process does when all processes have written all.
        """
        with _without_states(accelerator):
            accelerator.save_state(str(folder))
        accelerator.wait_for_everyone()
        made = folder.stat().st_ino
        states, place = _states(accelerator), folder / STATES
        writing = dcp.async_save(states, checkpoint_id=place, process_group=self.group, no_dist=not self.several)
        self._writing = [writing]

        def whole() -> None:
            writing.result()
            if folder.stat().st_ino != made:
                raise FileNotFoundError(f"{folder} was moved away while it was written")
            seal()

        if accelerator.is_main_process:
            self._writing.append(self.sealing.submit(whole))

    def finish(self) -> None:
        """Wait until nothing is being written.  Raises: what writing has raised."""
        writing, self._writing = self._writing, []
        for future in writing:
            future.result()


def read_states(accelerator: Accelerator, folder: Path) -> None:
    """Load a checkpoint of either kind."""
    if not (folder / STATES).exists():
        accelerator.load_state(str(folder))
        return
    states = _states(accelerator)
    dcp.load(states, checkpoint_id=folder / STATES, no_dist=accelerator.num_processes == 1)
    model, optimizer = accelerator._models[0], accelerator._optimizers[0].optimizer
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    with _without_states(accelerator):  # behind the above, which may draw random numbers
        accelerator.load_state(str(folder))


def _states(accelerator: Accelerator) -> dict[str, Any]:
    model, optimizer = get_state_dict(accelerator._models[0], accelerator._optimizers[0].optimizer)
    return {"model": model, "optimizer": optimizer}


@contextmanager
def _without_states(accelerator: Accelerator) -> Iterator[None]:
    """Have accelerate save or load, in a `with` block, what is neither the model's nor the optimizer's."""
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers
