"""Count steps to a validation loss of 3.28 on modded-nanogpt's optimization track, on 1 to 8 GPUs:

torchrun --standalone --nproc_per_node 8 recipes/speedrun.py --config recipes/configs/bench/speedrun.yaml --arm muon

`--table true` prints the table of the runs that are there.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from benchmarks.speedrun import config as configuration
from benchmarks.speedrun import results
from benchmarks.speedrun.config import SpeedrunConfig
from benchmarks.speedrun.dials import describe_dials
from benchmarks.speedrun.model import GPT
from benchmarks.speedrun.shards import Tokens, find_shards
from pretraining.folder import origin
from pretraining.setup import build_optimizer, build_schedule
from torch import Tensor, nn
from tqdm import tqdm

Report = Callable[[str], None]


def open_text(config: SpeedrunConfig) -> tuple[Tokens, Tokens]:
    """Return the training and the validation text, checked to be long enough for the whole run."""
    data, vocabulary = config.data, config.model.vocab_size
    train = Tokens(find_shards(data.train), data.batch, data.length, vocabulary)
    held = Tokens(find_shards(data.validation), data.validation_tokens, data.length, vocabulary)
    train.require(config.chosen.steps, "data.train")
    held.require(1, "data.validation")
    return train, held


def accumulate(model: nn.Module, batch: tuple[Tensor, Tensor], size: int, accelerator: Accelerator) -> None:
    """Add up the gradient of the summed loss over this process's part of a batch; processes meet at the last pass.

    DDP divides by the number of processes, so the loss is multiplied by it. The sum, not the mean, is what the
    benchmark's AdamW divides by its square root plus 1e-10.
    """
    passes = list(zip(*(part.to(accelerator.device).split(size) for part in batch), strict=True))
    for k, (x, y) in enumerate(passes):
        alone = accelerator.no_sync(model) if k + 1 < len(passes) else contextlib.nullcontext()
        with alone:
            accelerator.backward(model(x, y) * accelerator.num_processes)


@torch.no_grad()
def validation_loss(model: nn.Module, batch: tuple[Tensor, Tensor], size: int, accelerator: Accelerator) -> float:
    """Return the mean loss over all processes' parts of the validation text."""
    model.eval()
    total = torch.zeros((), device=accelerator.device)
    for x, y in zip(*(part.split(size) for part in batch), strict=True):
        total += model(x.to(accelerator.device), y.to(accelerator.device))
    model.train()
    return accelerator.reduce(total, "sum").item() / (batch[0].numel() * accelerator.num_processes)


def is_validated(step: int, config: SpeedrunConfig) -> bool:
    """Tell whether a step is validated: seldom at first, often in the last tenth, and at the end."""
    steps, data = config.chosen.steps, config.data
    every = data.validate_every if step < 0.9 * steps else data.validate_late
    return step % every == 0 or step == steps


def now(accelerator: Accelerator) -> float:
    """Return the time at which all processes and their devices have done what they were given."""
    if accelerator.device.type != "cpu":
        torch.accelerator.synchronize()
    accelerator.wait_for_everyone()
    return time.perf_counter()


def train(config: SpeedrunConfig, accelerator: Accelerator, report: Report) -> results.Run:
    """Train the chosen arm to its end, and return its losses; validations do not count as training time."""
    arm, size = config.chosen, config.micro_batch
    ranks = accelerator.process_index, accelerator.num_processes
    text, held_text = open_text(config)
    stream, held = text.batches(*ranks), next(held_text.batches(*ranks))
    model: nn.Module = GPT(config.model)
    plain = build_optimizer(model, arm.optimizer, accelerator)
    report(describe_dials(plain))
    schedule = build_schedule(plain, arm)
    if config.compile:
        model = torch.compile(model, dynamic=False)
    model, optimizer = accelerator.prepare(model, plain)
    run = results.Run(config.seed, accelerator.num_processes, origin())
    trained, last, began = 0.0, 0, now(accelerator)
    for step in tqdm(range(arm.steps + 1), unit="step", disable=not accelerator.is_main_process):
        if is_validated(step, config):
            spent = now(accelerator) - began
            average = spent / (step - last) if step else float("nan")
            trained, last = trained + spent, step
            run.add(step, validation_loss(model, held, size, accelerator), trained)
            report(results.line(step, arm.steps, run.losses[-1], trained, average))
            began = now(accelerator)
        if step < arm.steps:
            accumulate(model, next(stream), size, accelerator)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return run


def main(arguments: list[str] | None = None) -> None:
    config = configuration.read(arguments)
    out = Path(config.out)
    if config.table:
        print(results.table(out).to_markdown())
        return
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no")  # the model casts itself
    config.check_parts(accelerator.num_processes)
    path, log = out / f"{config.arm}.json", out / f"{config.arm}-{config.seed}.txt"
    results.check_arm(path, config.settings(), config.seed)
    out.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    with log.open("w") if accelerator.is_main_process else contextlib.nullcontext() as file:

        def report(text: str) -> None:
            if file:
                tqdm.write(text, file=sys.stdout)
                print(text, file=file, flush=True)

        report(f"{config.settings()}\n{origin()}, {accelerator.num_processes} processes, seed {config.seed}")
        run = train(config, accelerator, report)
    if accelerator.is_main_process:
        results.add_run(path, config.settings(), run)
        print(results.table(out).to_markdown())
    accelerator.end_training()


if __name__ == "__main__":
    main()
