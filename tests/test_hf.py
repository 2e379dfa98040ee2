"""What the Trainer's own arguments mean beside the one line, and what it trains beside the model."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import tiny, tokens
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import symlm


def trainer(folder, line=None, model=None, kind=Trainer, **arguments):
    blocks = tokens(shape=(16, 16)).tolist()
    return kind(
        model or tiny(),
        TrainingArguments(str(folder), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, **arguments),
        train_dataset=Dataset.from_dict({"input_ids": blocks, "labels": blocks}),
        optimizer_cls_and_kwargs=line or symlm.hf.trainer_optimizer(),
    )


def test_the_trainers_weight_decay_is_taken(tmp_path):
    groups = trainer(tmp_path, weight_decay=0.5).create_optimizer().param_groups
    assert {group["weight_decay"] for group in groups} == {0.5}
    line = symlm.hf.trainer_optimizer(weight_decay=0.1)
    assert {g["weight_decay"] for g in trainer(tmp_path, line, weight_decay=0.5).create_optimizer().param_groups} == {
        0.1
    }


def test_a_rate_that_is_not_used_is_warned_of_and_an_adamw_preset_takes_it(tmp_path):
    with pytest.warns(UserWarning, match=r"'learning_rate': 0.0003.*not used.*trainer_optimizer\(lr="):
        opt = trainer(tmp_path, learning_rate=3e-4).create_optimizer()
    assert opt.param_groups[0]["lr"] == 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        line = symlm.hf.trainer_optimizer(preset="adamw-compatible")
        assert trainer(tmp_path, line, learning_rate=3e-4).create_optimizer().param_groups[0]["lr"] == 3e-4
        trainer(tmp_path).create_optimizer()


def test_target_modules_are_refused(tmp_path):
    with pytest.raises(ValueError, match="optim_target_modules"):
        trainer(tmp_path, optim_target_modules=["q_proj"]).create_optimizer()


def test_an_optimizer_of_deepspeeds_configuration_is_refused(tmp_path, monkeypatch):
    """transformers then never calls the factory, and trains by DeepSpeed's AdamW without a word."""
    from transformers.integrations import deepspeed

    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    settings = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "train_micro_batch_size_per_gpu": "auto"}
    config = deepspeed.HfDeepSpeedConfig(settings)
    with pytest.raises(ValueError, match='has an "optimizer", which the Trainer takes in the place'):
        symlm.hf.trainer_optimizer(lr=0.02)
    del config.config["optimizer"]
    assert symlm.hf.trainer_optimizer(lr=0.02)


def test_a_loss_with_weights_of_its_own_is_trained(tmp_path):
    class Classify(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.classifier = model, nn.Linear(64, 3)

    class WithLoss(Trainer):
        def __init__(self, model, *arguments, **more):
            super().__init__(model, *arguments, **more)
            self.loss = Classify(model)

        def compute_loss(self, model, inputs, **more):
            logits = self.loss.classifier(model(input_ids=inputs["input_ids"]).logits[:, -1])
            return nn.functional.cross_entropy(logits, inputs["input_ids"][:, 0] % 3)

    run = trainer(tmp_path, kind=WithLoss)
    before = run.loss.classifier.weight.detach().clone()
    run.train()
    assert not torch.equal(run.loss.classifier.weight, before)


def test_the_factory_takes_arguments_in_second_place():
    factory, kwargs = symlm.hf.trainer_optimizer(lr=0.01)
    opt = factory()(tiny(), SimpleNamespace(weight_decay=0.3), **kwargs)
    assert isinstance(opt, symlm.SymOptimizer)
    opt = factory()(tiny(), TrainingArguments("x", weight_decay=0.3, use_cpu=True, report_to="none"), **kwargs)
    assert opt.param_groups[0]["weight_decay"] == 0.3


def test_an_adamw_preset_takes_the_trainers_default_rate_too(tmp_path):
    line = symlm.hf.trainer_optimizer(preset="adamw")
    assert trainer(tmp_path, line).create_optimizer().param_groups[0]["lr"] == 5e-5
    line = symlm.hf.trainer_optimizer(lr=1e-3, preset="adamw")
    assert trainer(tmp_path, line, learning_rate=1e-3).create_optimizer().param_groups[0]["lr"] == 1e-3


def test_a_masked_language_model_and_an_encoder_decoder_train(tmp_path):
    """The one line, on BERT's own objective and on T5's: every matrix moves, and the loss of one batch falls."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    bert = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=32))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    rows = [{"input_ids": x, "labels": x} for x in tokens(shape=(32, 16)).tolist()]
    for model in (bert, t5):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        line = symlm.hf.trainer_optimizer(lr=0.02)
        args = TrainingArguments(
            tmp_path, max_steps=12, report_to="none", use_cpu=True, logging_steps=4, save_strategy="no"
        )
        running = Trainer(model, args, train_dataset=Dataset.from_list(rows), optimizer_cls_and_kwargs=line)
        running.train()
        losses = [row["loss"] for row in running.state.log_history if "loss" in row]
        assert losses[-1] < losses[0]
        still = [name for name, p in model.named_parameters() if p.ndim > 1 and torch.equal(p, before[name])]
        assert set(still) <= {"bert.embeddings.token_type_embeddings.weight"}, still


def test_the_line_bounds_attention_logits(tmp_path):
    model = tiny("llama")
    q = model.model.layers[0].self_attn.q_proj.weight
    before = q.detach().norm()
    trainer(tmp_path, symlm.hf.trainer_optimizer(1e-9, qk_clip=1e-3), model).train()
    assert q.norm() < 0.5 * before
    with pytest.raises(ValueError, match="threshold must be a positive"):
        trainer(tmp_path, symlm.hf.trainer_optimizer(qk_clip=0)).create_optimizer()
