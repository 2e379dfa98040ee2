"""The gradients of the next token's loss and of the routers' losses, conducted to one."""

from typing import Any

from accelerate import Accelerator
from torch import nn

from pretraining.config import TrainConfig
from pretraining.routers import Routers
from symlm.gradient_conductor import GradientConductor


class Conducting:
    """Accumulate each loss's gradient apart and resolve their conflicts: `train.conductor`, "all" or "stochastic".

    Raises: ValueError for one loss alone, for batches that cannot be dealt out, and where gradients cannot be read.
    """

    def __init__(self, model: nn.Module, routers: Routers, train: TrainConfig, accelerator: Accelerator) -> None:
        names = routers.trained
        if len(names) < 2:
            raise ValueError(
                "train.conductor needs two losses, and this run has one: set train.load_loss or train.z_loss"
            )
        if train.conductor == "stochastic" and train.accumulate % len(names):
            raise ValueError(
                f"train.conductor=stochastic gives each of {len(names)} losses a part of the batches: train.accumulate "
                f"must be a multiple of that, got {train.accumulate}"
            )
        if accelerator.distributed_type.value == "DEEPSPEED" or accelerator.mixed_precision == "fp16":
            raise ValueError(
                "train.conductor reads gradients, which DeepSpeed partitions and fp16 scales: use one process, DDP or "
                "FSDP2, and bf16 or no mixed precision"
            )
        self.routers, self.is_dealt = routers, train.conductor == "stochastic"
        self.conductor, self.wins = GradientConductor(model, names), dict.fromkeys(names, 0)

    def backward(self, output: Any, turn: int, accelerator: Accelerator) -> None:
        """Run the backward passes of a step's turn-th batch: of all losses, or of the one whose turn it is."""
        losses = self.routers.losses(output)
        if self.is_dealt:
            name = list(losses)[turn % len(losses)]
            losses = {name: losses[name] * len(losses)}  # of so many times fewer passes
        self.conductor.backward(losses, accelerator.backward, output.loss)

    def resolve(self) -> bool:
        """Write the conducted gradient; return whether all gradients were finite: if not, the step is skipped."""
        report = self.conductor.step()
        for conflict in report.conflicts:
            self.wins[conflict.winner] += 1
        return report.finite

    def metrics(self) -> dict[str, float]:
        """Return the last step's lowest cosine and norms, and the conflicts that each loss won since the last call."""
        report = self.conductor.last
        if report is None:
            return {}
        wins, self.wins = self.wins, dict.fromkeys(self.wins, 0)
        return {
            "conductor/cosine": report.cosine,
            "conductor/skipped_steps": self.conductor.skipped_steps,
            **{f"conductor/norm/{name}": norm for name, norm in report.norms.items()},
            **{f"conductor/wins/{name}": count for name, count in wins.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        return {"conductor": self.conductor.state_dict(), "wins": dict(self.wins)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.conductor.load_state_dict(state["conductor"])
        self.wins = dict(state["wins"])
