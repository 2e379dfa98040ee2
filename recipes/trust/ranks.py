"""What goes wrong inside a rank: numbers that are none, a rank that exits, a rank with another table."""

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import torch
from pretraining.folder import read_metrics
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import symlm
from trust.kills import Outcome
from trust.launchers import Before
from trust.runs import STEPS, Lost, Run, digest, tail

BAD = (float("nan"), float("inf"), -float("inf"))


def bad_gradient(run: Run, random: Random, number: int) -> Outcome:
    """NaN or infinity in one entry of one gradient of one rank: all skip that update together, and count it."""
    updates = {update: _draw(run, random) for update in sorted(random.sample(range(2, STEPS), run.links))}
    if run.launcher.config.startswith("zero"):  # which looks at the gradients before it calls the optimizer
        return _skipped(run, partial(poison_backwards, updates), partial(leave_out_steps, set(updates)), len(updates))
    return _skipped(run, partial(poison_gradients, updates), partial(leave_out_updates, set(updates)), len(updates))


def bad_loss(run: Run, random: Random, number: int) -> Outcome:
    """NaN or infinity in the loss of one rank: all skip that step together, and count it."""
    apart = random.sample(range(2, STEPS, 2), run.links)  # of three in a row the recipe ends a run
    steps = {step: _draw(run, random) for step in sorted(apart)}
    return _skipped(run, partial(poison_losses, steps), partial(leave_out_steps, set(steps)), len(steps))


def _draw(run: Run, random: Random) -> tuple[int, float, float]:
    """Draw a rank, a bad number, and where in the gradients it is."""
    return random.randrange(run.launcher.processes), random.choice(BAD), random.random()


def exits(run: Run, random: Random, number: int) -> Outcome:
    """A rank that ends without a word before an update."""
    step, rank = random.randrange(EARLIEST, STEPS), random.randrange(run.launcher.processes)
    return _ends(run, partial(leave, step, rank), "")


def other_table(run: Run, random: Random, number: int) -> Outcome:
    """A rank whose optimizer has another table: refused by name, before a step."""
    return _ends(run, partial(take_other_table, random.randrange(2)), "the ranks disagree")


def other_version(run: Run, random: Random, number: int) -> Outcome:
    """A rank whose symlm has one line more than that of the other: refused by name, before a step."""
    package = run.folder / "another" / "symlm"
    shutil.copytree(Path(symlm.__file__).parent, package)
    with (package / "optimizer.py").open("a") as file:
        file.write("# another version\n")
    return _ends(run, partial(take_other_version, random.randrange(2), package.parent), "the ranks disagree")


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


def _skipped(run: Run, poison: Before, leave_out: Before, times: int) -> Outcome:
    """Compare a run with bad numbers to one that leaves those updates out."""
    run.start(before=poison)
    if any(codes := run.end()):
        raise Lost(f"ended with {codes}: {tail(run.job.text)}")
    without = Run(run.folder / "without", run.name, run.base)
    without.start(before=leave_out)
    if any(codes := without.end()):
        raise Lost(f"the run without those updates ended with {codes}: {tail(without.job.text)}")
    if digest(run.weights) != digest(without.weights):
        raise Lost("other weights than those of a run without the updates")
    if digest(run.weights) == digest(run.whole.weights):
        raise Lost("nothing was left out")
    if not run.trainer and (counted := read_metrics(run.results)[-1]["skipped_steps"]) != times:
        raise Lost(f"{times} steps were skipped, and {counted} counted")
    return [(1, 0.0)] * times


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _at_update(act: Any) -> None:
    """Call `act(number, optimizer)` before every update, the first of which is 1."""
    updates = count(1)

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, symlm.SymOptimizer):
            act(next(updates), optimizer)

    register_optimizer_step_pre_hook(hook)


def _at_forward(act: Callable[[int, torch.nn.Module, Any], Any]) -> None:
    """Call `act(number, model, output)` behind the model's forward pass of every step, the first of which is 1."""
    steps = count(1)

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        trains = module.training and torch.is_grad_enabled() and getattr(output, "loss", None) is not None
        if trains and type(module).__name__.endswith("ForCausalLM"):
            act(next(steps), module, output)

    register_module_forward_hook(hook)


def poison_gradients(updates: dict[int, tuple[int, float, float]]) -> None:
    def act(number: int, optimizer: symlm.SymOptimizer) -> None:
        rank, value, where = updates.get(number, (None, 0.0, 0.0))
        if rank != _rank():
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters]  # of a DTensor, this rank's part
        gradients = [gradient for gradient in gradients if gradient.numel()]
        gradient = gradients[int(where * len(gradients))]
        gradient.view(-1)[int(where * gradient.numel())] = value

    _at_update(act)


def poison_backwards(steps: dict[int, tuple[int, float, float]]) -> None:
    def act(number: int, model: torch.nn.Module, output: Any) -> None:
        rank, value, where = steps.get(number, (None, 0.0, 0.0))
        if rank != _rank():
            return
        parameters = list(model.parameters())

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            handle.remove()
            gradient = gradient.clone()
            gradient.view(-1)[int(where * gradient.numel())] = value
            return gradient

        handle = parameters[int(where * len(parameters))].register_hook(spoil)

    _at_forward(act)


def poison_losses(steps: dict[int, tuple[int, float, float]]) -> None:
    def act(number: int, model: torch.nn.Module, output: Any) -> None:
        rank, value, _ = steps.get(number, (None, 0.0, 0.0))
        if rank == _rank():
            output.loss = output.loss * value

    _at_forward(act)


def leave_out_updates(updates: set[int]) -> None:
    """Make some calls of the optimizer do nothing."""
    calls = count(1)
    _leave_out(lambda: next(calls) in updates)


def leave_out_steps(steps: set[int]) -> None:
    """Make all calls of the optimizer behind some forward passes do nothing."""
    now = []
    _at_forward(lambda number, *_: now.append(number))
    _leave_out(lambda: now[-1] in steps)


def _leave_out(wanted: Callable[[], bool]) -> None:
    plain = symlm.SymOptimizer.step

    def step(self: symlm.SymOptimizer, *arguments: Any) -> Any:
        return None if wanted() else plain(self, *arguments)

    symlm.SymOptimizer.step = step  # type: ignore[method-assign]


def leave(step: int, rank: int) -> None:
    if _rank() == rank:
        _at_update(lambda number, _: number == step and os._exit(3))


def take_other_table(rank: int) -> None:
    if _rank() == rank:
        sys.argv.append("--optimizer.preset=muon")


def take_other_version(rank: int, folder: Path) -> None:
    if _rank() == rank:
        for name in [name for name in sys.modules if name.split(".")[0] == "symlm"]:
            del sys.modules[name]
        sys.path.insert(0, str(folder))
