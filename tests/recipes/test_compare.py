"""Comparisons: one protocol, finished runs are kept, and the numbers of the table by hand."""

import json
import math
import subprocess

import pytest
import warm_python
from evidence.runs import best_factor
from evidence.tables import interval, table, tokens_to, whole_runs_to
from recipe import CONFIGS, ROOT
from sweep import best_of


def run_compare(out, steps=2, code=0):
    arms = json.dumps([str(CONFIGS / f"{name}.yaml") for name in ("adamw", "default")])
    more = f'["--train.steps={steps}","--train.validate_every=1","--data.validation_blocks=4","--data.length=32"]'
    fields = [f"--out={out}", f"--arms={arms}", '--models=["moe"]', "--factors=[1.0]", "--seeds=1", f"--more={more}"]
    fields += ["--shares=[0.5]"]
    script = str(ROOT / "recipes" / "compare.py")
    done = subprocess.run([warm_python.executable(), script, "--bench=tiny", *fields], capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def test_a_comparison_runs_draws_and_is_not_run_twice(tmp_path):
    run_compare(tmp_path)
    told = json.loads((tmp_path / "results.json").read_text())
    assert [(run["arm"], run["seed"], run["trial"], len(run["tokens"])) for run in told["runs"]] == [
        ("adamw", 0, True, 2),
        ("default", 0, True, 2),
        ("adamw", 1, False, 2),
        ("default", 1, False, 2),
        ("adamw", 1, False, 1),
        ("default", 1, False, 1),
    ]
    assert told["runs"][3]["optimizer_bytes"] < 0.55 * told["runs"][2]["optimizer_bytes"]
    assert "load CV" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 2
    assert not list(tmp_path.rglob("*.safetensors"))
    when = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    again = run_compare(tmp_path)
    assert when == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    assert "0it" in again.stderr.replace("0run", "0it")
    other = run_compare(tmp_path, steps=3, code=1)
    assert "adamw-x1-seed0 holds another run (train.steps: 2 -> 3)" in other.stderr


def test_the_best_rate_is_none_that_blew_up():
    assert best_of({0.1: math.nan, 0.2: 4.0, 0.3: 3.0}) == 0.3
    trials = [{"factor": 1.0, "loss": [math.nan]}, {"factor": 2.0, "loss": [4.0]}]
    assert best_factor(trials) == 2.0


def test_tokens_to_a_loss_are_read_between_the_points():
    assert tokens_to([10, 20, 30], [4.0, 3.0, 2.0], 2.5) == 25
    assert tokens_to([10, 20], [4.0, 3.0], 4.0) == 10
    assert tokens_to([10, 20], [4.0, 3.0], 1.0) == float("inf")


def test_whole_runs_of_fewer_tokens_are_read_between_their_lengths():
    runs = [
        {"seed": seed, "share": share, "loss": [9.0, 4.0 + seed - share]}
        for seed in (1, 2)
        for share in (0.25, 0.5, 1.0)
    ]
    goals = {1: 4.0 + 1 - 0.5, 2: 4.0 + 2 - 0.375}
    assert whole_runs_to(runs, goals) == interval([0.5, 0.25 * 2**0.5])
    assert whole_runs_to(runs, {1: 4.9}) == "at most 0.250"
    assert whole_runs_to(runs, {1: 1.0}) == "not reached by every seed"
    assert whole_runs_to([run for run in runs if run["share"] == 1], goals) == ""


def test_the_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"
    assert interval([1.5]) == "1.500"


def test_the_table_pairs_seeds():
    def run(arm, seed, last):
        told = {"factor": 1.0, "seconds_per_step": 0.5, "optimizer_bytes": 10**6}
        return {"arm": arm, "seed": seed, "tokens": [1, 2], "loss": [5.0, last], **told}

    runs = [run("adamw", 1, 4.0), run("adamw", 2, 4.2), run("default", 1, 3.0), run("default", 2, 3.2)]
    frame = table(runs, [run("adamw", 0, 4.0), run("adamw", 0, 4.1) | {"factor": 2.0}, run("default", 0, 3.0)])
    assert frame.loc["adamw", "rates ×"] == "1 (edge)"
    assert frame.loc["default", "rates ×"] == "1"
    assert frame.loc["adamw", "minus default"] == "1.000 ± 0.000"
    assert frame.loc["default", "tokens to adamw's loss"].startswith("0.7")
    assert frame.loc["adamw", "tokens to adamw's loss"] == "1.000 ± 0.000"
    with pytest.raises(KeyError):
        frame.loc["muon"]
