"""Time a whole optimizer step on a GPU: symlm, torch.optim.Muon + fused AdamW, fused AdamW alone.

    python kernels/benchmarks/bench_step.py             # Qwen3-0.6B with 28 layers, and a 12-layer OLMoE

On a CPU recipes/benchmarks/benchmark_step.py does the same with its floor; here `--layers` makes it small enough to run
at all.
torch.optim.Muon takes no stack of experts, so each expert is given to it as a parameter of its own.
"""

import torch
from measuring import DEVICE, arguments, attempted, ceilings, seconds, write
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import symlm
from symlm.polar import fastest_dtype

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
    matrices = [
        p for name, p in model.named_parameters() if p.ndim > 1 and "layers" in name and "gate.weight" not in name
    ]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    found: dict[str, list[torch.optim.Optimizer]] = {"symlm": [symlm.SymOptimizer(model)]}
    if DEVICE == "cuda":
        found["symlm, triton"] = [symlm.SymOptimizer(model, kernels="triton")]
    apart = [part for p in matrices for part in slices(p)]
    found["torch.optim.Muon + AdamW"] = [torch.optim.Muon(apart), torch.optim.AdamW(rest, fused=True)]
    found["AdamW"] = [torch.optim.AdamW(model.parameters(), fused=True)]
    return found


def slices(p: nn.Parameter) -> list[nn.Parameter]:
    """Return a stack's matrices as parameters of their own, on the same memory."""
    if p.ndim == 2:
        return [p]
    assert p.grad is not None
    found = [nn.Parameter(part) for part in p.detach().unbind()]
    for part, gradient in zip(found, p.grad.unbind(), strict=True):
        part.grad = gradient
    return found


def main() -> None:
    told = arguments(__doc__, layers={"type": int}, width={"type": int})
    measured, rows = ceilings(fastest_dtype(DEVICE)), []
    for name, fields in MODELS.items():
        changes = {"num_hidden_layers": told.layers} if told.layers else {}
        if told.width:
            changes |= {"hidden_size": told.width, "intermediate_size": told.width, "vocab_size": 1000}
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields | changes))
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        spent: dict[str, float | str] = {}
        for contender, optimizers in contenders(model).items():
            spent[contender] = attempted(lambda own=optimizers: seconds(lambda: [o.step() for o in own], 3))
            for optimizer in optimizers:
                optimizer.state.clear()
        for contender, value in spent.items():
            row = {"model": name, "step": contender, "ms": 1e3 * value if isinstance(value, float) else value}
            timed = isinstance(value, float) and isinstance(spent["AdamW"], float)
            rows.append({**row, "of AdamW": value / spent["AdamW"] if timed else ""})
        path = write("step", rows, measured, told)
    print(path)


if __name__ == "__main__":
    main()
