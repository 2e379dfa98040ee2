"""Signals from outside: kills at random moments and inside a save, requests to stop, and a rank that freezes."""

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from random import Random

import psutil

from trust.runs import Lost, Run, tail

Outcome = list[tuple[int, float]]  # for each fault: steps that were lost, seconds until the run went on


def kill_all(run: Run, random: Random, number: int) -> Outcome:
    """SIGKILL all processes at random moments."""
    return chain(run, lambda: moment(run, random) and _kill(run, None), draws=3)


def kill_one(run: Run, random: Random, number: int) -> Outcome:
    """SIGKILL one rank at random moments; the launcher ends the rest."""
    return chain(run, lambda: moment(run, random) and _kill(run, random), draws=3)


def kill_in_a_save(run: Run, random: Random, number: int) -> Outcome:
    """SIGKILL all processes, or one, while a checkpoint is being written."""
    one = random if number % 2 and run.launcher.processes > 1 else None
    return chain(run, lambda: _in_a_save(run, random) and _kill(run, one))


def terminate(run: Run, random: Random, number: int) -> Outcome:
    """SIGTERM, as a scheduler sends it to what it started."""

    def ask() -> None:
        for machine in run.job.machines:
            os.kill(machine.pid, signal.SIGTERM)

    return chain(run, lambda: behind_a_step(run, random) and _ask(run, ask))


def interrupt(run: Run, random: Random, number: int) -> Outcome:
    """Ctrl-C, which reaches all processes of a terminal."""
    return chain(run, lambda: behind_a_step(run, random) and _ask(run, lambda: run.job.signal(signal.SIGINT)))


def freeze(run: Run, random: Random, number: int) -> Outcome:
    """SIGSTOP one rank: the others end with a message, and the restart goes on."""

    def fault() -> bool:
        if not behind_a_step(run, random):
            return False
        signal_one(run, random, signal.SIGSTOP)
        if not any(run.end()):
            raise Lost("the run ended well with a frozen rank")
        if not re.search(r"[Tt]imed out|[Tt]imeout", run.job.text):
            raise Lost(f"no word of a time limit: {tail(run.job.text)}")
        return True

    return chain(run, fault, links=1)


def asynchronous(act: Callable[[Run, Random, int], Outcome]) -> Callable[[Run, Random, int], Outcome]:
    """Return the same fault of a run that writes its checkpoints while it goes on."""

    def happen(run: Run, random: Random, number: int) -> Outcome:
        run.more = ("--train.async_save=true",)
        return act(run, random, number)

    return happen


def chain(run: Run, fault: Callable[[], bool], links: int | None = None, draws: int = 1) -> Outcome:
    """Start a run, let a fault happen, go on, and so on; let the last one end, and compare it.

    Args:
        run: The run.
        fault: Lets it happen to the running job, waits for the job's end and looks at it; False where it ended before.
        links: How many, by default as many as its launcher allows.
        draws: How often the run begins anew where it ends before the moment, which is drawn from another run's time.
    """
    lost = _faults(run, fault, links or run.links)
    for _ in range(0 if lost else draws - 1):
        run.took = time.monotonic() - run.job.began
        shutil.rmtree(run.folder)
        run.folder.mkdir()
        if lost := _faults(run, fault, links or run.links):
            break
    if not lost:
        raise Lost(f"the run ended before its fault: {tail(run.job.text)}")
    seconds = run.go_on()
    run.check()
    return [(steps, seconds) for steps in lost]


def _faults(run: Run, fault: Callable[[], bool], links: int) -> list[int]:
    """Start a run and let faults happen, each to what goes on after the one before; return the steps that each lost."""
    lost = []
    for _ in range(links):
        since = run.reached()
        run.start()
        if not fault():
            break
        lost.append(max(0, run.last_step(since) - run.reached()))
    return lost


def moment(run: Run, random: Random) -> bool:
    """Wait for a random moment of the time that the run took, or the undisturbed one; False where it has ended."""
    seconds = random.uniform(0, run.took or float((run.whole.folder / "seconds").read_text()))
    return _wait(run, lambda: time.monotonic() - run.job.began > seconds)


def behind_a_step(run: Run, random: Random) -> bool:
    """Wait for the first step, and a random part of the others; False where the run has ended."""
    if not _wait(run, run.has_stepped, 0.01):
        return False
    later = time.monotonic() + random.uniform(0, 0.2) * float((run.whole.folder / "seconds").read_text())
    return _wait(run, lambda: time.monotonic() > later)


def signal_one(run: Run, random: Random, number: int) -> None:
    """Send a signal to a rank, drawn at random, or to its launcher where there is none yet."""
    ranks = run.job.ranks() or [psutil.Process(machine.pid) for machine in run.job.machines if machine.is_alive()]
    with contextlib.suppress(psutil.NoSuchProcess):
        random.choice(ranks).send_signal(number)


def _kill(run: Run, one: Random | None) -> bool:
    """Kill all processes, or one that is drawn, and wait until none is left."""
    if one:
        signal_one(run, one, signal.SIGKILL)
    else:
        run.job.signal(signal.SIGKILL)
    run.end()
    return True


def _ask(run: Run, ask: Callable[[], None]) -> bool:
    """Ask a run to stop: it ends by itself, with a code of its own and nothing lost."""
    ask()
    if not any(run.end(60)):
        return False  # it had come to its end
    made = run.last_step(0)
    if not run.trainer and (lost := made - run.reached()) > 0:  # which has no word for signals, and ends at once
        raise Lost(f"{lost} steps lost though the run was asked to stop")
    return True


def _in_a_save(run: Run, random: Random) -> bool:
    """Wait until a checkpoint is being written, the next one or the one after it, and a little longer."""
    for _ in range(random.randrange(1, 3)):
        if not _wait(run, lambda: not run.half()) or not _wait(run, run.half):
            return False
    time.sleep(random.uniform(0, 0.03))
    return True


def _wait(run: Run, until: Callable[[], bool], pause: float = 0.001) -> bool:
    """Wait until something is so; False where the run has ended before."""
    while run.job.running:
        if until():
            return True
        time.sleep(pause)
    return False
