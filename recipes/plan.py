"""Count what a step will move and borrow on many GPUs:  python recipes/plan.py --model llama-7b --gpus '[8,64,1024]'"""

import pandas as pd
import torch
from jsonargparse import CLI
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import symlm.planning

SIZES = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def main(
    model: str = "llama-7b",
    gpus: list[int] = [8, 64, 256, 1024],  # noqa: B006
    per_node: int = 8,
    preset: str = "default",
) -> None:
    """Print a table: each layout on each number of GPUs.

    Args:
        model: "llama-7b", "llama-70b", or a Hugging Face config by name or path.
        gpus: how many in all.
        per_node: how many a machine has: HSDP cuts parameters inside it, and repeats them over machines.
        preset: the optimizer's table.
    """
    sizes = SIZES.get(model)
    config = AutoConfig.for_model("llama", vocab_size=32000, **sizes) if sizes else AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    rows = []
    for world in tqdm(gpus):
        for name, shards in (("DDP", 1), ("HSDP", per_node), ("FSDP2", world)):
            if world % shards or (name == "HSDP" and world <= per_node):
                continue
            counted = symlm.planning.plan(built, shards, world // shards, preset=preset)
            rows.append(
                {
                    "GPUs": world,
                    "layout": name,
                    "optimizer receives (GB)": f"{counted.received / 1e9:.2f}",
                    "gradients receive (GB)": f"{counted.gradients / 1e9:.2f}",
                    "temporary memory (GB)": f"{counted.temporary / 1e9:.2f}",
                    "busiest / mean rank": f"{counted.imbalance:.2f}",
                }
            )
    print(pd.DataFrame(rows).to_markdown(index=False))


if __name__ == "__main__":
    CLI(main, as_positional=False)
