"""Pretrain a language model from scratch with symlm:  accelerate launch recipes/pretrain.py --config file.yaml"""

import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from evidence import curves
from pretraining.checkpoints import Checkpoints
from pretraining.config import RunConfig, TrainConfig, read
from pretraining.folder import check_folder, open_folder, origin, read_metrics, write
from pretraining.setup import Training, begin, build_accelerator, prepare
from pretraining.signals import Stop
from pretraining.validation import evaluate
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import symlm


def watch(output: Any, job: Training, accelerator: Accelerator) -> dict[str, Any]:
    """Return what the report draws beside the losses: update RMS by role, logits, routers, the softmax radius."""
    logits = output.logits.detach().flatten(0, 1)
    some = logits[torch.linspace(0, len(logits) - 1, min(64, len(logits)), device=logits.device).long()]
    sizes = symlm.diagnostics.logit_metrics(some, accelerator.gather)
    ours = isinstance(job.plain, symlm.SymOptimizer)
    sizes_by_role = symlm.diagnostics.update_rms(job.plain) if ours else {}
    report = job.control and job.control.last
    largest = torch.cat(list(job.qk_clip.largest.values()) or [logits[:0, 0]]) if job.qk_clip else logits
    return {
        **({"skipped_steps": job.plain.skipped_steps} if ours else {}),
        **{f"update_rms/{role}": rms for role, rms in sizes_by_role.items()},
        **{f"logits/{key}": value.item() for key, value in sizes.items()},
        **job.routers.metrics(output, accelerator),
        **({"radius/proposed": report.proposed, "radius/taken": report.taken} if report else {}),
        **({"teleport/gradient_ratio": job.teleporter.ratio} if job.teleporter else {}),
        **({"attention/largest_logit": largest.max().item()} if job.qk_clip and largest.numel() else {}),
        **(job.conducting.metrics() if job.conducting else {}),
        **(job.probe.metrics() if job.probe else {}),
    }


def train_step(
    job: Training, stream: Iterator[torch.Tensor], accelerator: Accelerator, train: TrainConfig
) -> tuple[torch.Tensor, Any]:
    """Take one step over `accumulate` batches; return their mean loss, and what the model said of the last."""
    model, routers, loss = job.model, job.routers, torch.zeros((), device=accelerator.device)
    for turn in range(train.accumulate):
        x = next(stream, None)
        if x is None:
            raise ValueError(f"the dataset ended before step {train.steps}: use fewer steps")
        with accelerator.accumulate(model):
            output = model(input_ids=x, labels=x, **routers.inputs)
            steps = accelerator.sync_gradients
            if job.conducting:
                job.conducting.backward(output, turn, accelerator)
                steps = steps and job.conducting.resolve()
            else:
                accelerator.backward(sum(routers.losses(output).values()))
            if job.teleporter and steps:
                job.teleporter.before_step(x)
            if steps:
                job.spikes.look()
            if train.clip and steps:
                accelerator.clip_grad_norm_(model.parameters(), train.clip)
            if job.probe and steps:
                job.probe.before_step()
            if job.control and steps:
                job.control.step(input_ids=x)
            elif steps:
                job.optimizer.step()
            if job.probe and steps:
                job.probe.after_step(x)
            if steps and accelerator.optimizer_step_was_skipped and isinstance(job.plain, symlm.SymOptimizer):
                job.plain.count_skipped_step()  # which DeepSpeed or the scaler of fp16 did not call
            job.optimizer.zero_grad()
        loss += output.loss.detach() / train.accumulate
    return loss, output


def summary(optimizer: torch.optim.Optimizer, seconds: list[float], saving: float) -> dict[str, Any]:
    """Return what a run cost: seconds of a training step (mean, the first left out), seconds in which it waited for its
    checkpoints, bytes of this process's state.

    And where, when and of which commit it ran: who reads it later may have another before them.
    """
    return {
        "seconds_per_step": statistics.fmean(seconds[1:] or seconds) if seconds else None,
        "seconds_saving": saving,
        "optimizer_bytes": symlm.diagnostics.state_bytes(optimizer),
        **origin(),
    }


