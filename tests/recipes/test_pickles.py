"""No file of a checkpoint runs code when it is read, whichever of the formats it has."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from pretraining.pickles import FORCED, only_data
from trust.damage import Hostile


@pytest.fixture
def mark(tmp_path):
    """The folder that the hostile pickle makes."""
    return tmp_path / "executed"


def test_states_are_plain_data_whoever_reads_them(tmp_path, mark):
    file = tmp_path / "custom_checkpoint_0.pkl"
    torch.save(Hostile(mark), file)
    torch.load(file, weights_only=False)
    assert mark.exists()  # so would it be read by accelerate
    mark.rmdir()
    with only_data(tmp_path), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not mark.exists()
    assert FORCED not in os.environ


def test_an_index_holds_nothing_but_an_index(tmp_path, mark):
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path)
    with only_data(tmp_path):
        loaded = {"weight": torch.zeros(3)}
        dcp.load(loaded, checkpoint_id=tmp_path)
    assert loaded["weight"].eq(1).all()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(ValueError, match=r"no index of a distributed checkpoint: it would run"), only_data(tmp_path):
        pass
    assert not mark.exists()


def test_a_distributed_checkpoint_holds_plain_data(tmp_path, mark):
    dcp.save({"value": Hostile(mark)}, checkpoint_id=tmp_path)
    with only_data(tmp_path), pytest.raises(dcp.api.CheckpointException):
        dcp.load({"value": 0}, checkpoint_id=tmp_path)
    assert not mark.exists()
    dcp.load({"value": 0}, checkpoint_id=tmp_path)
    assert mark.exists()  # so would it be read by torch


def test_the_states_of_deepspeed_are_read_and_no_other_class_in_them(tmp_path, mark):
    file = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"scaler": LossScaler(1.0)}, file)
    with only_data(tmp_path):
        assert torch.load(file, weights_only=False)["scaler"].loss_scale == 1
    torch.save({"scaler": LossScaler(1.0), "path": Path("x")}, file)
    with only_data(tmp_path), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
