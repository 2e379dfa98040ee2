"""One run of pretrain.py as data: the YAML files' and the command line's fields, and how they are read."""

import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from accelerate.tracking import get_available_trackers
from jsonargparse import ArgumentParser

from pretraining import corpus


def at_least(minimum: float, fields: dict[str, Any]) -> None:
    """Raises: ValueError, with the field's name, for a value below the minimum."""
    for name, value in fields.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} is at least {minimum}, got {value}")


@dataclass
class DataConfig:
    """The text.

    Args:
        dataset: "stdlib" (embedded), "installed" or "installed-prose" (packages), a local file or folder (text, JSONL,
            Parquet, .bin shards), or a Hub name.
        subset: the Hub dataset's configuration.
        column: where JSONL, Parquet and Hub datasets have their text.
        tokenizer: a Hub name or a path; none trains a byte-level BPE on the text, but for Hub datasets, which need one.
        vocab_size: of that BPE; of .bin shards without a tokenizer, the model's.
        length: tokens of a block.
        validation_blocks: how many blocks are held out; fewer, with a warning, if the text has fewer.
    """

    dataset: str = corpus.EMBEDDED
    subset: str | None = None
    column: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 4096
    length: int = 256
    validation_blocks: int = 128

    def __post_init__(self) -> None:
        at_least(2, {"data.length": self.length})  # the last token of a block has no next one to predict
        at_least(1, {"data.validation_blocks": self.validation_blocks})


@dataclass
class ModelConfig:
    """The network.

    Args:
        preset: a name in recipes/pretraining/models.py.
        config: a Hugging Face config instead, by name or path.
        sizes: fields of either to change, for example '{"num_hidden_layers": 2}'.
        compile: compile it with torch.compile.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
    """

    preset: str = "qwen3-tiny"
    config: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    compile: bool = False
    gradient_checkpointing: bool = False


