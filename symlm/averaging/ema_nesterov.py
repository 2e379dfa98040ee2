"""EMA-Nesterov: steps are taken from a point ahead, by a share of the long mean of steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from symlm.averaging.weights import StepFollower, averaged, stored, swapped, wide_copy, with_steps


class EMANesterov(StepFollower):
    """Extrapolate by a long mean of steps: `x <- A(x + βm)`, `m <- γm + (1 − γ)(x_new − x)`, A the optimizer's step.

    m is the mean from the first step on, and β is 0 before `start` and after `until`. Nothing has to be called while
    training: it follows `optimizer.step()`, behind which the model has the weights `x + βm` that the next gradient is
    of. x and m are states of the optimizer, `iterate` and `mean_step`, in fp32: saved, loaded and sharded with it, and
    so is the number of steps. β follows the schedule, `β = reach·η/η₀` with η₀ the `initial_lr` of torch's schedulers;
    it must be over before the rate is small. Being linear in the weights it has any group's symmetry.

    Args:
        optimizer: Any of torch's or symlm's, before or after its model is sharded; not under DeepSpeed.
        total_steps: The steps of the run.
        reach: The largest β.
        decay: The mean's decay γ.
        start: The share of the run at which looking ahead begins.
        until: The share at which it ends.

    Raises:
        ValueError: A share is not from 0 to 1, or there are no steps to extrapolate in.

    Source:
        arXiv 2605.25395; modded-nanogpt, track 3: 0.3 and 0.99 from step 300 to 1,950 of 2,900.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        reach: float = 0.3,
        decay: float = 0.99,
        start: float = 0.1,
        until: float = 0.65,
    ) -> None:
        self.reach, self.decay = reach, decay
        self.first, self.last, *_ = with_steps(total_steps, start=start, until=until, reach=reach, decay=decay)
        if start >= until:
            raise ValueError(f"a look-ahead begins before it ends: start must be below until, got {start} and {until}")
        super().__init__(optimizer, "ahead_steps")

    @torch.no_grad()
    def _before_step(self) -> None:
        """Before a parameter's first step, remember the weight that it begins at."""
        for p in averaged(self.optimizer) if self.steps < self.last else ():
            if "iterate" not in (state := self.optimizer.state[p]):
                state["iterate"] = wide_copy(p)
        super()._before_step()

    @property
    def is_ahead(self) -> bool:
        """Whether the model has the point ahead between two steps."""
        return self.first <= self.steps < self.last

    def beta(self) -> float:
        """Return β of the step to come, by the rate of the last."""
        group = self.optimizer.param_groups[0]
        initial = group.get("initial_lr", group["lr"])
        return self.reach * float(group["lr"] / initial) if initial else 0.0

    def _follow(self) -> None:
        """Behind a step, take it into the mean and extrapolate for the next."""
        if self.steps > self.last:
            return
        for p in averaged(self.optimizer):
            x, state = wide_copy(p), self.optimizer.state[p]
            m, before = stored(state, "mean_step", torch.zeros_like(x)), stored(state, "iterate", x)
            m.lerp_(x - before, 1 - self.decay)
            state["iterate"] = x
            if self.is_ahead:
                p.copy_(x.add(m, alpha=self.beta()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Have the iterate x in the model, to evaluate or save it; the point ahead comes back afterwards."""
        parameters = averaged(self.optimizer) if self.is_ahead else []
        with swapped(parameters, [self.optimizer.state[p]["iterate"] for p in parameters]):
            yield
