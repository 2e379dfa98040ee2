"""What goes wrong inside a rank: numbers that are none, a rank that exits, a rank with another table."""

import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
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
    """NaN or infinity in one entry of one gradient of one rank: all skip that update together, and count it.

    DeepSpeed makes the update of each group by itself, and its group alone is skipped.
    """
    update, rank = random.randrange(2, STEPS), random.randrange(run.launcher.processes)
    poison = partial(poison_gradient, update, rank, random.choice(BAD), random.random())
    return _skipped(run, f"update-{update}", poison, partial(leave_out_update, update))


def bad_loss(run: Run, random: Random, number: int) -> Outcome:
    """NaN or infinity in the loss of one rank: all skip that step together, and count it."""
    step, rank = random.randrange(2, STEPS), random.randrange(run.launcher.processes)
    poison = partial(poison_loss, step, rank, random.choice(BAD))
    return _skipped(run, f"step-{step}", poison, partial(leave_out_step, step))


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


def _skipped(run: Run, name: str, poison: Before, leave_out: Before) -> Outcome:
    """Compare a run with a bad number to one that leaves that update out."""
    job = run.start(before=poison)
    if any(codes := run.end()):
        raise Lost(f"ended with {codes}: {tail(job.text)}")
    without = Run(run.base / "without" / run.name / name, run.name, run.base)
    if not without.weights.exists():
        without.start(before=leave_out)
        without.end()
    if digest(run.weights) != digest(without.weights):
        raise Lost(f"other weights than those of a run without {name}")
    if not run.trainer and '"skipped_steps": 0' in (run.results / "metrics.jsonl").read_text().splitlines()[-1]:
        raise Lost("what was skipped is not counted")
    return [(1, 0.0)]


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _at_update(number: int, act: Any) -> None:
    """Call `act(optimizer)` before an update, the first of which is 1."""
    updates = count(1)

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, symlm.SymOptimizer) and next(updates) == number:
            act(optimizer)

    register_optimizer_step_pre_hook(hook)


def _at_forward(act: Any) -> None:
    """Call `act(number, output)` behind the model's forward pass of every step, the first of which is 1."""
    steps = count(1)

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        trains = module.training and torch.is_grad_enabled() and getattr(output, "loss", None) is not None
        if trains and type(module).__name__.endswith("ForCausalLM"):
            act(next(steps), output)

    register_module_forward_hook(hook)


def poison_gradient(update: int, rank: int, value: float, where: float) -> None:
    def act(optimizer: symlm.SymOptimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters]  # of a DTensor, this rank's part
        gradients = [gradient for gradient in gradients if gradient.numel()]
        gradient = gradients[int(where * len(gradients))]
        gradient.view(-1)[int(where * gradient.numel())] = value

    if _rank() == rank:
        _at_update(update, act)


def poison_loss(step: int, rank: int, value: float) -> None:
    def act(number: int, output: Any) -> None:
        if number == step:
            output.loss = output.loss * value

    if _rank() == rank:
        _at_forward(act)


def leave_out_update(update: int) -> None:
    """Make one call of the optimizer do nothing."""
    updates = count(1)
    _leave_out(lambda: next(updates) == update)


def leave_out_step(step: int) -> None:
    """Make all calls of the optimizer behind one forward pass do nothing."""
    now = []
    _at_forward(lambda number, output: now.append(number))
    _leave_out(lambda: now[-1] == step)


def _leave_out(wanted: Callable[[], bool]) -> None:
    plain = symlm.SymOptimizer.step

    def step(self: symlm.SymOptimizer, *arguments: Any) -> Any:
        return None if wanted() else plain(self, *arguments)

    symlm.SymOptimizer.step = step  # type: ignore[method-assign]


def leave(step: int, rank: int) -> None:
    if _rank() == rank:
        _at_update(step, lambda _: os._exit(3))


def take_other_table(rank: int) -> None:
    if _rank() == rank:
        sys.argv.append("--optimizer.preset=muon")
