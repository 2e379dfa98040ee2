"""Pretrain a language model from scratch with symlm:  accelerate launch recipes/pretrain.py --config file.yaml"""

import json
import math
import platform
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import corpus
import moe
import report
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env, set_seed
from architectures import build_model
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import symlm
from symlm.step_control import StepControl


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
    """As `symlm.SymOptimizer`: one dial, a table by name, absolute values by role."""

    lr: float = 0.02
    preset: str = "default"
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """schedule: "linear" (warm-up, constant, then linear to zero over `decay` of the steps) or "cosine".

    r_target: clip each step to this softmax radius (`symlm.step_control`); 1 survives spikes, none is no control.
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
    load_loss: float = 0.0
    z_loss: float = 0.0
    mixed_precision: str = "no"
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
    parser = Parser(description=__doc__)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig, None)
    values = vars(parser.instantiate(parser.parse_args(arguments)))
    return RunConfig(**{key: value for key, value in values.items() if key != "config"})


def build_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, train.warmup))
        left = (train.steps - step) / train.steps
        if train.schedule == "cosine":
            return warm * 0.5 * (1 - math.cos(math.pi * left))
        return warm * min(1.0, left / max(train.decay, 1e-9))

    if train.schedule not in ("linear", "cosine"):
        raise ValueError(f"unknown schedule {train.schedule!r}; choose 'linear' or 'cosine'")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """Return the mean next-token loss over the validation set; the labels are shifted once, by the model."""
    model.eval()
    losses = [accelerator.gather_for_metrics(model(input_ids=x, labels=x).loss.repeat(len(x))) for x in loader]
    model.train()
    return torch.cat(losses).mean().item()


class Checkpoints:
    """Complete checkpoints `step-N` in a folder: written under another name, renamed when whole, the newest kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def list(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))

    def save(self, accelerator: Accelerator, step: int) -> None:
        temporary = self.folder / "unfinished"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            target = self.folder / f"step-{step}"
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            for old in self.list()[: -self.keep]:
                shutil.rmtree(old)

    def load(self, accelerator: Accelerator) -> int:
        if not self.list():
            return 0
        accelerator.load_state(str(self.list()[-1]))
        return int(self.list()[-1].name.split("-")[1])


def open_folder(config: RunConfig, accelerator: Accelerator) -> Path:
    """Make the run's folder, or check that the one to resume holds this very configuration."""
    folder = Path(config.out) / config.name
    resolved = {key: value for key, value in asdict(config).items() if key != "resume"}
    path = folder / "config.json"
    if config.resume and not path.exists():
        raise ValueError(f"{folder} holds no run to resume")
    if config.resume:
        before = json.loads(path.read_text())
        changed = [key for key in resolved if before.get(key) != resolved[key]]
        if changed:
            raise ValueError(
                f"{folder} was run with another configuration ({changed}); resume with {path}'s, or rename"
            )
    elif accelerator.is_main_process:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(resolved, indent=1))
    accelerator.wait_for_everyone()
    return folder


class Routers:
    """What a model's routers said, where it has any: their losses, and their metrics."""

    def __init__(self, model: torch.nn.Module, train: TrainConfig) -> None:
        self.top_k = getattr(model.config, "num_experts_per_tok", None)
        self.load, self.z = train.load_loss, train.z_loss
        if self.top_k is None and (self.load or self.z):
            raise ValueError(f"{type(model).__name__} has no routers for train.load_loss and train.z_loss")
        if self.top_k:
            model.config.router_aux_loss_coef = 0.0  # transformers' own sums over layers; ours is in moe.py

    @property
    def inputs(self) -> dict[str, bool]:
        return {"output_router_logits": True} if self.top_k else {}

    def loss(self, output: Any) -> torch.Tensor | float:
        return moe.router_loss(output.router_logits, self.top_k, self.load, self.z) if self.load or self.z else 0.0

    def metrics(self, output: Any, accelerator: Accelerator) -> dict[str, Any]:
        """Return each metric's mean over the layers, and the load of every expert, layer by layer."""
        if not self.top_k:
            return {}
        layers = [
            symlm.diagnostics.router_metrics(z.detach(), self.top_k, accelerator.gather) for z in output.router_logits
        ]
        loads = [[round(f, 5) for f in layer.pop("load").tolist()] for layer in layers]
        means = {f"router/{key}": torch.stack([layer[key] for layer in layers]).mean().item() for key in layers[0]}
        return {**means, "router/load": loads}


