"""The recipe and the Trainer under the launchers: two processes, two machines, DeepSpeed, and a kill in a save."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import warm_python
from numerics import RANKS, relative
from recipe import ROOT, command, launch, write_text
from safetensors.torch import load_file
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import AutoModelForCausalLM

TWO = ("--train.batch=1",)  # a process: the batch of both is that of one process alone


def slow(*values):
    """Mark a case whose guarantee another case of `make test` holds too."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """What one process trains."""
    out = tmp_path_factory.mktemp("whole")
    subprocess.run(command(text, out), check=True, capture_output=True)
    return out / "default"


def run(*arguments, **environment):
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | environment, check=False)
    raised = "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank"))
    assert done.returncode == 0, raised or done.stderr[-4000:]
    return done.stdout


def recipe(text, out, *more):
    """Return the recipe's own part of a launch: a launcher starts Python itself."""
    fields = [part for part in command(text, out)[1:] if not part.startswith("--train.batch")]
    return [*fields, *TWO, *more]


def assert_alike(folder, whole):
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, whole))
    for name, W in theirs.items():
        assert relative(ours[name], W) < RANKS, name


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["val/loss"] for row in rows if "val/loss" in row]


@pytest.mark.parametrize("config", ["cpu2", slow("ddp8")])
def test_two_processes_train_what_one_does(text, whole, tmp_path, config):
    flags = ["--num_processes=2", "--mixed_precision=no"]
    run(*launch(f"{config}.yaml", *flags), *recipe(text, tmp_path))
    assert_alike(tmp_path / "default", whole)
    assert losses(tmp_path / "default") == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.parametrize("config", [slow("cpu2"), slow("nodes")])
