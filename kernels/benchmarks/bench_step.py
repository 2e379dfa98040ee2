"""Time a whole optimizer step on a GPU: symlm, torch.optim.Muon + fused AdamW, fused AdamW alone.

    python kernels/benchmarks/bench_step.py             # Qwen3-0.6B with 28 layers, and a 12-layer OLMoE

On a CPU use recipes/benchmarks/benchmark_step.py, which measures the same with its floor; here `--layers` makes the
models small enough for one. torch.optim.Muon does not accept a stack of experts, so each expert is given to it as a
separate parameter.
"""

import time
from collections.abc import Callable

import torch
from measuring import DEVICE, arguments, attempted, ceilings, seconds, write
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

import symlm
from symlm.polar import fastest_dtype

MODELS = {
    "qwen3-tiny": {
        "model_type": "qwen3",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
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
    """Return the optimizers of each contender, by name, for a model with gradients."""
    matrices = [
        p for name, p in model.named_parameters() if p.ndim > 1 and "layers" in name and "gate.weight" not in name
    ]
    spectral = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in spectral]
    optimizers: dict[str, list[torch.optim.Optimizer]] = {"symlm": [symlm.SymOptimizer(model)]}
    if DEVICE == "cuda":
        optimizers |= {
            f"symlm, {kernels}": [symlm.SymOptimizer(model, kernels=kernels)] for kernels in ("torch", "triton")
        }
    separate = [part for p in matrices for part in slices(p)]
    optimizers["torch.optim.Muon + AdamW"] = [torch.optim.Muon(separate), torch.optim.AdamW(rest, fused=True)]
    optimizers["AdamW"] = [torch.optim.AdamW(model.parameters(), fused=True)]
    return optimizers


def slices(p: nn.Parameter) -> list[nn.Parameter]:
    """Return a stack's matrices as separate parameters that share its memory and its gradient's."""
    if p.ndim == 2:
        return [p]
    assert p.grad is not None
    parts = [nn.Parameter(part) for part in p.detach().unbind()]
    for part, gradient in zip(parts, p.grad.unbind(), strict=True):
        part.grad = gradient
    return parts


def profiled(step: Callable[[], None], title: str | None) -> dict[str, object]:
    """Return one step's time on the host, time of its kernels, launches and peak of temporary memory.

    Args:
        step: The step, already warm.
        title: Printed above a table of the kernels that take longest; None prints nothing.
    """
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    averages = recorded.key_averages()
    if title:
        print(title)
        print(averages.table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=60))
    on_device = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_device if not event.name.startswith("Optimizer.")]  # spans, not launches
    return {
        "host ms": 1e3 * host,
        "kernels ms": sum(event.self_device_time_total for event in kernels) / 1e3,
        "launches": len(kernels),
        "temporary GB": (torch.cuda.max_memory_allocated() - before) / 1e9,
    }


def main() -> None:
    """Measure all contenders and write the record."""
    options = arguments(
        __doc__,
        layers={"type": int, "help": "in place of the model's"},
        width={"type": int, "help": "in place of the model's"},
        models={"nargs": "+", "choices": list(MODELS), "default": list(MODELS), "help": "these alone"},
        profile={"action": "store_true", "help": "print where the time of a step goes"},
    )
    measured, rows = ceilings(fastest_dtype(DEVICE)), []
    for name in options.models:
        fields = MODELS[name]
        changes = {"num_hidden_layers": options.layers} if options.layers else {}
        if options.width:
            changes |= {"hidden_size": options.width, "intermediate_size": options.width, "vocab_size": 1000}
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields | changes))
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        spent: dict[str, dict[str, object]] = {}
        for contender, optimizers in contenders(model).items():

            def step(several: list[torch.optim.Optimizer] = optimizers) -> None:
                for optimizer in several:
                    optimizer.step()

            value = attempted(lambda step=step: seconds(step, 5))
            spent[contender] = {"ms": 1e3 * value if isinstance(value, float) else value}
            if isinstance(value, float) and DEVICE == "cuda":
                spent[contender] |= profiled(step, f"{name}, {contender}" if options.profile else None)
            for optimizer in optimizers:
                optimizer.state.clear()
        for contender, values in spent.items():
            row = {"model": name, "step": contender, **values}
            pair = values["ms"], spent["AdamW"]["ms"]
            if all(isinstance(ms, float) for ms in pair):
                row["of AdamW"] = pair[0] / pair[1]
            rows.append(row)
        path = write("step", rows, measured, options)
    print(path)


if __name__ == "__main__":
    main()