def prepare_model(config: ModelConfig, tokenizer: Any) -> torch.nn.Module:
    vocabulary, end = (len(tokenizer), tokenizer.eos_token_id) if tokenizer else (None, None)
    model = build_model(config.preset, config.config, config.sizes, vocabulary, end)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def watch(output: Any, optimizer: symlm.SymOptimizer, routers: Routers, accelerator: Accelerator) -> dict[str, Any]:
    """Return what the report draws beside the losses: update RMS by role, logits, routers."""
    logits = output.logits.detach().flatten(0, 1)
    some = logits[torch.linspace(0, len(logits) - 1, min(64, len(logits)), device=logits.device).long()]
    sizes = symlm.diagnostics.logit_metrics(some, accelerator.gather)
    return {
        **{f"update_rms/{role}": rms for role, rms in symlm.diagnostics.update_rms(optimizer).items()},
        **{f"logits/{key}": value.item() for key, value in sizes.items()},
        **routers.metrics(output, accelerator),
    }


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[torch.Tensor],
    routers: Routers,
    accelerator: Accelerator,
    train: TrainConfig,
    control: StepControl | None,
) -> tuple[torch.Tensor, Any]:
    """Take one step over `accumulate` batches; return their mean loss, and what the model said of the last."""
    loss = torch.zeros((), device=accelerator.device)
    for _ in range(train.accumulate):
        x = next(stream, None)
        if x is None:
            raise ValueError(f"the dataset ended before step {train.steps}: use fewer steps")
        with accelerator.accumulate(model):
            output = model(input_ids=x, labels=x, **routers.inputs)
            accelerator.backward(output.loss + routers.loss(output))
            if train.clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), train.clip)
            if control and accelerator.sync_gradients:
                control.step(input_ids=x)
            else:
                optimizer.step()
            optimizer.zero_grad()
        loss += output.loss.detach() / train.accumulate
    return loss, output


def write(row: dict[str, Any], folder: Path, accelerator: Accelerator) -> None:
    """Append a row to the run's metrics, and send its numbers to the tracker."""
    if accelerator.is_main_process:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    accelerator.log({key: value for key, value in row.items() if not isinstance(value, list)}, step=row["step"])


def build_accelerator(config: RunConfig) -> Accelerator:
    """Return the launch's accelerator; without a GPU all its processes take the CPU.

    Under DeepSpeed clipping and accumulation are the engine's, and accelerate would clip at 1 unasked: it is told ours.
    """
    train, deepspeed = config.train, parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,  # which accelerate would turn off
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and deepspeed else [],
        mixed_precision=train.mixed_precision,
        gradient_accumulation_steps=train.accumulate,
        log_with=None if train.tracker == "none" else train.tracker,
        project_dir=str(Path(config.out) / config.name),
        step_scheduler_with_optimizer=False,
    )
    if deepspeed:
        told = {"gradient_clipping": train.clip or 0.0, "gradient_accumulation_steps": train.accumulate}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(told)
    return accelerator


def build_control(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, train: TrainConfig, accelerator: Accelerator
) -> StepControl | None:
    """Return the step control that `train.r_target` asks for.  Raises: ValueError under several processes."""
    if train.r_target is None:
        return None
    if accelerator.num_processes > 1:
        raise ValueError("train.r_target measures a step on one process's batch: use one process, or leave it out")
    return StepControl(model, optimizer, r_target=train.r_target)


def device_name() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )


def summary(optimizer: symlm.SymOptimizer, seconds: list[float]) -> dict[str, Any]:
    """Return what a run cost: seconds of a training step (mean, the first left out), bytes of this process's state."""
    return {
        "seconds_per_step": statistics.fmean(seconds[1:] or seconds or [math.nan]),
        "optimizer_bytes": symlm.diagnostics.state_bytes(optimizer),
        "torch": torch.__version__,
        "device": device_name(),
    }


