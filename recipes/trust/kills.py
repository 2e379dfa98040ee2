"""Signals from outside: kills at random moments and inside a save, requests to stop, and a rank that freezes."""

import contextlib
import os
import signal
import time
from random import Random

import psutil

from trust.runs import STEPS, Lost, Run, tail

CHAIN = 4  # kills of one run, each of what goes on after the one before
Outcome = list[tuple[int, float]]  # for each fault: steps that were lost, seconds until the run went on


def kill_all(run: Run, random: Random, number: int) -> Outcome:
    """SIGKILL all processes at random moments."""
    return _chain(run, random, _moment, lambda: run.job.signal(signal.SIGKILL))


def kill_one(run: Run, random: Random, number: int) -> Outcome:
    """SIGKILL one rank at random moments; the launcher ends the rest."""
    return _chain(run, random, _moment, lambda: _signal_one(run, random, signal.SIGKILL))


def kill_in_a_save(run: Run, random: Random, number: int) -> Outcome:
    """SIGKILL all processes, or one, while a checkpoint is being written."""
    one = number % 2 and run.launcher.processes > 1
    kill = (lambda: _signal_one(run, random, signal.SIGKILL)) if one else (lambda: run.job.signal(signal.SIGKILL))
    return _chain(run, random, _save, kill)


def terminate(run: Run, random: Random, number: int) -> Outcome:
    """SIGTERM, as a scheduler sends it to what it started."""
    return _ask(run, random, lambda: [os.kill(machine.pid, signal.SIGTERM) for machine in run.job.machines])


def interrupt(run: Run, random: Random, number: int) -> Outcome:
    """Ctrl-C, which reaches all processes of a terminal."""
    return _ask(run, random, lambda: run.job.signal(signal.SIGINT))


def freeze(run: Run, random: Random, number: int) -> Outcome:
    """SIGSTOP one rank: the others end with a message, and the restart goes on."""
    run.start()
    if not _moment(run, random, first_step=True):
        raise Lost("the run ended before its fault")
    made, saved = run.last_step(0), run.reached()
    _signal_one(run, random, signal.SIGSTOP)
    if not any(run.end(120)):
        raise Lost("the run ended well with a frozen rank")
    if "imed out" not in run.job.text and "imeout" not in run.job.text:
        raise Lost(f"no word of a time limit: {tail(run.job.text)}")
    seconds = run.go_on()
    run.check()
    return [(max(0, made - saved), seconds)]


def _chain(run: Run, random: Random, until, kill) -> Outcome:
    """Kill a run, go on, and kill it again; let the last one end, and compare it."""
    lost = []
    for _ in range(CHAIN):
        since = run.reached()
        run.start()
        if not until(run, random):
            break  # it has come to its end before
        kill()
        run.end()
        lost.append(max(0, run.last_step(since) - run.reached()))
    if not lost:
        raise Lost("the run ended before its fault")
    seconds = run.go_on()
    run.check()
    return [(steps, seconds) for steps in lost]


def _ask(run: Run, random: Random, ask) -> Outcome:
    """Ask a run to stop behind a random step: it saves, ends by itself with a code of its own, and goes on."""
    run.start()
    if not _moment(run, random, first_step=True):
        raise Lost("the run ended before its fault")
    ask()
    codes, made = run.end(60), run.last_step(0)
    if not all(codes):
        raise Lost(f"exit code 0 of a run that was asked to stop: {tail(run.job.text)}")
    if (lost := max(0, made - run.reached())) and not run.trainer:  # which ends at once, and its steps are made again
        raise Lost(f"{lost} steps lost though the run was asked to stop")
    seconds = run.go_on()
    run.check()
    return [(lost, seconds)]


def _moment(run: Run, random: Random, first_step: bool = False) -> bool:
    """Wait for a random moment of the time that the undisturbed run took, or for a random step; False if it ended."""
    step = random.randrange(1, STEPS - 4)
    seconds = random.uniform(0, float((run.whole.folder / "seconds").read_text()))
    while run.job.running:
        if first_step and run.last_step(0) >= step:
            return True
        if not first_step and time.monotonic() - run.job.began > seconds and run.job.ranks():
            return True
        time.sleep(0.002)
    return False


def _save(run: Run, random: Random) -> bool:
    """Wait until a checkpoint is being written, the next one or one after it, and a little longer."""
    saves, inside = random.randrange(1, 3), False
    while run.job.running:
        if run.half() and not inside:
            saves -= 1
            if saves == 0:
                time.sleep(random.uniform(0, 0.03))
                return True
        inside = run.half()
        time.sleep(0.0005)
    return False


def _signal_one(run: Run, random: Random, number: int) -> None:
    """Send a signal to a rank, drawn at random."""
    ranks = run.job.ranks()
    if not ranks:
        raise Lost("there is no rank")
    with contextlib.suppress(psutil.NoSuchProcess):
        random.choice(ranks).send_signal(number)
