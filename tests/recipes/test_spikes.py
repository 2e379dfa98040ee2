"""A run whose steps are skipped or whose loss leaps says which role stood out, and goes back if it was asked to."""

import json
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
import trust.runs
from accelerate import Accelerator
from models import tiny
from pretraining.config import TrainConfig
from pretraining.folder import read_metrics
from pretraining.spikes import ROWS, Spikes
from recipe import SCRIPT, command, write_text
from torch.utils.data import DataLoader, IterableDataset
from trust.launchers import warm_up
from trust.ranks import poison_losses

import symlm

# Starts the recipe with a fault in the backward passes of these numbers; a run that goes back does not repeat it.
FAULTY = """
import json, runpy, sys
from itertools import count
from torch.nn.modules.module import register_module_forward_hook

passes, bad, factor = count(1), json.loads(sys.argv[1]), float(sys.argv[2])

def spoil(gradient):
    return gradient * factor if next(passes) in bad else gradient

def hook(module, arguments, output):
    head = getattr(module, "lm_head", None)
    if head is not None and not hasattr(module, "is_spoilt"):
        module.is_spoilt = True
        head.weight.register_hook(spoil)

register_module_forward_hook(hook)
sys.argv = sys.argv[3:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def run(text, out, bad, factor, *flags):
    _, script, *rest = command(text, out, "--train.log_every=1", "--train.save_every=3", *flags)
    assert script == str(SCRIPT)
    faulty = [sys.executable, "-c", textwrap.dedent(FAULTY), json.dumps(bad), str(factor), script, *rest]
    done = subprocess.run(faulty, capture_output=True, text=True, timeout=500)
    rows = [json.loads(line) for line in (out / "default" / "metrics.jsonl").read_text().splitlines()]
    return done, rows


def test_skipped_steps_are_reported_with_their_role_and_a_run_goes_back_with_other_data(text, tmp_path):
    done, rows = run(text, tmp_path, [8, 9], "nan", "--train.rewind=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 8: loss" in done.stdout
    assert "1 steps skipped; not finite: gradient of lm_head\n" in done.stdout
    assert "step 9: back to step 6, and on with other data" in done.stdout
    assert [row["step"] for row in rows] == [*range(1, 7), 6, *range(7, 13)]
    assert rows[6]["rewind/from"] == 9
    assert rows[-1]["skipped_steps"] == 0
    whole, undisturbed = run(text, tmp_path / "whole", [], 1, "--train.rewind=2")
    assert whole.returncode == 0
    assert "step 8: loss" not in whole.stdout
    other = {row["step"]: row["train/loss"] for row in undisturbed if "train/loss" in row}
    same = [row["train/loss"] == other[row["step"]] for row in rows if "train/loss" in row]
    assert same == [True] * 6 + [False] * 6


def test_a_run_that_is_not_asked_to_go_back_reports_and_goes_on(text, tmp_path):
    done, rows = run(text, tmp_path, [8, 9], "nan")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("not finite: gradient of lm_head") == 2
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["skipped_steps"] == 2


@pytest.mark.slow
def test_a_run_that_going_back_does_not_help_ends(text, tmp_path):
    done, _ = run(text, tmp_path, list(range(8, 40)), "nan", "--train.rewind=1")
    assert done.returncode == 1
    assert "the run went back to step 6 3 times, with other data each time, and stays bad" in done.stderr


def test_a_spike_is_what_leaves_the_spread_of_the_rows_before(capsys):
    model = tiny()
    spikes = Spikes(symlm.SymOptimizer(model), Accelerator(cpu=True), TrainConfig(rewind=2))

    def judge(step, loss, head=1.0):
        for name, p in model.named_parameters():
            p.grad = torch.ones_like(p) * (head if name == "lm_head.weight" else 1.0)
        spikes.look()
        spikes.judge({"step": step, "train/loss": loss, "update_rms/lm_head": 0.1})
        return spikes.streak

    assert [judge(0, 4.0), judge(1, 9.0)] == [0, 0]  # too few rows to compare with
    assert {judge(step, 4 - 0.05 * step) for step in range(2, ROWS + 2)} == {0}  # a loss that falls
    assert judge(30, 4.5) == 0  # within six of its standard deviations
    assert judge(31, 7.0, head=50.0) == 1
    assert judge(32, float("nan")) == 2
    out = capsys.readouterr().out
    assert "step 31: loss 7.000 after 3.425; the gradient of lm_head stood out most, 50.0 times its usual" in out
    assert judge(33, 3.0) == 0
    model.zero_grad()  # as under DeepSpeed
    spikes.look()
    spikes.judge({"step": 34, "train/loss": 9.0})
    assert spikes.streak == 1


def judged(spikes, losses, first=0):
    """Return the streak of bad rows behind each loss."""
    streaks = []
    for step, loss in enumerate(losses, start=first):
        spikes.judge({"step": step, "train/loss": loss})
        streaks.append(spikes.streak)
    return streaks


def test_behind_going_back_losses_are_compared_with_those_before_the_checkpoint():
    spikes, other = (Spikes(symlm.SymOptimizer(tiny()), Accelerator(cpu=True), TrainConfig(rewind=2)) for _ in range(2))
    falling = [6 / (1 + 0.1 * step) for step in range(60)]
    assert set(judged(spikes, falling[:12])) == {0}
    state = json.loads(json.dumps(spikes.state_dict()))
    assert set(judged(spikes, falling[12:], 12)) == {0}
    assert judged(spikes, falling[12:13]) == [1]  # what was usual long ago
    for resumed in (spikes, other):
        resumed.load_state_dict(state)
        assert judged(resumed, [*falling[12:16], 20.0]) == [0, 0, 0, 0, 1]


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        yield from self.items


@pytest.mark.parametrize(("items", "streamed"), [(range(4), True), (range(4), False), (range(0), True)])
def test_data_go_round_in_a_run_that_goes_back(items, streamed):
    spikes = Spikes(symlm.SymOptimizer(tiny()), Accelerator(cpu=True), TrainConfig(rewind=2))
    batches = spikes.batches(DataLoader(Stream(items) if streamed else list(items), batch_size=1), 1)
    assert [x.item() for x, _ in zip(batches, range(6), strict=False)] == [*items[1:], *items, *items][:6]


LAUNCHED = ["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"]


@pytest.mark.parametrize("launcher", ["one process", *(pytest.param(x, marks=pytest.mark.slow) for x in LAUNCHED)])
def test_a_run_whose_loss_is_none_goes_back_under_every_launcher(tmp_path, launcher):
    """Three losses that are no number end a run, if it does not go back: whatever it was asked to wait for."""
    trust.runs.write_text(tmp_path / "text")
    warm_up()
    run = trust.runs.Run(tmp_path / "run", launcher, tmp_path)
    run.more = ("--train.rewind=5",)
    job = run.start(before=partial(poison_losses, {step: (0, float("nan"), 0.0) for step in (8, 9, 10)}))
    assert not any(run.end()), job.text[-3000:]
    assert job.text.count("step 10: back to step 6, and on with other data") == 1
    rows = read_metrics(run.results)
    assert [row["rewind/from"] for row in rows if "rewind/from" in row] == [10]
    assert [row["step"] for row in rows] == [*range(1, 7), 6, *range(7, trust.runs.STEPS + 1)]
    assert rows[-1]["skipped_steps"] == 0
