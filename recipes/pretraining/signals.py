"""Signals that ask a run to end: it ends behind the step in hand, with a checkpoint, and goes on when started again."""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, a scheduler's end, what some send before it
PATIENCE = 5  # seconds: a terminal's Ctrl-C comes twice, from it and from the launcher


class Stop:
    """Notice signals while a `with` block runs; one more after `PATIENCE` seconds ends the process at once.

    Args:
        accelerator: The run's; its processes end at the same step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.asked: int | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._notice) for number in ASKING}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._when = number, time.monotonic()
            name = signal.Signals(number).name
            self.accelerator.print(f"{name}: the run ends behind a step, with a checkpoint; again to end it at once")
        elif time.monotonic() - self._when > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, waiting: bool) -> bool:
        """Return whether the run ends here.

        Args:
            waiting: Whether the processes wait for each other anyway, as where they log: several agree there alone, the
                same on all of them.
        """
        if self.accelerator.num_processes == 1:
            return self.asked is not None
        if not waiting:
            return False
        flag = torch.tensor(float(self.asked or 0), device=self.accelerator.device)
        self.asked = int(self.accelerator.gather(flag[None]).max().item()) or None
        return self.asked is not None
