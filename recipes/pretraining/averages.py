"""Averages over steps in a run: steps from a point ahead, and the mean of the tail that is evaluated and saved."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from pretraining.config import TrainConfig
from symlm.averaging import EMANesterov, TailAverage


class Averages:
    """Those of `symlm.averaging` that a run asks for; none cost nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer, train: TrainConfig) -> None:
        steps = train.steps
        self.ahead = EMANesterov(optimizer, steps, reach=train.look_ahead) if train.look_ahead else None
        self.tail = TailAverage(optimizer, steps) if train.tail_average else None  # behind it, so that it sees iterates

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Have those weights in the model that would be saved now."""
        with ExitStack() as stack:
            if self.ahead:
                stack.enter_context(self.ahead.paused())
            if self.tail:
                stack.enter_context(self.tail.applied())
            yield

    def finish(self) -> None:
        """Leave the weights in the model that are saved."""
        if self.tail:
            self.tail.finish()
