"""Time a whole optimizer step on a GPU: symlm, torch.optim.Muon + fused AdamW, fused AdamW alone.

    python kernels/benchmarks/bench_step.py             # Qwen3-0.6B with 28 layers, and a 12-layer OLMoE

On a CPU recipes/benchmark_step.py does the same with its floor; here `--layers` makes it small enough to run at all.
"""

from argparse import ArgumentParser

import torch
from measuring import DEVICE, seconds, write
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import symlm

MODELS = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": False,
    },
    "olmoe": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 32,
        "vocab_size": 50_304,
        "tie_word_embeddings": False,
    },
}


def contenders(model: nn.Module) -> dict[str, list[torch.optim.Optimizer]]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]  # torch.optim.Muon takes no 3-D experts
    found: dict[str, list[torch.optim.Optimizer]] = {"symlm": [symlm.SymOptimizer(model)]}
    if DEVICE == "cuda":
        found["symlm, triton"] = [symlm.SymOptimizer(model, kernels="triton")]
    found["torch.optim.Muon + AdamW"] = [torch.optim.Muon(matrices), torch.optim.AdamW(rest, fused=True)]
    found["AdamW"] = [torch.optim.AdamW(model.parameters(), fused=True)]
    return found


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    arguments = parser.parse_args()
    rows = []
    for name, fields in MODELS.items():
        changes = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
        if arguments.width:
            changes |= {"hidden_size": arguments.width, "intermediate_size": arguments.width, "vocab_size": 1000}
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields | changes))
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        spent = {}
        for contender, optimizers in contenders(model).items():
            spent[contender] = seconds(lambda optimizers=optimizers: [o.step() for o in optimizers], 3)
            for optimizer in optimizers:
                optimizer.state.clear()
        rows += [
            {"model": name, "step": contender, "ms": 1e3 * value, "of AdamW": value / spent["AdamW"]}
            for contender, value in spent.items()
        ]
    print(write("step", rows))


if __name__ == "__main__":
    main()
