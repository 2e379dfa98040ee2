"""The tail average: a mean of the last weights, which is evaluated and saved in the place of the last ones."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from symlm.averaging.weights import StepFollower, averaged, stored, swapped, wide_copy, with_steps, write
from symlm.roles.role import Role
from symlm.routing.options import refuse_unknown


class TailAverage(StepFollower):
    """Average the weights of a run's tail: `E <- E + (W − E)/h` behind every step, `(1 − s)·W + s·E` is evaluated.

    Nothing has to be called while training: it follows `optimizer.step()`. The mean E is a state of the optimizer,
    `tail_mean`, in fp32: it is saved, loaded and sharded with it, and so is the number of steps. No weight that is
    trained is ever changed. Being linear in W it has any group's symmetry.

    Args:
        optimizer: Any of torch's or symlm's, before or after its model is sharded; not under DeepSpeed.
        total_steps: The steps of the run.
        start: The share of the run at which the tail begins, E = W.
        horizon: The mean's horizon h, as a share of the run.
        share: The share s of E in what is evaluated.
        excluded: Roles whose weights are not averaged.

    Raises:
        ValueError: A share is not from 0 to 1, there are no steps, or `excluded` is text or names no role.

    Source:
        The record of modded-nanogpt, track 3: 0.83, 0.05, 0.6, without the embedding.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        start: float = 0.83,
        horizon: float = 0.05,
        share: float = 0.6,
        excluded: Collection[str] = ("embedding",),
    ) -> None:
        if isinstance(excluded, str):
            raise ValueError(f"excluded must be a collection of roles such as ('embedding',), got {excluded!r}")
        for role in excluded:
            refuse_unknown("role", role, [str(known) for known in Role])
        self.share, self.excluded = share, tuple(excluded)
        self.first, steps, _ = with_steps(total_steps, start=start, horizon=horizon, share=share)
        self.horizon = max(1, steps)
        super().__init__(optimizer, "tail_steps")

    def _follow(self) -> None:
        """Behind a step, take the weights into their mean, if the tail has begun."""
        parameters = averaged(self.optimizer, self.excluded)
        means = [stored(self.optimizer.state[p], "tail_mean", wide_copy(p)) for p in parameters]
        if self.steps >= self.first and means:
            weight = 1.0 if self.steps == self.first else 1 / self.horizon
            torch._foreach_lerp_(means, [p.to(E.dtype) for p, E in zip(parameters, means, strict=True)], weight)

    def _values(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters with a mean, and what is evaluated in their place."""
        if self.steps < self.first:
            return [], []
        parameters, state = averaged(self.optimizer, self.excluded), self.optimizer.state
        return parameters, [wide_copy(p).lerp_(state[p]["tail_mean"], self.share) for p in parameters]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the averaged weights in the model, to evaluate or save them; the trained ones come back afterwards.

        All ranks enter and leave together where parameters are sharded.
        """
        with swapped(*self._values()):
            yield

    @torch.no_grad()
    def finish(self) -> None:
        """Write the averaged weights into the model for good: the last thing of a run."""
        write(*self._values())
