"""What goes wrong inside a rank: numbers that are none, a rank that exits, a rank with another table."""

import os
import sys
from functools import partial
from random import Random
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import symlm
from trust.kills import Outcome
from trust.launchers import Before
from trust.runs import STEPS, Lost, Run, digest, tail

BAD = (float("nan"), float("inf"), -float("inf"))


def bad_gradient(run: Run, random: Random, number: int) -> Outcome:
    """NaN or infinity in one entry of one gradient of one rank: all skip that step together, and count it."""
    step, rank = random.randrange(2, STEPS), random.randrange(run.launcher.processes)
    return _skipped(run, step, partial(poison_gradient, step, rank, random.choice(BAD), random.random()))


def bad_loss(run: Run, random: Random, number: int) -> Outcome:
    """NaN or infinity in the loss of one rank: all skip that step together, and count it."""
    step, rank = random.randrange(2, STEPS), random.randrange(run.launcher.processes)
    return _skipped(run, step, partial(poison_loss, step, rank, random.choice(BAD)))


def exits(run: Run, random: Random, number: int) -> Outcome:
    """A rank that ends without a word in the middle of a step."""
    step, rank = random.randrange(EARLIEST, STEPS), random.randrange(run.launcher.processes)
    return _ends(run, partial(leave, step, rank), "")


def other_table(run: Run, random: Random, number: int) -> Outcome:
    """A rank whose optimizer has another table: refused by name, before a step."""
    return _ends(run, partial(take_other_table, random.randrange(2)), "the ranks disagree")


EARLIEST = 5  # steps after which there is a checkpoint


def _ends(run: Run, before: Before, message: str) -> Outcome:
    """Run a rank that ends the run, which says so, and go on without it."""
    job = run.start(before=before)
    if not any(run.end(120)):
        raise Lost("the run ended well")
    if message not in job.text:
        raise Lost(f"no word of {message!r}: {tail(job.text)}")
    made, saved = run.last_step(0), run.reached()
    seconds = run.go_on()
    run.check()
    return [(max(0, made - saved), seconds)]


def _skipped(run: Run, step: int, before: Before) -> Outcome:
    """Compare a run with a bad number at a step to one that leaves that step's update out."""
    job = run.start(before=before)
    if any(codes := run.end()):
        raise Lost(f"ended with {codes}: {tail(job.text)}")
    without = Run(run.base / "without" / run.name / str(step), run.name, run.base)
    if not without.weights.exists():
        without.start(before=partial(leave_out, step))
        without.end()
    if digest(run.weights) != digest(without.weights):
        raise Lost(f"other weights than those of a run without the update of step {step}")
    if not run.trainer and '"skipped_steps": 1' not in (run.results / "metrics.jsonl").read_text().splitlines()[-1]:
        raise Lost("the skipped step is not counted")
    return [(1, 0.0)]


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _at_step(step: int, act: Any) -> None:
    """Call `act(optimizer)` before the update of a step, the first of which is 1."""
    count = iter(range(1, STEPS + 1))

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, symlm.SymOptimizer) and next(count, None) == step:
            act(optimizer)

    register_optimizer_step_pre_hook(hook)


def poison_gradient(step: int, rank: int, value: float, where: float) -> None:
    def act(optimizer: symlm.SymOptimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters]  # of a DTensor, this rank's part
        gradient = [g for g in gradients if g.numel()][int(where * len(gradients))]
        gradient.view(-1)[int(where * gradient.numel())] = value

    if _rank() == rank:
        _at_step(step, act)


def poison_loss(step: int, rank: int, value: float) -> None:
    count = iter(range(1, 10 * STEPS))

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        training = module.training and torch.is_grad_enabled() and getattr(output, "loss", None) is not None
        if training and type(module).__name__.endswith("ForCausalLM") and next(count) == step:
            output.loss = output.loss * value
        return output

    if _rank() == rank:
        register_module_forward_hook(hook)


def leave_out(step: int) -> None:
    """Make the optimizer's call at a step do nothing."""
    plain, count = symlm.SymOptimizer.step, iter(range(1, STEPS + 1))

    def stepping(self: symlm.SymOptimizer, *arguments: Any) -> Any:
        return None if next(count) == step else plain(self, *arguments)

    symlm.SymOptimizer.step = stepping  # type: ignore[method-assign]


def leave(step: int, rank: int) -> None:
    if _rank() == rank:
        _at_step(step, lambda _: os._exit(3))


def take_other_table(rank: int) -> None:
    if _rank() == rank:
        sys.argv.append("--optimizer.preset=muon")
