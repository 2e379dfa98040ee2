"""Go on training a causal LM on local text with the Hugging Face Trainer and symlm's one line.

    python recipes/finetune_trainer.py --model runs/default/model --text README.md --output_dir runs/finetuned

Every field of TrainingArguments is a flag, but for the rate, which is --lr; `--resume` goes on from the last whole
checkpoint in the output folder, and begins where there is none.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

import symlm


@dataclass
class Fields:
    """What the Trainer's own arguments do not say."""

    model: str = "runs/default/model"
    text: str = "README.md"
    length: int = 128
    lr: float = 0.005
    preset: str = "default"
    resume: bool = False


def blocks(path: str, tokenizer, length: int) -> Dataset:
    """Cut a text file in blocks of `length` tokens; the model shifts the labels."""
    tokens = tokenizer(Path(path).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    rows = [tokens[k : k + length] for k in range(0, len(tokens) - length + 1, length)]
    if len(rows) < 2:
        raise ValueError(f"{path} has {len(tokens)} tokens, fewer than two blocks of {length}")
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def main() -> None:
    fields, arguments = HfArgumentParser((Fields, TrainingArguments)).parse_args_into_dataclasses()
    plain = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    if given := [name for name in ("learning_rate", "weight_decay") if getattr(arguments, name) != plain[name]]:
        raise SystemExit(f"--{given[0]} is the Trainer's own optimizer's, which symlm replaces: use --lr")
    if not Path(fields.model, "config.json").exists():
        raise SystemExit(f"{fields.model} holds no model: run `make pretrain` first, or give --model")
    tokenizer = AutoTokenizer.from_pretrained(fields.model)
    model = AutoModelForCausalLM.from_pretrained(fields.model)
    data = blocks(fields.text, tokenizer, fields.length).train_test_split(0.1, seed=arguments.seed)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        callbacks=[symlm.hf.SafeCheckpoints()],
        optimizer_cls_and_kwargs=symlm.hf.trainer_optimizer(lr=fields.lr, preset=fields.preset),
    )
    print(symlm.describe_routing(model, fields.preset, lr=fields.lr))
    with arguments.main_process_first():  # which renames what is damaged
        below = arguments.max_steps if arguments.max_steps > 0 else math.inf
        last = symlm.hf.SafeCheckpoints.newest(arguments.output_dir, below) if fields.resume else None
    # Both wrap the model together with its optimizer: they evaluate only once they have trained.
    wrapped = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    before = "" if wrapped else f"{trainer.evaluate()['eval_loss']:.3f} before, "
    trainer.train(resume_from_checkpoint=last)
    after = trainer.evaluate()["eval_loss"]
    if not trainer.is_deepspeed_enabled:  # whose partitions hold no whole momenta
        print(trainer.optimizer.optimizer.verify())
    print(f"loss on held-out blocks: {before}{after:.3f} after")
    if trainer.is_fsdp_enabled:  # whose shards are for going on; the model is saved whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
