"""TRL's trainers: which take the factory, and that DPO, GRPO, KTO, RLOO and distillation train LoRA with it."""

import inspect

import pytest
import torch
import trl
from datasets import Dataset
from models import tiny
from peft import LoraConfig
from pretraining.packing import bpe_tokenizer

import symlm

TAKE_IT = {"SFTTrainer", "RewardTrainer"}
TAKE_NONE = {"DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer", "DistillationTrainer"}
PROMPTS = ["the model "] * 4
DATA = {
    "pairs": {"prompt": PROMPTS, "chosen": ["is trained"] * 4, "rejected": ["trains it"] * 4},
    "labels": {"prompt": PROMPTS, "completion": ["is trained", "trains it"] * 2, "label": [True, False] * 2},
    "prompts": {"prompt": PROMPTS},
}
SHORT = {"max_completion_length": 4}
CASES = {
    "DPO": ("pairs", {}, ()),
    "KTO": ("labels", {}, ()),
    "GRPO": ("prompts", {"num_generations": 2, **SHORT}, ("reward",)),
    "RLOO": ("prompts", {"num_generations": 2, **SHORT}, ("reward",)),
    "Distillation": ("prompts", SHORT, ("teacher",)),
}


def test_trl_takes_the_factory_where_the_page_says():
    for name in TAKE_IT | TAKE_NONE:
        taken = inspect.signature(getattr(trl, name).__init__).parameters
        assert ("optimizer_cls_and_kwargs" in taken) == (name in TAKE_IT), name
        assert "optimizers" in taken, name


def trainer(name, folder, **more):
    data, settings, beside = CASES[name]
    tokenizer = bpe_tokenizer(["the model is trained, and trains it"], 260)
    tokenizer.pad_token = tokenizer.eos_token
    others = {
        "reward": lambda completions, **_: [float(k % 2) for k in range(len(completions))],
        "teacher": tiny(vocab_size=len(tokenizer), seed=1),
    }
    arguments = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
    config = getattr(trl, f"{name}Config")(
        str(folder), per_device_train_batch_size=2, disable_tqdm=True, **arguments, **settings
    )
    return getattr(trl, f"{name}Trainer")(
        tiny(vocab_size=len(tokenizer)),
        *[others[key] for key in beside],
        args=config,
        train_dataset=Dataset.from_dict(DATA[data]),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
        **more,
    )


@pytest.mark.parametrize(
    "name", [name if name == "DPO" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_trls_trainers_train_lora_with_the_factory_set_after_the_constructor(name, tmp_path):
    run = trainer(name, tmp_path)
    run.optimizer_cls_and_kwargs = symlm.hf.trainer_optimizer(lr=0.02)
    before = {key: p.detach().clone() for key, p in run.model.named_parameters() if p.requires_grad}
    frozen = {key: p.detach().clone() for key, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    after = dict(run.model.named_parameters())
    assert before
    assert not [key for key, W in before.items() if torch.equal(W, after[key])]
    assert not [key for key, W in frozen.items() if not torch.equal(W, after[key])]
    opt = run.optimizer.optimizer
    assert {group["role"] for group in opt.param_groups} == {"lora"}
    assert len(opt.verify()) == len(before)


def test_an_optimizer_built_before_trl_wraps_the_model_is_warned_of_and_fails_verify(tmp_path):
    class Early(trl.DPOTrainer):
        def __init__(self, model, **more):
            super().__init__(model, optimizers=(symlm.SymOptimizer(model), None), **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "DPOTrainer", Early)
        run = trainer("DPO", tmp_path)
    opt = run.optimizer
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
        run.train()
    with pytest.raises(RuntimeError, match="no step has reached it"):
        opt.verify()
