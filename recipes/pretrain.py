"""Pretrain a language model from scratch with symlm:  accelerate launch recipes/pretrain.py --config file.yaml"""

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import moe
import report
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env, set_seed
from architectures import build_model
from run_config import OptimizerConfig, RunConfig, TrainConfig, read
from run_folder import Checkpoints, check_folder, forget_after, open_folder, origin, write
from teleporting import Teleporter
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import symlm
from symlm.agd import AGD, initialize_
from symlm.step_control import StepControl


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


def prepare_model(config: RunConfig, tokenizer: Any) -> torch.nn.Module:
    """Build the model over the tokenizer's vocabulary; without one over `data.vocab_size`, unless `sizes` say more."""
    told, own = config.model, config.model.sizes.get("vocab_size", config.data.vocab_size)
    vocabulary, end = (len(tokenizer), tokenizer.eos_token_id) if tokenizer else (own, None)
    model = build_model(told.preset, told.config, told.sizes, vocabulary, end)
    if told.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


@dataclass
class Training:
    """What a run trains and what with, as accelerate prepared it; `plain` is the optimizer without its wrapper."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    plain: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    loader: DataLoader
    held: DataLoader
    routers: Routers
    control: StepControl | None
    teleporter: Teleporter | None


def watch(output: Any, job: Training, accelerator: Accelerator) -> dict[str, Any]:
    """Return what the report draws beside the losses: update RMS by role, logits, routers, the softmax radius."""
    logits = output.logits.detach().flatten(0, 1)
    some = logits[torch.linspace(0, len(logits) - 1, min(64, len(logits)), device=logits.device).long()]
    sizes = symlm.diagnostics.logit_metrics(some, accelerator.gather)
    ours = isinstance(job.plain, symlm.SymOptimizer)
    sizes_by_role = symlm.diagnostics.update_rms(job.plain) if ours else {}
    told = job.control and job.control.last
    return {
        **({"skipped_steps": job.plain.skipped_steps} if ours else {}),
        **{f"update_rms/{role}": rms for role, rms in sizes_by_role.items()},
        **{f"logits/{key}": value.item() for key, value in sizes.items()},
        **job.routers.metrics(output, accelerator),
        **({"radius/proposed": told.proposed, "radius/taken": told.taken} if told else {}),
        **({"teleport/gradient_ratio": job.teleporter.ratio} if job.teleporter else {}),
    }


def train_step(
    job: Training, stream: Iterator[torch.Tensor], accelerator: Accelerator, train: TrainConfig
) -> tuple[torch.Tensor, Any]:
    """Take one step over `accumulate` batches; return their mean loss, and what the model said of the last."""
    model, routers, loss = job.model, job.routers, torch.zeros((), device=accelerator.device)
    for _ in range(train.accumulate):
        x = next(stream, None)
        if x is None:
            raise ValueError(f"the dataset ended before step {train.steps}: use fewer steps")
        with accelerator.accumulate(model):
            output = model(input_ids=x, labels=x, **routers.inputs)
            accelerator.backward(output.loss + routers.loss(output))
            if job.teleporter and accelerator.sync_gradients:
                job.teleporter.before_step(x)
            if train.clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), train.clip)
            if job.control and accelerator.sync_gradients:
                job.control.step(input_ids=x)
            else:
                job.optimizer.step()
            job.optimizer.zero_grad()
        loss += output.loss.detach() / train.accumulate
    return loss, output


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


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig, accelerator: Accelerator) -> torch.optim.Optimizer:
    """Return the optimizer, its table printed.  Raises: ValueError for an unknown algorithm, and what AGD cannot do."""
    if config.algorithm == "symlm":
        kernels = config.options.get("kernels", "auto")
        told = {"kernels": kernels, "lr": config.lr, "overrides": config.overrides}
        accelerator.print(symlm.describe_routing(model, config.preset, **told))
        return symlm.SymOptimizer(model, config.lr, config.preset, config.overrides, **config.options)
    if config.algorithm != "agd":
        raise ValueError(f"unknown optimizer.algorithm {config.algorithm!r}; choose 'symlm' or 'agd'")
    plain = OptimizerConfig()
    if (config.lr, config.preset, config.overrides) != (plain.lr, plain.preset, plain.overrides):
        raise ValueError(
            "AGD finds its rate by itself, one for all layers: leave out optimizer.lr, preset and overrides"
        )
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        raise ValueError("AGD's rate needs every layer's whole gradient: use one process or DDP")
    for p in model.parameters():
        p.requires_grad_(p.ndim > 1)
    initialize_(model)
    accelerator.print(f"AGD: {sum(p.requires_grad for p in model.parameters())} layers, one rate for all; gains frozen")
    return AGD(model, **config.options)


def summary(optimizer: torch.optim.Optimizer, seconds: list[float]) -> dict[str, Any]:
    """Return what a run cost: seconds of a training step (mean, the first left out), bytes of this process's state.

    And where, when and of which commit it ran: who reads it later may have another before them.
    """
    return {
        "seconds_per_step": statistics.fmean(seconds[1:] or seconds) if seconds else None,
        "optimizer_bytes": symlm.diagnostics.state_bytes(optimizer),
        **origin(),
    }


def prepare(config: RunConfig, accelerator: Accelerator) -> tuple[Training, Any]:
    """Build data, model, optimizer and schedule, and have accelerate prepare them; return the tokenizer too."""
    train = config.train
    samples = train.steps * train.accumulate * train.batch * accelerator.num_processes
    tokenizer, data, validation = corpus.load(config.data, train.seed, samples)
    model = prepare_model(config, tokenizer)
    collate = corpus.Collate(model.config.vocab_size)
    routers = Routers(model, train)
    plain = build_optimizer(model, config.optimizer, accelerator)
    schedule = build_schedule(plain, train)
    if config.model.compile:
        model = torch.compile(model)
    loader = DataLoader(data, batch_size=train.batch, shuffle=False, drop_last=True, collate_fn=collate)
    held = DataLoader(validation, batch_size=train.batch, collate_fn=collate)
    model, optimizer, loader, held = accelerator.prepare(model, plain, loader, held)
    accelerator.register_for_checkpointing(schedule)
    for name in ("r_target", "teleport_every"):
        if getattr(train, name) is not None and accelerator.num_processes > 1:
            raise ValueError(f"train.{name} looks at one process's batch and weights: use one process, or leave it out")
    if train.teleport_every and accelerator.mixed_precision != "no":
        raise ValueError("train.teleport_every compares losses that rounding would change: set mixed_precision to no")
    control = StepControl(model, optimizer, r_target=train.r_target, over=train.r_over) if train.r_target else None
    teleporter = Teleporter(model, plain, train.teleport_every) if train.teleport_every else None
    if teleporter:
        accelerator.register_for_checkpointing(teleporter)
    return Training(model, optimizer, plain, schedule, loader, held, routers, control, teleporter), tokenizer


PATIENCE = 3  # rows in a row whose loss is no number, after which a run has nothing left to learn


def run(job: Training, config: RunConfig, accelerator: Accelerator, folder: Path) -> tuple[list[float], bool]:
    """Train from the last checkpoint, if one is asked for, to the end; return every step's seconds, and if it failed.

    A run whose loss stays no number ends there, its last checkpoint from before.
    """
    train, checkpoints = config.train, Checkpoints(folder / "checkpoints", config.train.keep)
    first = checkpoints.load(accelerator) if config.resume else 0
    if accelerator.is_main_process:
        forget_after(first, folder)
    if accelerator.log_with:
        accelerator.init_trackers("symlm")
    stream = iter(accelerator.skip_first_batches(job.loader, first * train.accumulate) if first else job.loader)
    per_step = train.batch * train.accumulate * config.data.length * accelerator.num_processes
    told = {"unit": "tok", "unit_scale": True, "disable": not accelerator.is_main_process}
    seconds: list[float] = []
    lost = 0
    with tqdm(total=train.steps * per_step, initial=first * per_step, **told) as bar:
        for step in range(first + 1, train.steps + 1):
            began = time.perf_counter()
            loss, output = train_step(job, stream, accelerator, train)
            row: dict[str, Any] = {"step": step, "tokens": step * per_step}
            logged, validated = (
                step % every == 0 or step == train.steps for every in (train.log_every, train.validate_every)
            )
            if logged:  # reading the loss waits for the device: before the clock is read
                row["train/loss"] = accelerator.reduce(loss, "mean").item()
            seconds.append(time.perf_counter() - began)
            bar.update(per_step)
            if logged:
                row |= watch(output, job, accelerator)
                lost = 0 if math.isfinite(row["train/loss"]) else lost + 1
                skipped = {"skipped": row["skipped_steps"]} if row.get("skipped_steps") else {}
                bar.set_postfix(loss=f"{row['train/loss']:.3f}", **skipped)
            job.schedule.step()
            if validated or lost == PATIENCE:
                row["val/loss"] = evaluate(job.model, job.held, accelerator)
            if logged or validated:
                write(row, folder, accelerator)
            if lost == PATIENCE:
                break
            if not lost and (step % train.save_every == 0 or step == train.steps):
                checkpoints.save(accelerator, step)
    return seconds, lost > 0


def finish(
    accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, folder: Path, cost: dict[str, Any], failed: bool
) -> None:
    """Save the model in Hugging Face's format, draw the report and print a sample.

    Raises: SystemExit, the report drawn but no model saved, for a run that failed.
    """
    weights = None if failed else accelerator.get_state_dict(model)  # of all processes together: shards are gathered
    if accelerator.is_main_process:
        final = report.read_metrics(folder)[-1]
        if not (folder / "summary.json").exists() or cost["seconds_per_step"]:  # a finished run has nothing to add
            (folder / "summary.json").write_text(json.dumps(cost, indent=1))
        paths = [folder / "metrics.jsonl", *report.draw([folder], folder)]
        print(f"validation loss {final['val/loss']:.4f} after {final['tokens']:,} tokens")
        if not failed:
            plain = accelerator.unwrap_model(model, keep_torch_compile=False)
            plain.save_pretrained(folder / "model", state_dict=weights)
            paths.insert(0, folder / "model")
        print("\n".join(map(str, paths)))
        if tokenizer and not failed:
            tokenizer.save_pretrained(folder / "model")
            print("sample:\n" + sample(folder / "model", tokenizer, accelerator.device))
    accelerator.wait_for_everyone()  # no process takes the group away while another still works
    accelerator.end_training()
    if failed:
        raise SystemExit(
            f"the loss is no number any more: try a smaller optimizer.lr; {folder / 'checkpoints'} has what was before"
        )


def sample(saved: Path, tokenizer: Any, device: torch.device) -> str:
    """Return what the saved model writes: read back from disk, since the trained one may lie in shards."""
    unset_hf_deepspeed_config()  # or ZeRO-3 would cut this one too, and wait for the other processes
    model = AutoModelForCausalLM.from_pretrained(saved).to(device)
    prompt = tokenizer("def ", return_tensors="pt", return_token_type_ids=False).to(device)
    return tokenizer.decode(model.generate(**prompt, max_new_tokens=60, do_sample=True, temperature=0.8)[0])


def main() -> None:
    config = read()
    accelerator = build_accelerator(config)
    folder = check_folder(config, accelerator)
    set_seed(config.train.seed)
    job, tokenizer = prepare(config, accelerator)
    open_folder(config, accelerator, folder)
    seconds, failed = run(job, config, accelerator, folder)
    finish(accelerator, job.model, tokenizer, folder, summary(job.plain, seconds), failed)


if __name__ == "__main__":
    main()
