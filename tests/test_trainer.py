"""The one line in a real Trainer: training, evaluation, checkpoints, a kill, schedules, bf16, torch.compile."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from datasets import Dataset
from models import tiny, tokens
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import symlm
import symlm.manifests
from symlm.averaging import EMANesterov, TailAverage

ROOT = Path(__file__).parents[1]


def data(rows=64):
    blocks = tokens(shape=(rows, 16)).tolist()
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def trainer(folder, model=None, callbacks=None, **arguments):
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "seed": 1}
    return Trainer(
        model or tiny(),
        TrainingArguments(str(folder), **{**defaults, "disable_tqdm": True, **arguments}),
        train_dataset=data(),
        eval_dataset=data(8),
        callbacks=callbacks,
        optimizer_cls_and_kwargs=symlm.hf.trainer_optimizer(lr=0.02),
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_one_line_trains_and_evaluates(tmp_path):
    run = trainer(tmp_path, max_steps=30, lr_scheduler_type="constant")
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.1
    assert isinstance(run.optimizer.optimizer, symlm.SymOptimizer)
    assert run.optimizer.optimizer.verify()


def test_a_trainer_resumes_bit_for_bit(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "cut", save_steps=3)
    first.add_callback(StopAt(3))
    first.train()
    second = trainer(tmp_path / "cut", save_steps=3)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert second.state.global_step == 6
    assert same(weights(second.model), weights(whole.model))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


def test_averages_of_a_trainer_resume_bit_for_bit(tmp_path):
    def begin(folder):
        run = trainer(folder, save_steps=4)
        optimizer = symlm.SymOptimizer(run.model, lr=0.02)
        run.optimizer_cls_and_kwargs, run.optimizer = None, optimizer
        EMANesterov(optimizer, 6, start=0.2, until=0.8)
        return run, TailAverage(optimizer, 6, start=0.5, horizon=0.5)

    whole, average = begin(tmp_path)
    whole.train()
    last = weights(whole.model)
    average.finish()
    assert not same(last, weights(whole.model))
    again, other = begin(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(last, weights(again.model))
    other.finish()
    assert same(weights(whole.model), weights(again.model))


@pytest.mark.parametrize(
    ("schedule", "options"),
    [("cosine", None), ("warmup_stable_decay", {"num_decay_steps": 2, "num_stable_steps": 2})],
)
def test_schedules_of_the_trainer_drive_every_group(tmp_path, schedule, options):
    seen = []

    class Rates(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **_):
            seen.append([group["lr"] / group["initial_lr"] for group in optimizer.param_groups])

    run = trainer(
        tmp_path, callbacks=[Rates()], lr_scheduler_type=schedule, lr_scheduler_kwargs=options, warmup_steps=2
    )
    run.train()
    assert all(max(rates) - min(rates) < 1e-12 for rates in seen)
    assert len({rates[0] for rates in seen}) > 2
    for group in run.optimizer.param_groups:
        rate = group["initial_lr"] * group["lr_multiplier"]
        assert rate == pytest.approx(0.02 * symlm.ROUTES[symlm.Role(group["role"])].lr)
    assert run.optimizer.param_groups[0]["initial_lr"] == 0.02  # which frameworks log


def test_gradient_accumulation_is_one_larger_batch(tmp_path):
    small = trainer(tmp_path / "a", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0)
    large = trainer(tmp_path / "b", per_device_train_batch_size=4, max_grad_norm=0.0)
    small.train()
    large.train()
    for name, W in weights(large.model).items():
        assert (weights(small.model)[name] - W).norm() < 2e-3 * W.norm(), name


def test_clipping_is_not_felt_by_rules_of_degree_0(tmp_path):
    clipped, free = (trainer(tmp_path / str(c), max_steps=1, max_grad_norm=c) for c in (1e-3, 0.0))
    clipped.train()
    free.train()
    for name, W in weights(free.model).items():
        if W.ndim > 1:  # AdamW's absolute eps feels the clip
            assert (weights(clipped.model)[name] - W).norm() < 1e-4 * W.norm(), name


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"torch_compile": True, "max_steps": 2}, id="compile", marks=pytest.mark.slow),
    ],
)
def test_the_trainers_modes(tmp_path, arguments):
    model = tiny()
    before = weights(model)
    trainer(tmp_path, model, **arguments).train()
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    assert not any(torch.equal(W, before[name]) for name, W in weights(model).items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model with a tokenizer of its own, as `make pretrain` leaves one."""
    from pretraining.packing import bpe_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = bpe_tokenizer([(ROOT / "README.md").read_text()], 300)
    tiny(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def finetune(saved, out, *flags, python=None):
    command = [python or warm_python.executable(), "recipes/finetune_trainer.py"]
    command += ["--model", saved, "--text", "README.md"]
    command += ["--output_dir", out, "--length", "32", "--max_steps", "8", "--save_steps", "2", "--use_cpu", "True"]
    command += ["--per_device_train_batch_size", "2", "--report_to", "none", "--logging_steps", "1", *flags]
    return [str(part) for part in command]


def test_a_killed_trainer_resumes_bit_for_bit(saved, tmp_path):
    subprocess.run(finetune(saved, tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    killed = finetune(saved, tmp_path / "cut", python=sys.executable)
    process = subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "cut" / "checkpoint-6").exists():
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        finetune(saved, tmp_path / "cut", "--resume", "True"), cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "loss on held-out blocks" in done.stdout
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert same(first, second)
    assert json.loads((tmp_path / "cut" / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    """Two checkpoints with their manifests."""
    folder = tmp_path_factory.mktemp("checkpointed")
    trainer(folder, save_steps=3, callbacks=[symlm.hf.SafeCheckpoints()]).train()
    return folder


def test_the_newest_whole_checkpoint_of_a_trainer_is_taken(checkpointed, tmp_path):
    folder = shutil.copytree(checkpointed, tmp_path / "run")
    newest = symlm.hf.SafeCheckpoints.newest
    assert newest(folder) == str(folder / "checkpoint-6")
    assert newest(folder, below=6) == str(folder / "checkpoint-3")
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        assert name in json.loads((folder / "checkpoint-6" / "manifest.json").read_text())
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(b"another's")
    with pytest.warns(UserWarning, match=r"checkpoint-6 is damaged \(optimizer.pt is missing, changed or another's\)"):
        assert newest(folder) == str(folder / "checkpoint-3")
    assert (folder / "checkpoint-6.damaged").exists()
    resumed = trainer(folder, save_steps=3, callbacks=[symlm.hf.SafeCheckpoints()])
    resumed.train(resume_from_checkpoint=newest(folder))
    assert same(weights(resumed.model), load_file(checkpointed / "checkpoint-6" / "model.safetensors"))


@pytest.mark.parametrize("first", ["before it looks", "before it renames"])
def test_two_processes_that_look_for_the_newest_checkpoint_at_once_find_the_same(
    checkpointed, tmp_path, monkeypatch, first
):
    folder = shutil.copytree(checkpointed, tmp_path / "run")
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(b"another's")
    newest, damage_of = symlm.hf.SafeCheckpoints.newest, symlm.manifests.damage_of

    def beside_another(path, required):
        monkeypatch.setattr(symlm.manifests, "damage_of", damage_of)
        damage = damage_of(path, required) if first == "before it renames" else None
        with pytest.warns(UserWarning, match="checkpoint-6 is damaged"):
            assert newest(folder) == str(folder / "checkpoint-3")
        return damage or damage_of(path, required)

    monkeypatch.setattr(symlm.manifests, "damage_of", beside_another)
    assert newest(folder) == str(folder / "checkpoint-3")
    assert (folder / "checkpoint-6.damaged" / "optimizer.pt").read_bytes() == b"another's"
    assert {path.name for path in folder.glob("*6*")} == {"checkpoint-6.damaged"}


def test_a_finished_trainer_that_is_resumed_makes_no_step_more(saved, tmp_path):
    """A kill between the last checkpoint and the model: the Trainer alone would go on from step 8 of 8 to a step 9."""
    for _ in range(2):
        subprocess.run(finetune(saved, tmp_path, "--resume", "True"), cwd=ROOT, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[-1] == "checkpoint-8"
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("checkpoint-8", "."))
    assert same(first, second)


def test_a_checkpoint_that_a_kill_left_half_is_not_taken(checkpointed, tmp_path):
    folder = shutil.copytree(checkpointed, tmp_path / "run")
    newest = symlm.hf.SafeCheckpoints.newest
    (folder / "checkpoint-6" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="it has no manifest, which is written last"):
        assert newest(folder) == str(folder / "checkpoint-3")
    (folder / "checkpoint-3" / "manifest.json").write_text("{")
    with (
        pytest.warns(UserWarning, match="its manifest cannot be read"),
        pytest.raises(RuntimeError, match=r"no checkpoint in .* is whole"),
    ):
        newest(folder)
    assert newest(folder) is None  # both are put aside now, by a message that nobody can miss
    shutil.copytree(checkpointed / "checkpoint-3", folder / "checkpoint-3", ignore=lambda *_: {"manifest.json"})
    with pytest.warns(UserWarning, match="checkpoint-3 is damaged"):
        assert newest(folder) is None  # the first of a run: it begins anew


def test_trl_takes_the_same_line(saved, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(saved)
    before = weights(model)
    text = [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) > 40]
    run = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, bf16=False, max_length=32),
        train_dataset=Dataset.from_dict({"text": text}),
        processing_class=AutoTokenizer.from_pretrained(saved),
        optimizer_cls_and_kwargs=symlm.hf.trainer_optimizer(lr=0.02),
    )
    run.train()
    assert isinstance(run.optimizer.optimizer, symlm.SymOptimizer)
    assert not any(torch.equal(W, before[name]) for name, W in weights(run.model).items())