def main() -> None:
    config = read()
    train = config.train
    accelerator = build_accelerator(config)
    folder = open_folder(config, accelerator)
    set_seed(train.seed)

    samples = train.steps * train.accumulate * train.batch * accelerator.num_processes
    tokenizer, data, validation = corpus.load(config.data, train.seed, samples)
    model = prepare_model(config.model, tokenizer)
    collate = corpus.Collate(model.config.vocab_size)
    routers = Routers(model, train)
    accelerator.print(symlm.describe_routing(model, config.optimizer.preset))
    optimizer = symlm.SymOptimizer(
        model, config.optimizer.lr, config.optimizer.preset, config.optimizer.overrides, **config.optimizer.options
    )
    schedule = build_schedule(optimizer, train)
    if config.model.compile:
        model = torch.compile(model)
    loader = DataLoader(data, batch_size=train.batch, shuffle=False, drop_last=True, collate_fn=collate)
    held = DataLoader(validation, batch_size=train.batch, collate_fn=collate)
    model, prepared, loader, held = accelerator.prepare(model, optimizer, loader, held)
    accelerator.register_for_checkpointing(schedule)
    control = build_control(model, prepared, train, accelerator)

    checkpoints = Checkpoints(folder / "checkpoints", train.keep)
    first = checkpoints.load(accelerator) if config.resume else 0
    if accelerator.is_main_process:
        rows = [row for row in report.read_metrics(folder) if row["step"] <= first] if first else []
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if accelerator.log_with:
        accelerator.init_trackers("tensorboard")
    stream = iter(accelerator.skip_first_batches(loader, first * train.accumulate) if first else loader)
    per_step = train.batch * train.accumulate * config.data.length * accelerator.num_processes
    bar = tqdm(
        total=train.steps * per_step,
        initial=first * per_step,
        unit="tok",
        unit_scale=True,
        disable=not accelerator.is_main_process,
    )
    seconds = []
    for step in range(first + 1, train.steps + 1):
        began = time.perf_counter()
        loss, output = train_step(model, prepared, stream, routers, accelerator, train, control)
        row: dict[str, Any] = {"step": step, "tokens": step * per_step}
        logged, validated = (
            step % every == 0 or step == train.steps for every in (train.log_every, train.validate_every)
        )
        if logged:  # reading the loss waits for the device: before the clock is read
            row["train/loss"] = accelerator.reduce(loss, "mean").item()
        seconds.append(time.perf_counter() - began)
        bar.update(per_step)
        if logged and control and control.last:
            row |= {"radius/proposed": control.last.proposed, "radius/taken": control.last.taken}
        if logged:
            row |= watch(output, optimizer, routers, accelerator)
            bar.set_postfix(loss=f"{row['train/loss']:.3f}")
        schedule.step()
        if validated:
            row["val/loss"] = evaluate(model, held, accelerator)
        if logged or validated:
            write(row, folder, accelerator)
        if step % train.save_every == 0 or step == train.steps:
            checkpoints.save(accelerator, step)
    bar.close()
    finish(accelerator, model, tokenizer, folder, summary(optimizer, seconds))


def finish(
    accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, folder: Path, cost: dict[str, Any]
) -> None:
    """Save the model in Hugging Face's format, draw the report and print a sample."""
    weights = accelerator.get_state_dict(model)  # of all processes together: shards are gathered
    if accelerator.is_main_process:
        plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        plain.save_pretrained(folder / "model", state_dict=weights)
        (folder / "summary.json").write_text(json.dumps(cost, indent=1))
        pictures = report.draw([folder], folder)
        final = report.read_metrics(folder)[-1]
        print(f"validation loss {final['val/loss']:.4f} after {final['tokens']:,} tokens")
        print("\n".join(str(path) for path in (folder / "model", folder / "metrics.jsonl", *pictures)))
        if tokenizer:
            tokenizer.save_pretrained(folder / "model")
            print("sample:\n" + sample(folder / "model", tokenizer, accelerator.device))
    accelerator.end_training()


def sample(saved: Path, tokenizer: Any, device: torch.device) -> str:
    """Return what the saved model writes: read back from disk, since the trained one may lie in shards."""
    unset_hf_deepspeed_config()  # or ZeRO-3 would cut this one too, and wait for the other processes
    model = AutoModelForCausalLM.from_pretrained(saved).to(device)
    prompt = tokenizer("def ", return_tensors="pt", return_token_type_ids=False).to(device)
    return tokenizer.decode(model.generate(**prompt, max_new_tokens=60, do_sample=True, temperature=0.8)[0])


if __name__ == "__main__":
    main()
