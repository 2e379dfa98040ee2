"""Checkpoints that are written while a run goes on: what they are of, and what becomes of one that cannot be."""

import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from pretraining.background import Background
from pretraining.checkpoints import Checkpoints
from torch import nn

import symlm
from symlm.agd import AGD
from symlm.manifests import damage_of, write_manifest


@pytest.fixture
def run():
    """A model of one process that has made a step, and its accelerator."""
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(8, 8))
    model, optimizer = accelerator.prepare(model, symlm.SymOptimizer(model, lr=0.1))
    model(torch.ones(4, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return SimpleNamespace(accelerator=accelerator, model=model, optimizer=optimizer.optimizer)


def states(run):
    """Return copies of all weights and momenta."""
    tensors = [t for state in run.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return [t.detach().clone() for t in (*run.model.parameters(), *tensors)]


@torch.no_grad()
def spoil(run):
    for state in run.optimizer.state.values():
        for tensor in filter(torch.is_tensor, state.values()):
            tensor.add_(1)
    for p in run.model.parameters():
        p.add_(1)


def test_a_checkpoint_is_of_the_state_when_it_was_begun(run, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, background=Background(run.accelerator))
    before = states(run)
    checkpoints.save(run.accelerator, 1)
    spoil(run)
    checkpoints.finish()
    assert damage_of(tmp_path / "step-1", required=True) == ""
    assert checkpoints.load(run.accelerator) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, states(run), strict=True))


def test_a_checkpoint_is_none_until_all_of_it_is_written(run, tmp_path):
    background, gate = Background(run.accelerator), threading.Event()
    checkpoints = Checkpoints(tmp_path, keep=2, background=background)
    background.sealing.submit(gate.wait)
    checkpoints.save(run.accelerator, 1)
    assert checkpoints.list() == []
    gate.set()
    checkpoints.save(run.accelerator, 2)  # which waits for the one before
    checkpoints.finish()
    assert [path.name for path in checkpoints.list()] == ["step-1", "step-2"]


def test_a_folder_that_is_moved_away_while_it_is_written_is_no_checkpoint(run, tmp_path):
    background, gate = Background(run.accelerator), threading.Event()
    checkpoints = Checkpoints(tmp_path, keep=2, background=background)
    background.sealing.submit(gate.wait)
    checkpoints.save(run.accelerator, 1)
    (tmp_path / "unfinished").rename(tmp_path / "away")
    (tmp_path / "unfinished" / "states").mkdir(parents=True)
    gate.set()
    with pytest.raises(OSError, match=r"the checkpoint behind none cannot be written .*was moved away"):
        checkpoints.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["away"]


def test_a_write_that_fails_ends_the_next_save(run, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, background=Background(run.accelerator))
    checkpoints.save(run.accelerator, 1)
    checkpoints.finish()
    (tmp_path / "step-2").write_text("no folder")  # which a checkpoint cannot take the place of
    checkpoints.save(run.accelerator, 2)
    with pytest.raises(OSError, match=r"the checkpoint behind .* cannot be written .*Not a directory"):
        checkpoints.save(run.accelerator, 3)
    assert not (tmp_path / "unfinished").exists()


def test_a_file_that_is_none_is_named(run, tmp_path):
    """torch's distributed checkpoints raise what is no `Exception`."""
    checkpoints = Checkpoints(tmp_path, keep=2, background=Background(run.accelerator))
    checkpoints.save(run.accelerator, 1)
    checkpoints.finish()
    (file,) = (tmp_path / "step-1" / "states").glob("*.distcp")
    file.write_bytes(b"none")
    write_manifest(tmp_path / "step-1")
    with pytest.raises(RuntimeError, match=r"step-1 cannot be read .*remove it to go on from the one before"):
        checkpoints.load(run.accelerator)


def test_deepspeed_writes_its_own_files():
    with pytest.raises(ValueError, match=r"train\.async_save: DeepSpeed writes its own files"):
        Background(SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED")))


def test_an_optimizer_without_state_is_refused():
    accelerator, model = Accelerator(cpu=True), nn.Sequential(nn.Linear(8, 8, bias=False))
    accelerator.prepare(model, AGD(model))
    with pytest.raises(ValueError, match=r"train\.async_save copies the state of SymOptimizer"):
        Background(accelerator)