@dataclass
class OptimizerConfig:
    """As `symlm.SymOptimizer`: one dial, a table by name, absolute values by role.

    Args:
        algorithm: "symlm", or "agd": its options are `symlm.agd.AGD`'s, it starts semi-orthogonal, gains frozen.
        lr: the one dial; every role's rate is a multiple of it.
        preset: the table of roles and rules, for example "muon".
        overrides: absolute values by role, for example '{"lm_head": {"lr": 5e-3}}'.
        options: defaults of every role, for example '{"momentum": 0.95}'.
    """

    algorithm: str = "symlm"
    lr: float = 0.02
    preset: str = "default"
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """The run.

    Args:
        steps: how many.
        batch: blocks of a process's batch.
        accumulate: batches of a step.
        schedule: "linear" (warm-up, constant, then linear to zero), "power" (the same to the power 1.2) or "cosine".
        warmup: steps over which the rate grows.
        decay: the part of the run in which a linear or power schedule falls to zero.
        clip: the largest norm of the gradients; it weighs a step inside the momentum. none is no clipping.
        r_target: clip each step to this softmax radius (`symlm.step_control`); 1 survives spikes, none is no control.
        r_over: the position whose radius counts: "max", "mean", or a quantile such as 0.99.
        r_standalone: set every step to r_target, shorter and longer, in the place of a rate and its schedule.
        teleport_every: teleport a SwiGLU model every so many steps (`symlm.teleport`); none is never.
        qk_clip: the largest attention logit, held by `symlm.qk_clip`; none is no bound.
        tail_average: evaluate and save a mean with the last weights of the run (`symlm.averaging.TailAverage`).
        look_ahead: take steps from a point ahead by this share of their long mean (`symlm.averaging.EMANesterov`), 0.3
            in the public record; none takes them from where they are.
        smoothness_every: measure how far the gradient holds along the step, by role, every so many steps
            (`symlm.gradient_smoothness`); none is never.
        load_loss: coefficient of the routers' load loss; the loss that is written is without it.
        z_loss: coefficient of the routers' z-loss; the loss that is written is without it.
        conductor: resolve conflicts of these with the next token's loss (`symlm.gradient_conductor`): "all" losses on
            every batch, or "stochastic", one on each batch of a step; none sums them.
        mixed_precision: "no", "bf16" or "fp16"; none takes the launcher's.
        seed: of the model, the data's order and what is random in the step.
        validate_every: steps between validations.
        log_every: steps between rows of metrics.jsonl.
        save_every: steps between checkpoints.
        keep: how many checkpoints stay.
        async_save: write checkpoints while the run goes on, which then waits for the copy of its state alone; not under
            DeepSpeed, nor of AGD.
        rewind: go back to the last checkpoint, and on with other data, behind so many bad rows of metrics one after the
            other (a loss spike, skipped steps); none is never. Bad rows are reported anyway.
        timeout: seconds that processes wait for one of them, which is frozen or gone, before all end; none is torch's.
        tracker: where the metrics go besides metrics.jsonl, one of accelerate's trackers, or "none".
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
    r_standalone: bool = False
    teleport_every: int | None = None
    qk_clip: float | None = None
    tail_average: bool = False
    look_ahead: float | None = None
    smoothness_every: int | None = None
    load_loss: float = 0.0
    z_loss: float = 0.0
    conductor: Literal["all", "stochastic"] | None = None
    mixed_precision: str | None = None
    seed: int = 42
    validate_every: int = 50
    log_every: int = 10
    save_every: int = 100
    keep: int = 2
    async_save: bool = False
    rewind: int | None = None
    timeout: float | None = None
    tracker: str = "tensorboard"

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "accumulate", "validate_every", "log_every", "save_every", "keep")
        counts += ("teleport_every", "smoothness_every")
        at_least(1, {f"train.{name}": getattr(self, name) for name in counts})
        at_least(0, {f"train.{name}": getattr(self, name) for name in ("warmup", "decay", "load_loss", "z_loss")})
        at_least(1, {"train.timeout": self.timeout, "train.rewind": self.rewind})
        if self.r_standalone and self.r_target is None:
            raise ValueError("train.r_standalone sets every step to train.r_target: give one, for example 0.5")
        if self.tracker not in (installed := ["none", *map(str, get_available_trackers())]):
            raise ValueError(f"train.tracker {self.tracker!r} is not installed or unknown; there are {installed}")


@dataclass
class RunConfig:
    """One run.

    Args:
        name: its folder under `out`.
        out: the folder of runs.
        resume: go on from the last whole checkpoint in the folder; "auto" goes on where there is a run, else begins.
        overwrite: begin anew in a folder that holds a run, which is lost.
        data: the text.
        model: the network.
        optimizer: what updates it.
        train: the run.
    """

    name: str = "default"
    out: str = "runs"
    resume: bool | Literal["auto"] = False
    overwrite: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class Parser(ArgumentParser):
    """jsonargparse's parser, whose error for an unknown key names the nearest one, in any of the parts."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        known = [action.dest for action in self._actions]
        words = [word.strip("'\"`-.,:[]").split("=")[0] for word in str(message).split()]
        unknown = [word for word in words if word.rpartition(".")[2] and word not in known]
        near = [match for word in unknown for match in _near(word, known)] if not set(words) & set(known) else []
        super().error(f"{message}\nDid you mean {near[0]!r}?" if near else message, ex)


def _near(word: str, known: list[str]) -> list[str]:
    """Return the keys that a word may have meant: of the same last part, else of nearly the same letters."""
    part, dot, last = word.rpartition(".")
    alike = [
        key for key in known if dot and part in ("data", "model", "optimizer", "train") and key.endswith(f".{last}")
    ]
    return alike or get_close_matches(word, known, 1, 0.75)


def read(arguments: list[str] | None = None) -> RunConfig:
    """Read the command line, and the YAML files that it names."""
    parser = Parser(description="Pretrain a language model from scratch with symlm.")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig, None)
    try:
        given = parser.parse_args(arguments)
        values = vars(parser.instantiate(given))
    except UnicodeDecodeError as error:
        files = [word for word in arguments or sys.argv[1:] if "--config" in word]
        parser.error(f"{' or '.join(files)} is no UTF-8 text: {error}")
    except ValueError as error:
        parser.error(str(error))
    return RunConfig(**{key: value for key, value in values.items() if key != "config"})
