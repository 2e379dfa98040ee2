"""The recipe as a process: it learns, survives SIGKILL bit for bit, and refuses what it cannot do."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from pretraining import config as run_config
from pretraining import folder as run_folder
from pretraining import setup
from pretraining.models import MODELS, build_model
from recipe import CONFIGS, command, write_text
from safetensors.torch import load_file
from torch.distributed import distributed_c10d
from transformers import AutoConfig, AutoModelForCausalLM

import symlm


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    done = run(text, out)
    assert done.returncode == 0, done.stderr
    return out / "default", done.stdout


def test_a_run_leaves_its_report(whole):
    folder, printed = whole
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validation = [row["val/loss"] for row in rows if "val/loss" in row]
    assert validation[-1] < validation[0]
    assert rows[-1]["step"] == 12
    assert rows[-1]["tokens"] == 12 * 2 * 64
    assert rows[-1]["update_rms/lm_head"] >= 0
    assert all((folder / name).stat().st_size > 5000 for name in ("loss.png", "update_rms.png"))
    assert "centered_whitened_row_adam" in printed
    assert "sample:" in printed
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-10", "step-12"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_killed_run_resumes_bit_for_bit(text, whole, tmp_path):
    killed = command(text, tmp_path, python=sys.executable)
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "default" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "default" / "model").exists()
    done = run(text, tmp_path, "--resume=true")
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (tmp_path / "default", whole[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "default" / "metrics.jsonl").read_text() == (whole[0] / "metrics.jsonl").read_text()


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=str)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_for_bit(text, whole, tmp_path, asked):
    """Behind the step in hand, not at the next multiple of `save_every`; nothing of a finished run is drawn."""
    command_line = command(text, tmp_path, "--train.save_every=5", python=sys.executable)
    process = subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics, deadline = tmp_path / "default" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(asked)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + asked, printed
    assert f"{asked.name}: the run ends behind a step" in printed
    steps = [int(path.name[5:]) for path in (tmp_path / "default" / "checkpoints").glob("step-*")]
    assert 3 <= max(steps) < 12
    assert not (tmp_path / "default" / "model").exists()
    done = run(text, tmp_path, "--train.save_every=5", "--resume=auto")
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (tmp_path / "default", whole[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics.read_text() == (whole[0] / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--optimizer.preset=defualt", "unknown preset 'defualt'"),
        ("--model.preset=qwen", "unknown model preset 'qwen'"),
        ("--resume=true", "holds no run to resume"),
        ("--data.length=100000", "less than one block"),
    ],
)
def test_bad_input_is_named(text, tmp_path, argument, message):
    done = run(text, tmp_path, argument)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--train.stepz=3", "Did you mean 'train.steps'?"),
        ("--train.lr=3", "Did you mean 'optimizer.lr'?"),
        ("--train.steps=0", "train.steps is at least 1, got 0"),
        ("--train.keep=0", "train.keep is at least 1, got 0"),
        ("--data.length=1", "data.length is at least 2, got 1"),
        (
            "--train.tracker=swanlab",
            "train.tracker 'swanlab' is not installed or unknown; there are ['none', 'tensorboard'",
        ),
    ],
)
def test_bad_fields_are_named_before_anything_is_done(capsys, argument, message):
    with pytest.raises(SystemExit):
        run_config.read([argument])
    assert message in capsys.readouterr().err


def test_agd_takes_no_rate():
    with pytest.raises(ValueError, match=r"AGD finds its rate by itself"):
        setup.build_optimizer(None, run_config.OptimizerConfig(algorithm="agd", lr=0.1), None)


@pytest.mark.parametrize(("told", "used"), [([], "bf16"), (["--train.mixed_precision=no"], "no")])
def test_precision_is_the_launchers_unless_told(monkeypatch, told, used):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(True)  # a Trainer in this process has made one
    try:
        config = run_config.read(["--train.tracker=none", *told])
        assert setup.build_accelerator(config).mixed_precision == used
    finally:
        AcceleratorState._reset_state(True)


def test_the_time_limit_is_that_of_every_group(monkeypatch):
    """DeepSpeed's groups too, which it makes without one: a frozen rank was waited for half an hour there."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))  # and back again
    try:
        accelerator = setup.build_accelerator(run_config.read(["--train.tracker=none", "--train.timeout=7"]))
        assert accelerator.init_handler.timeout.total_seconds() == 7
        assert distributed_c10d._get_default_timeout("gloo").total_seconds() == 7
    finally:
        AcceleratorState._reset_state(True)


def test_resuming_another_configuration_is_refused(text, whole):
    done = run(text, whole[0].parent, "--resume=true", "--train.clip=1.0", "--train.keep=1")
    assert "holds another run (train.clip: None -> 1.0): resume" in done.stderr


