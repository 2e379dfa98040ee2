"""One run of pretrain.py as data: the YAML files' and the command line's fields, and how they are read."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import corpus
from jsonargparse import ArgumentParser


@dataclass
class DataConfig:
    """dataset: "stdlib" (embedded), a local file or folder (text, JSONL, Parquet, .bin shards), or a Hub name."""

    dataset: str = corpus.EMBEDDED
    subset: str | None = None
    column: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 4096
    length: int = 256
    validation_blocks: int = 128
    held_out: int = 500


@dataclass
class ModelConfig:
    """preset: a name in architectures.py; config: a Hugging Face config instead, by name or path.

    sizes: fields of either to change.
    """

    preset: str = "qwen3-tiny"
    config: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    compile: bool = False
    gradient_checkpointing: bool = False


@dataclass
class OptimizerConfig:
    """As `symlm.SymOptimizer`: one dial, a table by name, absolute values by role.

    algorithm: "symlm", or "agd", whose options are `symlm.agd.AGD`'s and which starts semi-orthogonal, gains frozen.
    """

    algorithm: str = "symlm"
    lr: float = 0.02
    preset: str = "default"
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """schedule: "linear" (warm-up, constant, then linear to zero over `decay` of the steps) or "cosine".

    r_target: clip each step to this softmax radius (`symlm.step_control`); 1 survives spikes, none is no control.
    r_over: the position whose radius counts: "max", "mean", or a quantile such as 0.99.
    teleport_every: teleport a SwiGLU model every so many steps (`symlm.teleport`); none is never.
    mixed_precision: "no", "bf16" or "fp16"; none is what the launcher was told.
    load_loss, z_loss: coefficients of the routers' auxiliary losses; the loss that is written is without them.
    """

    steps: int = 400
    batch: int = 8
    accumulate: int = 1
    schedule: str = "linear"
    warmup: int = 10
    decay: float = 0.4
    clip: float | None = None
    r_target: float | None = None
    r_over: float | str = "max"
    teleport_every: int | None = None
    load_loss: float = 0.0
    z_loss: float = 0.0
    mixed_precision: str | None = None
    seed: int = 42
    validate_every: int = 50
    log_every: int = 10
    save_every: int = 100
    keep: int = 2
    tracker: str = "tensorboard"


@dataclass
class RunConfig:
    """One run; its name is its folder under `runs`."""

    name: str = "default"
    out: str = "runs"
    resume: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class Parser(ArgumentParser):
    """jsonargparse's parser, whose error for an unknown key names the nearest one."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        known = [action.dest for action in self._actions]
        words = [word.strip("'\"`-.,[]").split("=")[0] for word in str(message).split()]
        near = [match for word in words if word not in known for match in get_close_matches(word, known, 1, 0.75)]
        super().error(f"{message}\nDid you mean {near[0]!r}?" if near else message, ex)


def read(arguments: list[str] | None = None) -> RunConfig:
    """Read the command line, and the YAML files that it names."""
    parser = Parser(description="Pretrain a language model from scratch with symlm.")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig, None)
    values = vars(parser.instantiate(parser.parse_args(arguments)))
    return RunConfig(**{key: value for key, value in values.items() if key != "config"})
