"""A comparison's runs: their commands are read in one thread, by relative paths too."""

import json
import re
import resource
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pretrain
import pytest
from evidence import runs
from pretraining import config, folder
from pretraining.checkpoints import Checkpoints
from recipe import ROOT

from symlm.manifests import damage_of


@pytest.mark.parametrize("jobs", [1, 8])
def test_arms_are_read_by_relative_paths_however_many_run_at_once(tmp_path, monkeypatch, jobs):
    """jsonargparse changes the working directory while it reads a file: in many threads a relative path gets lost."""
    monkeypatch.chdir(ROOT)
    started = []

    def pretend(command, **_):
        started.append(command)
        fields = dict(part.removeprefix("--").split("=", 1) for part in command[2:])
        folder = Path(fields["out"], fields["name"])
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runs.subprocess, "run", pretend)
    bench, arms = Path("recipes/configs/bench/tiny-dense.yaml"), ("adamw", "muon", "default")
    wanted = [
        runs.Run(tmp_path, bench, Path(f"recipes/configs/{a}.yaml"), 1.0, seed) for a in arms for seed in range(6)
    ]
    runs.execute(wanted, jobs, (), "runs")
    assert len(started) == len(wanted)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_half_and_names_the_last_whole_one(tmp_path):
    def full(folder):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def write(folder):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"whole")

    disk = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, save_state=write)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(disk, 1)
    disk.save_state = full
    with pytest.raises(OSError, match=r"step-2 cannot be written .*No space left"):
        checkpoints.save(disk, 2)
    assert re.match(r"the last whole checkpoint is .*step-1: make room there", checkpoints.how_to_go_on())
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert damage_of(tmp_path / "step-1") == ""


def test_a_checkpoint_that_would_not_fit_is_not_begun(tmp_path, monkeypatch):
    def write(folder):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"whole" * 1000)

    disk = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, save_state=write)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(disk, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    with pytest.raises(OSError, match=r"step-2 cannot be written \(it takes .* GB and .* are free\)"):
        checkpoints.save(disk, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=6000))
    checkpoints.save(disk, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path):
    disk = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, save_state=pytest.fail)
    with pytest.raises(OSError, match=r"step-2 cannot be written .*No such file"):
        Checkpoints(tmp_path / "gone", keep=2).save(disk, 2)
    assert not list(tmp_path.iterdir())


def test_a_run_that_may_open_no_more_files_says_where_its_checkpoints_are(tmp_path):
    (tmp_path / "step-3").mkdir()
    checkpoints, limits = Checkpoints(tmp_path, keep=2), resource.getrlimit(resource.RLIMIT_NOFILE)
    assert "the last whole checkpoint is " + str(tmp_path / "step-3:") in checkpoints.how_to_go_on()
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        said = checkpoints.how_to_go_on()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert f"the last whole checkpoint is the newest in {tmp_path}: make room" in said


def test_pictures_that_cannot_be_written_cost_themselves_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 2, "train/loss": 3.0, "val/loss": 3.0}\n')
    (tmp_path / "loss.png").mkdir()  # which no picture takes the place of
    with pytest.warns(UserWarning, match="the pictures of .* are not drawn"):
        assert pretrain.drawn(tmp_path) == []
    (tmp_path / "loss.png").rmdir()
    assert tmp_path / "loss.png" in pretrain.drawn(tmp_path)


def test_a_row_of_metrics_that_does_not_fit_is_left_out_whole(tmp_path, monkeypatch):
    """The limit of a file's size, as a full disk does, takes the part of a row that still fits."""
    file, logged = tmp_path / "metrics.jsonl", []
    accelerator = SimpleNamespace(is_main_process=True, log=lambda row, step: logged.append(step))
    folder.write({"step": 1}, tmp_path, accelerator)
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.warns(UserWarning, match="the metrics of step 2 are not written"):
            folder.write({"step": 2, "train/loss": 3.0}, tmp_path, accelerator)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    folder.write({"step": 3}, tmp_path, accelerator)
    assert [row["step"] for row in folder.read_metrics(tmp_path)] == [1, 3]
    assert logged == [1, 3]


def test_metrics_are_read_around_what_is_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\x80\x04cut\n[1]\n{"step": 2}\n{"st')
    assert [row["step"] for row in folder.read_metrics(tmp_path)] == [1, 2]
    folder.forget_after(1, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damaged_settings_are_named(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_bytes(b"\x80\x04damaged")
    with pytest.raises(ValueError, match=rf"{file} cannot be read \(.*begin anew with --overwrite=true"):
        folder.is_finished(tmp_path, ["--train.tracker=none"])
    with pytest.raises(SystemExit):
        config.read([f"--config={file}"])
    assert f"--config={file} is no UTF-8 text" in capsys.readouterr().err
