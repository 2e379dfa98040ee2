"""Screenings: designs are orthogonal, effects of a known answer come out, and finished runs are stored."""

import json
import subprocess

import numpy as np
import pytest
import warm_python
import yaml
from evidence.designs import design, effects
from models import tiny
from recipe import CONFIGS, ROOT
from screen import at_level

import symlm


@pytest.mark.parametrize("dials", range(1, 24))
def test_columns_of_a_design_are_balanced_and_orthogonal(dials):
    levels = design(dials)
    runs, columns = levels.shape
    assert dials <= columns < dials + 4
    assert runs == columns + 1
    assert set(np.unique(levels)) == {-1, 1}
    assert (levels.sum(0) == 0).all()
    assert (levels.T @ levels == runs * np.eye(columns)).all()


def test_effects_of_a_sum_are_its_terms():
    levels = design(7)
    losses = 3 + levels @ np.array([0.5, 0, 0, -0.25, 0, 0, 0.125]) / 2
    assert effects(levels, losses) == pytest.approx([0.5, 0, 0, -0.25, 0, 0, 0.125])


def test_a_dial_sets_all_its_places_and_nothing_else():
    arm = {"preset": "default", "overrides": {"vector": {"lr": 1.0}}}
    dials = {"a": {"overrides.vector.lr": [2.0, 3.0], "options.momentum": [0.8, 0.9]}, "b": {"lr": [0.01, 0.02]}}
    assert at_level(arm, dials, np.array([-1, 1])) == {
        "preset": "default",
        "lr": 0.02,
        "overrides": {"vector": {"lr": 2.0}},
        "options": {"momentum": 0.8},
    }
    assert arm["overrides"]["vector"]["lr"] == 1.0


def test_the_default_tables_dials_are_the_optimizers():
    """A misspelled place would be refused by the run, hours later."""
    optimizer = yaml.safe_load((CONFIGS / "default.yaml").read_text())["optimizer"]
    dials = yaml.safe_load((CONFIGS / "screens" / "default.yaml").read_text())
    for level in (-1, 1):
        given = at_level(optimizer, dials, np.full(len(dials), level))
        symlm.SymOptimizer(
            tiny("qwen3"), given["lr"], given["preset"], overrides=given["overrides"], **given["options"]
        )


def run_screen(out, dials, code=0):
    more = '["--train.steps=2","--train.validate_every=1","--data.validation_blocks=4","--data.length=32"]'
    fields = [f"--out={out}", f"--dials={dials}", f"--bench={CONFIGS / 'bench' / 'tiny-dense.yaml'}", f"--more={more}"]
    script = str(ROOT / "recipes" / "screen.py")
    done = subprocess.run([warm_python.executable(), script, *fields], capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def test_a_screening_runs_draws_and_is_not_run_twice(tmp_path):
    dials = tmp_path / "dials.yaml"
    dials.write_text("rate: {lr: [1.0e-9, 0.04]}\ndecay: {options.weight_decay: [0.0, 0.1]}\n")
    first = run_screen(tmp_path / "out", dials)
    written = json.loads((tmp_path / "out" / "screen.json").read_text())
    assert len(written["runs"]) == 4
    assert written["effects"]["rate"] < -2 * abs(written["effects"]["decay"])  # the low rate learns nothing
    assert written["error"] >= 0
    assert "error of an effect" in first.stdout
    assert (tmp_path / "out" / "effects.png").exists()
    when = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    run_screen(tmp_path / "out", dials)
    assert when == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}


@pytest.mark.parametrize("text", ["- 1\n", "rate: 3\n", "rate: {lr: [1]}\n", ""])
def test_dials_that_are_none_are_refused(tmp_path, text):
    dials = tmp_path / "dials.yaml"
    dials.write_text(text)
    assert "low, high" in run_screen(tmp_path / "out", dials, code=1).stderr
