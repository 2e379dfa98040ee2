"""Faults happen to real processes of a tiny run: a few here, fifty in `make test-all`, all by recipes/faults.py."""

import json
import shutil
from random import Random

import faults
import pytest
from trust.runs import Lost, Run

FEW = (
    "SIGKILL in a save",
    "SIGKILL in an asynchronous save",
    "a bit flipped",
    "a pickle in a checkpoint",
    "the folder is gone",
)


def recorded(path):
    return json.loads(path.read_text())["faults"]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """One process and a few faults."""
    folder = tmp_path_factory.mktemp("faults")
    faults.main(folder, folder / "faults.json", names=FEW, launchers=("one process",), most=1)
    return folder


def test_a_few_faults_are_survived(campaign):
    records = recorded(campaign / "faults.json")
    assert {record["fault"] for record in records.values()} == set(FEW)
    assert all(record["survived"] == record["tried"] for record in records.values()), records
    assert records["SIGKILL in a save, one process, 0"]["tried"] > 1


def test_what_is_recorded_is_not_repeated(campaign):
    before = (campaign / "faults.json").read_bytes()
    faults.main(campaign, campaign / "faults.json", names=FEW, launchers=("one process",), most=1)
    assert (campaign / "faults.json").read_bytes() == before


def test_a_run_that_ends_with_other_weights_is_lost(campaign, tmp_path):
    run = Run(tmp_path / "run", "one process", campaign)
    shutil.copytree(run.whole.folder, run.folder)
    run.check()
    content = bytearray(run.weights.read_bytes())
    content[-1] ^= 1
    run.weights.write_bytes(content)
    with pytest.raises(Lost, match="other final weights"):
        run.check()


@pytest.mark.slow
def test_a_run_that_begins_anew_is_lost(campaign, tmp_path):
    run = Run(tmp_path / "run", "one process", campaign)
    shutil.copytree(run.whole.folder, run.folder)
    for path in run.saved():
        shutil.rmtree(path)
    with pytest.raises(Lost, match="did not go on from step 24"):
        run.go_on(since=24)
    run.job.wait(0)


@pytest.mark.slow
def test_fifty_faults_are_survived(tmp_path):
    faults.main(tmp_path, tmp_path / "faults.json", launchers=("one process",), most=1)
    records = recorded(tmp_path / "faults.json").values()
    assert sum(record["tried"] for record in records) > 40  # a run may end before the last faults of a chain
    assert all(record["survived"] == record["tried"] for record in records), records


@pytest.mark.slow
def test_a_rank_with_another_table_writes_nothing_and_the_restart_goes_on(tmp_path):
    """Rank 0 writes the settings of the folder: with the seed's, those that the restart does not have."""
    seed = next(k for k in range(99) if Random(f"{k}, a rank with another table, DDP, 0").randrange(2) == 0)
    names, launchers = ("a rank with another table",), ("DDP",)
    faults.main(tmp_path, tmp_path / "faults.json", seed=seed, names=names, launchers=launchers, most=1)
    (record,) = recorded(tmp_path / "faults.json").values()
    assert record["survived"] == record["tried"] == 1, record


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ZeRO-2", "ZeRO-3"])
@pytest.mark.parametrize("fault", ["a bad loss", "a bad gradient"])
def test_what_deepspeed_skips_by_itself_is_counted(tmp_path, launcher, fault):
    names, launchers = (fault,), (launcher,)
    faults.main(tmp_path, tmp_path / "faults.json", names=names, launchers=launchers, most=1, links=1)
    (record,) = recorded(tmp_path / "faults.json").values()
    assert record["survived"] == record["tried"] == 1, record
