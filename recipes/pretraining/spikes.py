"""Loss spikes and skipped steps: which role's gradient or update stood out, and back to a checkpoint from several."""

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median, pstdev
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pretraining.checkpoints import Checkpoints
from pretraining.config import TrainConfig
from pretraining.folder import forget_after, write
from symlm.distributed.tensors import local

ROWS = 20  # good rows of metrics that a row is compared with; there must be half as many
SPREADS = 6  # standard deviations of the loss above its median that are a spike
TRIES = 3  # times that a run goes back to one checkpoint


class Spikes:
    """Compare every row of metrics with the rows before.

    Args:
        optimizer: Whose groups have a role; the norms of their gradients are taken before clipping.
        accelerator: The run's.
        train: How many bad rows in a row ask for going back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, accelerator: Accelerator, train: TrainConfig) -> None:
        self.optimizer, self.accelerator, self.train = optimizer, accelerator, train
        self.streak, self.passed = 0, 0
        self._skipped = 0
        self._before: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=ROWS))
        self._norms: Tensor | None = None
        self._tries: dict[int, int] = defaultdict(int)

    @torch.no_grad()
    def look(self) -> None:
        """Take the norms of a step's gradients, the largest since the last row, without waiting for a device."""
        norms = torch.stack([self._norm(role) for role in self._roles()])
        self._norms = norms if self._norms is None else torch.maximum(self._norms, norms)  # in which a NaN stays

    def judge(self, row: dict[str, Any]) -> None:
        """Compare a row, and report a spike, a loss that is none, skipped steps; all processes call this together."""
        if self._norms is None:  # a conductor that found gradients to be not finite made no step
            self._norms = torch.full((len(self._roles()),), torch.nan, device=self.accelerator.device)
        norms = self.accelerator.gather(self._norms[None]).amax(0).tolist()
        sizes = {f"gradient of {role}": norm for role, norm in zip(self._roles(), norms, strict=True)}
        sizes |= {
            f"update of {k.removeprefix('update_rms/')}": x for k, x in row.items() if k.startswith("update_rms/")
        }
        self._norms, losses = None, self._before["loss"]
        skipped, self._skipped = row.get("skipped_steps", 0) - self._skipped, row.get("skipped_steps", 0)
        loss = row["train/loss"]
        usual = median(losses) if losses else loss
        limit = usual + max(SPREADS * pstdev(losses), 0.01 * usual) if len(losses) >= ROWS // 2 else math.inf
        if loss <= limit and not skipped and math.isfinite(loss):
            self.streak = 0
            for key, size in {"loss": loss, **sizes}.items():
                self._before[key].append(size)
            return
        self.streak += 1
        lost = f", {skipped} steps skipped" if skipped else ""
        self.accelerator.print(f"step {row['step']}: loss {loss:.3f} after {usual:.3f}{lost}; {self._stood_out(sizes)}")

    @property
    def doubtful(self) -> bool:
        """Whether a checkpoint would be of a state that the run may want to leave."""
        return bool(self.train.rewind and self.streak)

    def go_back(self, checkpoints: Checkpoints, folder: Path, row: dict[str, Any], hopeless: bool) -> int | None:
        """Load the last whole checkpoint if it is time, from which the run goes on with the data behind `row`.

        Args:
            checkpoints: The run's.
            folder: Of its metrics.
            row: The last one.
            hopeless: Whether the run would end here otherwise.

        Returns: The checkpoint's step; None where the run goes on as it is.

        Raises: SystemExit where going back did not help several times.
        """
        if not self.train.rewind or (self.streak < self.train.rewind and not hopeless):
            return None
        step = row["step"]
        consumed = step + self.passed
        back = checkpoints.load(self.accelerator)  # and with it the rows that were before it
        self.streak = 0
        if not back:
            self.accelerator.print(f"step {step}: there is no checkpoint yet to go back to")
            return None
        self.passed = consumed - back
        self._tries[back] += 1
        if self._tries[back] > TRIES:
            raise SystemExit(
                f"the run went back to step {back} {TRIES} times, with other data each time, and stays bad: try a "
                "smaller optimizer.lr, or go on from an earlier checkpoint"
            )
        self.accelerator.print(f"step {step}: back to step {back}, and on with other data")
        if self.accelerator.is_main_process:
            forget_after(back, folder)
        write({"step": back, "tokens": row["tokens"] * back // step, "rewind/from": step}, folder, self.accelerator)
        return back

    def batches(self, loader: DataLoader, first: int) -> Iterator[Tensor]:
        """Yield the batches behind `first` steps and those passed over; in a run that goes back, round and round."""
        if not self.train.rewind:  # with which the count is in the checkpoint
            self._skipped = getattr(self.optimizer, "skipped_steps", 0)
        consumed = (first + self.passed) * self.train.accumulate
        goes_round = self.train.rewind and not isinstance(loader.dataset, IterableDataset)  # whose length nobody knows
        skipped = consumed % len(loader) if goes_round else consumed
        yield from self.accelerator.skip_first_batches(loader, skipped) if skipped else loader
        batch: Tensor | None = None
        while self.train.rewind:
            for batch in loader:
                yield batch
            if batch is None:
                return

    def state_dict(self) -> dict[str, Any]:
        rows = {key: list(sizes) for key, sizes in self._before.items()}
        return {"passed": self.passed, "streak": self.streak, "skipped": self._skipped, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passed, self.streak, self._skipped = state["passed"], state["streak"], state["skipped"]
        self._before.clear()
        for key, sizes in state["rows"].items():
            self._before[key].extend(sizes)

    def _roles(self) -> list[str]:
        return list(dict.fromkeys(group.get("role", "all") for group in self.optimizer.param_groups))

    def _norm(self, role: str) -> Tensor:
        groups = [group for group in self.optimizer.param_groups if group.get("role", "all") == role]
        gradients = [local(p.grad) for group in groups for p in group["params"] if p.grad is not None]
        if not gradients:  # DeepSpeed has them in places of its own
            return torch.zeros((), device=self.accelerator.device)
        return torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]).norm()

    def _stood_out(self, sizes: dict[str, float]) -> str:
        """Return what is not finite, or else what is largest beside its median."""
        if bad := [what for what, size in sizes.items() if not math.isfinite(size)]:
            return f"not finite: {', '.join(bad)}"
        usual = {what: median(self._before[what]) for what in sizes if self._before[what]}
        times = {what: sizes[what] / size for what, size in usual.items() if size > 0}
        largest = max(times, key=times.__getitem__, default=None)
        return (
            f"the {largest} stood out most, {times[largest]:.1f} times its usual" if largest else "nothing to compare"
        )