def test_two_machines_train_what_one_does(text, whole, tmp_path, config):
    """Two launchers on this machine, each with a rank of its own and one rendezvous, as two nodes would be."""
    port, script = get_free_port(), [str(ROOT / "tests" / "fsdp2_on_cpus.py")] if config == "nodes" else []
    flags = ["--num_machines=2", "--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    flags += ["--mixed_precision=no"]
    nodes = [
        subprocess.Popen(
            [*launch(f"{config}.yaml", *flags, f"--machine_rank={rank}"), *script, *recipe(text, tmp_path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors[-4000:]
    assert_alike(tmp_path / "default", whole)


@pytest.mark.parametrize("stage", [slow(1), 2, 3])
def test_deepspeed_trains_and_resumes_bit_for_bit(text, whole, tmp_path, stage):
    start = launch(f"zero{stage}.yaml", "--num_processes=2", "--mixed_precision=no")
    run(*start, *recipe(text, tmp_path), DS_ACCELERATOR="cpu")
    folder = tmp_path / "default"
    before = load_file(folder / "model" / "model.safetensors")
    if stage < 3:  # which draws its first weights in parts
        assert_alike(folder, whole)
    assert losses(folder)[-1] < losses(folder)[0]
    (folder / "checkpoints" / "step-12").rename(folder / "checkpoints" / "lost")
    run(*start, *recipe(text, tmp_path, "--resume=true"), DS_ACCELERATOR="cpu")
    after = load_file(folder / "model" / "model.safetensors")
    assert all((after[name] == W).all() for name, W in before.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [("--train.tail_average=true", "averages are of whole weights"), ("--train.r_target=1", "without DeepSpeed")],
)
def test_what_deepspeeds_partitions_would_leave_without_effect_is_refused(text, tmp_path, flag, message):
    start = launch("zero1.yaml", "--num_processes=1", "--mixed_precision=no")
    arguments = [*start, *recipe(text, tmp_path, flag)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    assert done.returncode
    assert message in done.stderr


TWO_BY_TWO = ("--num_machines=1", "--parallelism_config_dp_shard_size=2")


def sharded(config, processes, *flags):
    """Return the command that starts a script under one of the repository's FSDP2 configurations, on CPUs."""
    told = [f"--num_processes={processes}", "--mixed_precision=no", *flags]
    return [*launch(f"{config}.yaml", *told), str(ROOT / "tests" / "fsdp2_on_cpus.py")]


@pytest.mark.parametrize(
    ("config", "processes", "flags"),
    [("fsdp8", 2, ()), slow("hsdp", 4, TWO_BY_TWO)],
)
def test_fsdp2_trains_and_resumes_bit_for_bit(text, whole, tmp_path, config, processes, flags):
    start = sharded(config, processes, *flags)
    run(*start, *recipe(text, tmp_path))
    folder = tmp_path / "default"
    before = load_file(folder / "model" / "model.safetensors")
    if processes == 2:
        assert_alike(folder, whole)
    assert losses(folder)[-1] < losses(folder)[0]
    assert len(list((folder / "checkpoints" / "step-12" / "optimizer_0").glob("*.distcp"))) == processes  # shards
    (folder / "checkpoints" / "step-12").rename(folder / "checkpoints" / "lost")
    run(*start, *recipe(text, tmp_path, "--resume=true"))
    after = load_file(folder / "model" / "model.safetensors")
    assert all((after[name] == W).all() for name, W in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu2", "fsdp8"])
def test_averages_of_two_processes_are_one_processs_and_resume_bit_for_bit(text, tmp_path, config):
    averages = ["--train.look_ahead=0.5", "--train.tail_average=true", "--train.keep=9", "--train.save_every=3"]
    alone = command(text, tmp_path / "alone", *averages)
    run(*alone)
    start = sharded(config, 2) if config == "fsdp8" else launch(f"{config}.yaml", "--mixed_precision=no")
    run(*start, *recipe(text, tmp_path, *averages))
    folder = tmp_path / "default"
    before = load_file(folder / "model" / "model.safetensors")
    assert_alike(folder, tmp_path / "alone" / "default")
    for step in (6, 9, 12):  # the look-ahead ends behind step 8, and the tail begins behind step 10
        (folder / "checkpoints" / f"step-{step}").rename(folder / "checkpoints" / f"lost-{step}")
    run(*start, *recipe(text, tmp_path, *averages, "--resume=true"))
    after = load_file(folder / "model" / "model.safetensors")
    assert all((after[name] == W).all() for name, W in before.items())


@pytest.mark.parametrize("config", ["", slow("cpu2"), slow("fsdp8")])
def test_saves_in_the_background_change_no_bit_of_a_run_nor_of_one_that_goes_on(text, tmp_path, config):
    """The averages are states that an optimizer has beside its momentum."""
    averages = ["--train.look_ahead=0.5", "--train.tail_average=true", "--train.keep=9", "--train.save_every=3"]
    start = {"": [warm_python.executable()], "fsdp8": sharded("fsdp8", 2)}.get(config)
    start = start or launch(f"{config}.yaml", "--mixed_precision=no")
    run(*start, *recipe(text, tmp_path / "before", *averages))
    run(*start, *recipe(text, tmp_path, *averages, "--train.async_save=true"))
    folder = tmp_path / "default"
    before = (tmp_path / "before" / "default" / "model" / "model.safetensors").read_bytes()
    assert (folder / "model" / "model.safetensors").read_bytes() == before
    for step in (6, 9, 12):
        assert (folder / "checkpoints" / f"step-{step}" / "states" / ".metadata").exists()
        (folder / "checkpoints" / f"step-{step}").rename(folder / "checkpoints" / f"lost-{step}")
    run(*start, *recipe(text, tmp_path, *averages, "--resume=true"))  # which writes the ordinary kind
    assert (folder / "model" / "model.safetensors").read_bytes() == before


SHARED = [slow("cpu2", "stochastic"), slow("fsdp8", "stochastic"), slow("fsdp8", "all")]


@pytest.mark.parametrize(("config", "how"), SHARED)
def test_a_conductor_on_two_processes_resumes_bit_for_bit(text, tmp_path, config, how):
    """Its rows are sharded as the model is; accelerate would not reduce the first of two batches; and the load loss
    leaves the model inside a layer, by none of the outputs where FSDP2 gathers weights.
    """
    start = sharded(config, 2) if config == "fsdp8" else launch(f"{config}.yaml", "--mixed_precision=no")
    moe = ["--model.preset=olmoe-tiny", "--train.load_loss=10", f"--train.conductor={how}", "--train.accumulate=2"]
    moe += ["--train.steps=6", "--train.save_every=3"]
    run(*start, *recipe(text, tmp_path, *moe))
    folder = tmp_path / "default"
    before, rows = load_file(folder / "model" / "model.safetensors"), (folder / "metrics.jsonl").read_text()
    assert json.loads(rows.splitlines()[-1])["conductor/norm/load"] > 0
    (folder / "checkpoints" / "step-6").rename(folder / "checkpoints" / "lost")
    run(*start, *recipe(text, tmp_path, *moe, "--resume=true"))
    after = load_file(folder / "model" / "model.safetensors")
    assert all((after[name] == W).all() for name, W in before.items())
    assert (folder / "metrics.jsonl").read_text() == rows


def test_a_kill_during_a_save_of_two_processes_leaves_a_usable_checkpoint(text, whole, tmp_path):
    process = subprocess.Popen(
        [*launch("cpu2.yaml", python=sys.executable), *recipe(text, tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoints = tmp_path / "default" / "checkpoints"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if list(checkpoints.glob("step-*")) and (checkpoints / "unfinished").exists():
            break
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    for child in children_of(tmp_path):
        os.kill(child, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "default" / "model").exists()
    run(*launch("cpu2.yaml"), *recipe(text, tmp_path, "--resume=true"))
    assert_alike(tmp_path / "default", whole)


def children_of(out):
    """Return the processes of a run: a launcher puts them in sessions of their own."""
    found = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found if int(pid) != os.getpid()]


LAUNCHES = {
    "ddp": (),
    "fsdp2": (),
    "hsdp": (),
    "zero2": ({"zero_optimization": {"stage": 2}},),
    "zero3": ({"zero_optimization": {"stage": 3}},),
}


@pytest.mark.parametrize("kind", [kind if kind == "fsdp2" else slow(kind) for kind in LAUNCHES])
def test_the_trainer_trains_and_resumes_under_launchers(whole, text, tmp_path, kind):
    fields = [f"--model={whole / 'model'}", f"--text={text / '39.txt'}", "--length=32", f"--output_dir={tmp_path}"]
    fields += ["--max_steps=4", "--save_steps=2", "--per_device_train_batch_size=1", "--report_to=none"]
    for told in LAUNCHES[kind]:
        automatic = {"train_micro_batch_size_per_gpu": "auto", "zero_allow_untested_optimizer": True}
        (tmp_path / "deepspeed.json").write_text(json.dumps(told | automatic))
        fields += [f"--deepspeed={tmp_path / 'deepspeed.json'}"]
    script = [str(ROOT / "recipes" / "finetune_trainer.py"), *fields, "--ddp_backend=gloo"]
    start = [warm_python.executable(), "-m", "torch.distributed.run", "--nproc-per-node=2"]
    start += [f"--master-port={get_free_port()}"]
    if kind == "fsdp2":
        start = sharded("fsdp8", 2)
    if kind == "hsdp":
        start = sharded("hsdp", 4, *TWO_BY_TWO)
    told = run(*start, *script, "--use_cpu", DS_ACCELERATOR="cpu")
    assert "after" in told
    saved = tmp_path / "checkpoint-4" / "trainer_state.json"
    before = saved.stat().st_mtime_ns
    run(*start, *script, "--use_cpu", "--resume", "--max_steps=6", DS_ACCELERATOR="cpu")
    assert (tmp_path / "checkpoint-6").exists()
    if kind != "zero3":  # whose whole weights are saved where its configuration says so
        assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size
    assert saved.stat().st_mtime_ns == before  # a fresh start would have come by here again


def test_two_processes_that_are_asked_to_stop_save_one_checkpoint_and_go_on(text, whole, tmp_path):
    """A terminal's Ctrl-C reaches the launcher and both processes, and the launcher passes it on: it comes twice."""
    process = subprocess.Popen(
        [*launch("cpu2.yaml", python=sys.executable), *recipe(text, tmp_path, "--train.save_every=100")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics, deadline = tmp_path / "default" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    for child in children_of(tmp_path):
        os.kill(child, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) != 0
    (saved,) = (tmp_path / "default" / "checkpoints").iterdir()
    assert saved.name in ("step-6", "step-9")  # where both wait for each other anyway, to log
    run(*launch("cpu2.yaml"), *recipe(text, tmp_path, "--train.save_every=100", "--resume=true"))
    assert_alike(tmp_path / "default", whole)