def test_a_run_is_not_lost_by_a_forgotten_flag(text, whole):
    folder = whole[0]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run(text, folder.parent)
    assert "holds a run: go on with it, --resume=true" in done.stderr
    done = run("nothere", folder.parent, "--overwrite=true")
    assert "'nothere' is no local path" in done.stderr
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_that_is_resumed_keeps_what_it_cost(text, whole):
    before = (whole[0] / "summary.json").read_text()
    done = run(text, whole[0].parent, "--resume=true")
    assert done.returncode == 0, done.stderr
    assert (whole[0] / "summary.json").read_text() == before
    assert json.loads(before)["commit"]


def test_a_run_on_other_processes_is_another_run(tmp_path):
    config = run_config.read([f"--out={tmp_path}", "--train.tracker=none"])
    before, now = (json.loads(json.dumps(run_folder.resolve(config, "no", processes))) for processes in (2, 1))
    assert list(run_folder.differences(before, now)) == ["samples_a_step: 16 -> 8"]
    assert not list(run_folder.differences(before, {**before, "name": "moved", "out": "elsewhere"}))


def cut(file):
    file.write_bytes(file.read_bytes()[:1000])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("flag", ["--resume=true", "--resume=auto"])
@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda file: file.unlink()], ids=["cut", "bit", "missing"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_taken(text, whole, tmp_path, damage, flag):
    copied = shutil.copytree(whole[0], tmp_path / "default")
    (copied / "checkpoints" / "step-foo").mkdir()
    damage(copied / "checkpoints" / "step-12" / "model.safetensors")
    done = run(text, tmp_path, flag)
    assert done.returncode == 0, done.stderr
    assert "step-12 is damaged (model.safetensors is missing, changed or another's)" in done.stdout
    assert (copied / "checkpoints" / "step-12.damaged").exists()
    assert (copied / "metrics.jsonl").read_text() == (whole[0] / "metrics.jsonl").read_text()
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (copied, whole[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew_unasked(text, whole, tmp_path):
    copied = shutil.copytree(whole[0], tmp_path / "default")
    for step in (10, 12):
        cut(copied / "checkpoints" / f"step-{step}" / "optimizer.bin")
    done = run(text, tmp_path, "--resume=auto")
    assert done.returncode != 0
    assert "is whole: begin anew with --overwrite=true" in done.stderr


def test_auto_begins_where_there_is_nothing_and_is_the_same_run(text, whole, tmp_path):
    done = run(text, tmp_path, "--resume=auto")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "default" / "metrics.jsonl").read_text() == (whole[0] / "metrics.jsonl").read_text()


def test_two_runs_do_not_share_a_folder(tmp_path):
    run_folder._lock(tmp_path)
    with pytest.raises(RuntimeError, match="another process is training in"):
        run_folder._lock(tmp_path)
    run_folder._locks.pop().close()
    run_folder._lock(tmp_path)


def test_a_run_that_blows_up_ends_and_says_so(text, tmp_path):
    done = run(text, tmp_path, "--optimizer.lr=1e30", "--train.log_every=1", "--train.steps=50")
    assert done.returncode == 1
    assert "the loss is no number any more" in done.stderr
    folder = tmp_path / "default"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] < 10
    assert math.isnan(last["val/loss"])
    assert last["skipped_steps"] > 0
    assert (folder / "loss.png").exists()
    assert not (folder / "model").exists()


def test_every_field_has_its_help(capsys):
    with pytest.raises(SystemExit):
        run_config.read(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    for part in (run_config.DataConfig, run_config.ModelConfig, run_config.OptimizerConfig, run_config.TrainConfig):
        for own in dataclasses.fields(part):
            told = part.__doc__.split(f"        {own.name}: ")[1].split("\n")[0]
            assert " ".join(told.split()) in help_text, own.name


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*-tiny.yaml")))
def test_tiny_runs_of_every_architecture(text, tmp_path, config):
    done = run(text, tmp_path, f"--config={CONFIGS / config}.yaml", "--train.steps=4")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / config
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["logits/centered_rms"] > 0
    saved = AutoModelForCausalLM.from_pretrained(folder / "model").config.model_type
    assert saved == MODELS[config]["model_type"]
    if config in ("olmoe-tiny", "gpt-oss-tiny"):
        assert len(last["router/load"]) == 4
        assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in last["router/load"])
        assert 0 < last["router/load_entropy"] <= 1
        assert (folder / "expert_load.png").stat().st_size > 5000


def test_sizes_change_a_model_whole():
    model = build_model("qwen3-tiny", None, {"num_hidden_layers": 2, "hidden_size": 64}, 100, 0)
    assert len(model.model.layers) == len(model.config.layer_types) == 2
    assert model.config.vocab_size == 100
    with pytest.raises(ValueError, match=r"Qwen3Config has no field \['layers'\]"):
        build_model("qwen3-tiny", None, {"layers": 2}, 100, 0)


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_is_read_and_its_roles_exist(config):
    values = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    assert values["name"] == config
    optimizer = values["optimizer"]
    presets = [values["model"]["preset"]] if "model" in values else ["qwen3-tiny", "olmoe-tiny"]  # an arm of any bench
    small = {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 64, "intermediate_size": 32}
    roles = set()
    for preset in presets:
        sizes = {"vocab_size": 64} if preset.endswith("-tiny") else small
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[preset] | sizes))
        told = (optimizer.get("lr", 0.02), optimizer["preset"], optimizer.get("overrides"))
        roles |= {group["role"] for group in symlm.param_groups(network, *told)}
    assert set(optimizer.get("overrides", {})) <= roles
    run_config.read([f"--config={CONFIGS / config}.yaml"])