PATIENCE = 3  # rows in a row whose loss is no number, after which a run has nothing left to learn


def run(
    job: Training, config: RunConfig, accelerator: Accelerator, folder: Path, stop: Stop
) -> tuple[list[float], float, bool]:
    """Train from the last checkpoint, if one is asked for, to the end.

    A run whose loss stays no number ends there, its last checkpoint from before; one that is asked to stop ends behind
    the step in hand.

    Returns: every step's seconds, those that it waited for its checkpoints, and whether it failed.
    """
    train = config.train
    checkpoints, first = begin(job, config, accelerator, folder)
    stream = job.spikes.batches(job.loader, first)
    per_step = train.batch * train.accumulate * config.data.length * accelerator.num_processes
    options = {"unit": "tok", "unit_scale": True, "disable": not accelerator.is_main_process}
    seconds: list[float] = []
    step, lost = first, 0
    with tqdm(total=train.steps * per_step, initial=first * per_step, **options) as bar:
        while step < train.steps:
            step += 1
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
                job.spikes.judge(row)
                lost = 0 if math.isfinite(row["train/loss"]) else lost + 1
                skipped = {"skipped": row["skipped_steps"]} if row.get("skipped_steps") else {}
                bar.set_postfix(loss=f"{row['train/loss']:.3f}", **skipped)
            job.schedule.step()
            if validated or lost == PATIENCE:
                with job.averages.evaluated():
                    row |= evaluate(job.model, job.held, accelerator)
            if logged or validated:
                write(row, folder, accelerator)
            if (back := job.spikes.go_back(checkpoints, folder, row, lost == PATIENCE)) is not None:
                bar.update((back - step) * per_step)
                step, lost = back, 0
                continue
            if lost == PATIENCE:
                break
            stopped = step < train.steps and stop.agreed(waiting=logged)
            due = (step % train.save_every == 0 and not job.spikes.doubtful) or step == train.steps or stopped
            if due and not lost:
                checkpoints.save(accelerator, step)
            if stopped:
                checkpoints.finish()
                accelerator.end_training()
                raise SystemExit(128 + (stop.asked or 0))
    checkpoints.finish()
    job.averages.finish()
    return seconds, checkpoints.seconds, lost > 0


def finish(
    accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, folder: Path, cost: dict[str, Any], failed: bool
) -> None:
    """Save the model in Hugging Face's format, draw the report and print a sample.

    Raises: SystemExit, the report drawn but no model saved, for a run that failed.
    """
    weights = None if failed else accelerator.get_state_dict(model)  # of all processes together: shards are gathered
    if accelerator.is_main_process:
        validated = [row for row in read_metrics(folder) if "val/loss" in row]  # none if the file was lost
        if not (folder / "summary.json").exists() or cost["seconds_per_step"]:  # a finished run has nothing to add
            (folder / "summary.json").write_text(json.dumps(cost, indent=1))
        paths = [folder / "metrics.jsonl"]
        if validated:
            paths += drawn(folder)
            print(f"validation loss {validated[-1]['val/loss']:.4f} after {validated[-1]['tokens']:,} tokens")
        if not failed:
            plain = accelerator.unwrap_model(model, keep_torch_compile=False)
            with Checkpoints(folder / "checkpoints", 1).named(f"{folder / 'model'}"):
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


def drawn(folder: Path) -> list[Path]:
    """Draw the report; a disk that fails costs the pictures alone."""
    try:
        return curves.draw([folder], folder)
    except OSError as error:
        warnings.warn(f"the pictures of {folder} are not drawn: {error}", stacklevel=2)
        return []


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
    try:
        with Stop(accelerator) as stop:
            seconds, saving, failed = run(job, config, accelerator, folder, stop)
        finish(accelerator, job.model, tokenizer, folder, summary(job.plain, seconds, saving), failed)
    except OSError as error:  # a disk that is full or gone
        print(f"{error}; {Checkpoints(folder / 'checkpoints', 1).how_to_go_on()}", file=sys.stderr)
        raise SystemExit(os.EX_IOERR) from error


if __name__ == "__main__":
    main()
