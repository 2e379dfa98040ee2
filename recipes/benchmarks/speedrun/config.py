"""One run of the benchmark as data: the arms' dials, the text, the batch, and how they are read."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pretraining.config import OptimizerConfig, Parser, at_least

from benchmarks.speedrun.model import ModelConfig


@dataclass
class ArmConfig:
    """An optimizer and its schedule.

    Args:
        steps: of the whole schedule.
        warmup: steps over which the rate grows.
        schedule: "linear", "power" or "cosine", as in pretrain.py.
        decay: the part of the run in which it falls to zero.
        optimizer: the table and its dials.
    """

    steps: int = 3250
    warmup: int = 0
    schedule: Literal["linear", "power", "cosine"] = "linear"
    decay: float = 0.7
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        at_least(1, {"steps of an arm": self.steps})
        at_least(0, {"warmup of an arm": self.warmup, "decay of an arm": self.decay})


@dataclass
class TextConfig:
    """The text, its batch and its validation; a figure is comparable at these defaults alone.

    Args:
        train: shards, a path with wildcards.
        validation: shards, a path with wildcards.
        batch: tokens of a step, of all processes.
        length: tokens of a sequence.
        validation_tokens: how many, from the first shard's beginning.
        validate_every: steps between validations.
        validate_late: the same in the last tenth of the run.
    """

    train: str = "data/fineweb10B/fineweb_train_*.bin"
    validation: str = "data/fineweb10B/fineweb_val_*.bin"
    batch: int = 524_288
    length: int = 1024
    validation_tokens: int = 10_485_760
    validate_every: int = 125
    validate_late: int = 25

    def __post_init__(self) -> None:
        at_least(1, {f"data.{key}": value for key, value in asdict(self).items() if isinstance(value, int)})


@dataclass
class SpeedrunConfig:
    """A run of one arm, or the table of those that are there.

    Args:
        arm: a name in `arms`.
        arms: optimizers with their schedules, by name.
        steps: instead of the arm's: a shorter or longer schedule.
        seed: of the initialization and of what is random in a step; the text's order is always the same.
        out: the folder of logs and results.
        table: print the table of `out`, and train nothing.
        compile: compile the model with torch.compile.
        micro_batch: sequences of one forward and backward pass on one process.
        data: the text.
        model: the network.
    """

    arm: str = "default"
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    steps: int | None = None
    seed: int = 0
    out: str = "runs/speedrun"
    table: bool = False
    compile: bool = False
    micro_batch: int = 64
    data: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        at_least(1, {"steps": self.steps, "micro_batch": self.micro_batch})
        if not self.table and self.arm not in self.arms:
            raise ValueError(
                f"no arm {self.arm!r}; there are {sorted(self.arms)}: give --config recipes/configs/bench/speedrun.yaml"
            )

    @property
    def chosen(self) -> ArmConfig:
        """The arm that runs, at the steps that were asked for."""
        arm = self.arms[self.arm]
        return replace(arm, steps=self.steps or arm.steps)

    def settings(self) -> dict[str, Any]:
        """Return what runs of one arm must have in common, so that their mean is of one thing."""
        return {"arm": asdict(self.chosen), "data": asdict(self.data), "model": asdict(self.model)}

    def check_parts(self, processes: int) -> None:
        """Refuse a batch that processes and passes cannot share.

        Args:
            processes: how many.

        Raises: ValueError with the numbers.
        """
        part = self.micro_batch * self.data.length * processes
        for name in ("batch", "validation_tokens"):
            if (tokens := getattr(self.data, name)) % part:
                raise ValueError(
                    f"data.{name} {tokens:,} is no multiple of {processes} processes × micro_batch {self.micro_batch} "
                    f"× data.length {self.data.length}: set another micro_batch or number of processes"
                )


def read(arguments: list[str] | None = None) -> SpeedrunConfig:
    """Read the command line, and the YAML file that it names.

    Args:
        arguments: the command line's words; none takes the process's.

    Returns: The configuration.
    """
    parser = Parser(description="Steps to a validation loss of 3.28: modded-nanogpt's optimization track.")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(SpeedrunConfig, None)
    try:
        values = vars(parser.instantiate(parser.parse_args(arguments)))
        return SpeedrunConfig(**{key: value for key, value in values.items() if key != "config"})
    except ValueError as error:
        parser.error(str(error))