SYSTEMS = {
    "aro": ["--optimizer.preset=aro"],
    "auon": ["--optimizer.preset=auon"],
    "polargrad": ["--optimizer.preset=polargrad"],
    "agd": ["--optimizer.algorithm=agd"],
    "aro, one rotation a layer": ["--optimizer.preset=aro", '--optimizer.options={"rotation": "layer"}'],
    "hybrid auon": ['--optimizer.overrides={"mlp_in": {"rule": "hybrid_auon"}}'],
    "polar first": ["--optimizer.preset=polargrad", '--optimizer.options={"momentum_of": "directions"}'],
    "teleport": ["--train.teleport_every=2"],
    "bounded logits": ["--train.qk_clip=0.5"],
    "softmax radius": ["--train.r_target=0.5"],
    "softmax radius, a quantile": ["--train.r_target=0.5", "--train.r_over=0.95"],
    "softmax radius, standalone": ["--train.r_target=0.1", "--train.r_standalone=true"],
    "smoothness": ["--train.smoothness_every=2"],
    "averages": ["--train.look_ahead=0.3", "--train.tail_average=true"],
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_is_switched_on_by_configuration(text, tmp_path, system):
    done = run(text, tmp_path, *SYSTEMS[system], "--train.steps=4", "--train.log_every=2")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "default" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["train/loss"] < 7
    assert system != "teleport" or row["teleport/gradient_ratio"] > 1
    assert "softmax radius" not in system or row["radius/taken"] <= 0.5 + 1e-6
    assert "standalone" not in system or row["radius/taken"] == pytest.approx(0.1)
    assert ("attention/largest_logit" in row) == (system == "bounded logits")
    assert ("update_rms/mlp_in" in row) == (system != "agd")
    assert system != "smoothness" or 0 < row["smoothness/gamma/mlp_in"] < row["smoothness/gamma/all"]


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("linear", lambda left: min(1.0, left / 0.5)),
        ("power", lambda left: min(1.0, left / 0.5) ** 1.2),
        ("cosine", lambda left: 0.5 - 0.5 * math.cos(math.pi * left)),
    ],
)
def test_a_schedule_is_its_formula(schedule, factor):
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    rates = setup.build_schedule(optimizer, run_config.TrainConfig(steps=20, warmup=4, decay=0.5, schedule=schedule))
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(min(1.0, (step + 1) / 4) * factor(1 - step / 20))
        optimizer.step()
        rates.step()
    with pytest.raises(ValueError, match="choose 'linear', 'power' or 'cosine'"):
        setup.build_schedule(optimizer, run_config.TrainConfig(schedule="step"))


CONDUCTED = ("--model.preset=olmoe-tiny", "--train.load_loss=10", "--train.steps=6", "--train.save_every=3")


@pytest.mark.parametrize(
    "how", [("all",), ("stochastic", "--train.accumulate=2", "--train.smoothness_every=2")], ids=str
)
def test_a_conductor_conducts_and_a_run_with_it_resumes_bit_for_bit(text, tmp_path, how):
    flags = [*CONDUCTED, *how[1:], f"--train.conductor={how[0]}"]
    assert run(text, tmp_path, *flags).returncode == 0
    folder = tmp_path / "default"
    before, rows = load_file(folder / "model" / "model.safetensors"), (folder / "metrics.jsonl").read_text()
    last = json.loads(rows.splitlines()[-1])
    assert last["conductor/norm/load"] > 0
    assert -1 <= last["conductor/cosine"] < 1
    shutil.rmtree(folder / "checkpoints" / "step-6")
    assert run(text, tmp_path, *flags, "--resume=true").returncode == 0
    after = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(after[name], W) for name, W in before.items())
    assert (folder / "metrics.jsonl").read_text() == rows


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.conductor=all"], "train.conductor needs two losses, and this run has one"),
        ([*CONDUCTED, "--train.conductor=stochastic"], "train.accumulate must be a multiple of that, got 1"),
        ([*CONDUCTED, "--train.conductor=all", "--train.mixed_precision=fp16"], "which DeepSpeed partitions and fp16"),
    ],
)
def test_what_a_conductor_cannot_do_is_named(text, tmp_path, flags, message):
    done = run(text, tmp_path, *flags)
    assert done.returncode != 0
    assert message in done.stderr
