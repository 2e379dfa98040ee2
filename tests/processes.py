"""Real process groups on this machine: what runs in each rank, and how a test starts the ranks."""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import warm_python
from models import loss_of, tiny, tokens
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import symlm
import symlm.scion
from symlm.agd import AGD
from symlm.gradient_conductor import GradientConductor
from symlm.qk_clip import QKClip
from symlm.state.quantization import dequantized
from symlm.step_control import REDUCTIONS, StepControl

STEPS = 10
CLIP = 0.1
LIMIT = timedelta(seconds=120)
SHORT = timedelta(seconds=10)
ODD = {"vocab_size": 61, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1}

IDLE = {"vocab_size": 61, "num_experts": 37, "num_experts_per_tok": 1}  # more than a batch's tokens reach


def batch(step, rank=0, world=1):
    x = tokens(step, shape=(4, 16), vocab=61)
    return x[rank * 4 // world : (rank + 1) * 4 // world]


@contextmanager
def unsynchronized(model):
    """Let gradients pile up on their ranks."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif not hasattr(model, "set_requires_gradient_sync"):  # a model on one process
        yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def train(model, optimizer, steps=STEPS, rank=0, world=1, first=0, clip=None, parts=1):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        *early, last = batch(step, rank, world).chunk(parts)
        for part in early:
            with unsynchronized(model):
                (loss_of(model, part) / parts).backward()
        (loss_of(model, last) / parts).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def whole(model):
    """Return every parameter whole, by its own name."""
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def shard(model, mesh, **options):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model, mesh):
    plan = {"model.embed_tokens": ColwiseParallel(output_layouts=Replicate())}
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    for k in range(len(model.model.layers)):
        for name in ("q_proj", "k_proj", "v_proj"):
            plan[f"model.layers.{k}.self_attn.{name}"] = ColwiseParallel()
        plan[f"model.layers.{k}.self_attn.o_proj"] = RowwiseParallel()
        for name in ("gate_proj", "up_proj"):
            plan[f"model.layers.{k}.mlp.{name}"] = ColwiseParallel()
        plan[f"model.layers.{k}.mlp.down_proj"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


CASES = {
    "ddp": {"kind": "qwen3", **ODD},
    "fsdp2": {"kind": "qwen3", **ODD},
    "fsdp2 tied": {"kind": "qwen3", "tie_word_embeddings": True, **ODD},
    "fsdp2 experts": {"kind": "qwen3_moe", "vocab_size": 61, "num_experts": 5},
    "fsdp2 fused": {"kind": "phi3", "vocab_size": 61},
    "fsdp2 narrow": {  # fewer rows than ranks, and matrices of one row and of one column
        "kind": "qwen3",
        "vocab_size": 61,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "intermediate_size": 1,
    },
    "fsdp2 muon": {"kind": "qwen3", **ODD},
    "fsdp2 accelerate": {"kind": "qwen3", **ODD},
    "fsdp2 clipped": {"kind": "qwen3", **ODD},
    "fsdp2 accumulated": {"kind": "qwen3", **ODD},
    "ddp accumulated": {"kind": "qwen3", **ODD},
    "fsdp2 aro": {"kind": "qwen3", **ODD},
    "ddp aro": {"kind": "qwen3", **ODD},
    "fsdp2 aro layer": {"kind": "qwen3", **ODD},
    "ddp aro layer": {"kind": "qwen3", **ODD},
    "ddp soap": {"kind": "qwen3", **ODD},
    "fsdp2 soap": {"kind": "qwen3", **ODD},
    "fsdp2 dion": {"kind": "qwen3", **ODD},
    "ddp dion": {"kind": "qwen3", **ODD},
    "fsdp2 kl-soap": {"kind": "qwen3", **ODD},
    "ddp kl-soap": {"kind": "qwen3", **ODD},
    "ddp normuon": {"kind": "qwen3", **ODD},
    **{f"{kind} muown": {"kind": "qwen3", **ODD} for kind in ("ddp", "fsdp2")},
    **{f"{kind} muown fp32": {"kind": "qwen3", **ODD} for kind in ("zero2", "zero3")},
    **{f"{kind} fp32": {"kind": "qwen3", **ODD} for kind in ("fsdp2 soap", "zero2 soap", "zero3 soap")},
    **{f"{kind} fp32": {"kind": "qwen3", **ODD} for kind in ("zero2 normuon", "zero2 aro")},
    "hsdp": {"kind": "qwen3", **ODD},
    "tp": {"kind": "llama", "vocab_size": 61, "num_key_value_heads": 4},
    "tp fsdp2": {"kind": "llama", "vocab_size": 61, "num_key_value_heads": 4},
    "expert parallel": {"kind": "qwen3_moe", "vocab_size": 61},
    **{f"{name} idle experts": {"kind": "qwen3_moe", **IDLE} for name in ("ddp", "fsdp2", "zero2", "zero3")},
}
CASES |= {
    **{f"zero{stage}": {"kind": "qwen3", **ODD} for stage in range(4)},
    "zero2 experts": {"kind": "qwen3_moe", "vocab_size": 61, "num_experts": 5},
    "zero3 experts": {"kind": "qwen3_moe", "vocab_size": 61, "num_experts": 5},
    "zero1 clipped": {"kind": "qwen3", **ODD},
    "zero3 small groups": {"kind": "qwen3", **ODD},
    "zero3 secondary": {"kind": "qwen3", **ODD},
}
# Linear attention and experts; latent attention and sigmoid routers.
CASES |= {
    name: {"kind": "qwen3_next", "vocab_size": 61} for name in ("ddp hybrid", "fsdp2 hybrid", "zero2 hybrid fp32")
}
CASES |= {f"{kind} latent": {"kind": "deepseek_v3", "vocab_size": 61} for kind in ("ddp", "fsdp2", "zero2")}
# Every constraint that measures, on heads and whole matrices that shards cut, and on experts.
CASES |= {f"{kind} constrained": {"kind": "qwen3", **ODD} for kind in ("ddp", "fsdp2", "zero2", "zero3")}
CASES["fsdp2 experts constrained"] = {"kind": "qwen3_moe", "vocab_size": 61, "num_experts": 5}
CASES["fsdp2 constrained normuon"] = {"kind": "qwen3", **ODD}
# Attention logits bounded by the largest of all ranks' batches.
CASES |= {f"{kind} bounded": {"kind": "llama", "vocab_size": 61} for kind in ("ddp", "fsdp2", "zero2", "zero3")}
CASES["zero3 small groups bounded"] = {"kind": "llama", "vocab_size": 61}
CASES["fsdp2 bounded gains"] = {"kind": "olmo2", **ODD}
# A head's Gram matrix every third step.
CASES |= {f"{kind} seldom": {"kind": "qwen3", **ODD} for kind in ("ddp", "fsdp2", "zero2 fp32", "zero3 fp32")}
CASES["fsdp2 tied seldom"] = {"kind": "qwen3", "tie_word_embeddings": True, **ODD}
CONSTRAINED = {
    "attention_q": {"constraint": "fixed_norm"},
    "attention_k": {"constraint": "relative", "floor": 3.0},
    "attention_v": {"constraint": "radial_brake"},
    "attention_o": {"constraint": "relative+radial_brake+cautious_decay", "view": "heads"},
    "mlp_in": {"constraint": "fixed_norm"},
    "mlp_out": {"constraint": "cautious_decay"},
    "expert_in": {"constraint": "relative+radial_brake", "floor": 3.0},
    "expert_out": {"constraint": "fixed_norm"},
}
CASES |= {f"{kind} fp32": {"kind": "qwen3", **ODD} for kind in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")}
WORLDS = {"hsdp": (4,), "hsdp fp32": (4,), "tp fsdp2": (4,), "ddp": (2, 4), "fsdp2": (2, 4), "zero3 secondary": (4,)}
WORLDS["fsdp2 narrow"] = (2, 4)


def model_of(case):
    # Routers and experts compute in fp32, and so does ZeRO.
    narrow = (
        any(name in CASES[case]["kind"] for name in ("moe", "next", "deepseek")) or "zero" in case or "fp32" in case
    )
    dtype = torch.float32 if narrow else torch.float64
    return tiny(dtype=dtype, **CASES[case])


def optimizer_of(case, model):
    preset = next((name for name in ("muon", "aro", "dion", "kl-soap", "soap-muon") if name[:4] in case), "default")
    rotation = "layer" if "layer" in case else "own"
    lr = 1e-3 if "fp32" in case else 0.02  # fp32 rounding of the gradients, times the rate, is what remains
    overrides = {role: dict(values) for role, values in CONSTRAINED.items()} if "constrained" in case else {}
    if "muown" in case:
        roles = ("attention_q", "attention_o", "mlp_in", "mlp_out")
        overrides = {role: {"rule": "muown", "scale": "match_adamw_rms", "lr": lr / 5} for role in roles}
    if "normuon" in case:
        overrides.setdefault("mlp_in", {})["rule"] = "normuon"
    every = 3 if "seldom" in case else 1
    options = {"weight_decay": 0.1, "rotation": rotation, "gram_every": every}
    options |= {"momentum_dtype": "int8"} if "8 bits" in case else {}
    optimizer = symlm.SymOptimizer(model, lr, preset, overrides, **options)
    if "bounded" in case:
        QKClip(model, optimizer, threshold=0.05)
    return optimizer


def run_case(case, rank, world):
    model = model_of(case)
    mesh = init_device_mesh("cpu", (world,))
    data = (rank, world)
    if case.startswith("ddp"):
        model = DistributedDataParallel(model)
    elif case.startswith("hsdp"):
        shard(model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards")))
    elif case == "tp":
        tensor_parallel(model, mesh)
        data = (0, 1)
    elif case == "tp fsdp2":
        grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        tensor_parallel(model, grid["tp"])
        shard(model, grid["dp"])
        data = (grid["dp"].get_local_rank(), world // 2)
    elif case == "expert parallel":
        return expert_parallel(model, mesh, rank, world)
    elif case == "fsdp2 accelerate":
        return through_accelerate(case, model, rank, world)
    elif case.startswith("zero"):
        return through_deepspeed(case, model, rank, world)
    else:
        shard(model, mesh)
    optimizer = optimizer_of(case, model.module if case.startswith("ddp") else model)
    clip = CLIP if "clipped" in case else None
    train(model, optimizer, rank=data[0], world=data[1], clip=clip, parts=2 if "accumulated" in case else 1)
    return whole(model), {"verified": len(optimizer.verify()), "rms": symlm.diagnostics.update_rms(optimizer)}


def expert_parallel(model, mesh, rank, world):
    """Experts cut over the ranks on their first axis, everything else repeated; gradients averaged by hand."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            W = getattr(experts, name)
            setattr(experts, name, nn.Parameter(distribute_tensor(W.detach(), mesh, [Shard(0)], src_data_rank=None)))
    twin = model_of("expert parallel")
    optimizer = optimizer_of("expert parallel", model)
    reference = optimizer_of("expert parallel", twin)
    for step in range(STEPS):
        twin.zero_grad()
        loss_of(twin, batch(step)).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            g = q.grad.clone()
            p.grad = distribute_tensor(g, mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else g
        optimizer.step()
        reference.step()
    return whole(model), {}


def through_accelerate(case, model, rank, world):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Qwen3DecoderLayer"]
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    optimizer = optimizer_of(case, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch(step, rank, world)))
        optimizer.step()
    result = whole(model)
    AcceleratorState._reset_state(True)
    return result, {}


def deepspeed_plugin(stage, **more):
    from accelerate import DeepSpeedPlugin

    return DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # its own default is 1
            "zero_optimization": {"stage": stage, **more.pop("zero", {})},
            "zero_allow_untested_optimizer": True,
            **more,
        }
    )


def prepared_by_deepspeed(case, model, **more):
    from accelerate import Accelerator

    if "small groups" in case:
        more["zero"] = {"sub_group_size": 2000}
    if "secondary" in case:  # ZeRO++'s second copy of the weights, cut over two ranks of four
        more["zero"] = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    accelerator = Accelerator(deepspeed_plugin=deepspeed_plugin(int(case[4]), **more))
    engine, optimizer = accelerator.prepare(model, optimizer_of(case, model))
    return accelerator, engine, optimizer


def whole_under_zero(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, p in engine.module.named_parameters():
        full = safe_get_full_fp32_param(p) if hasattr(p, "_hp_mapping") or hasattr(p, "ds_tensor") else p
        found[name] = full.detach().clone()
    return found


def through_deepspeed(case, model, rank, world):
    clip = {"gradient_clipping": CLIP} if "clipped" in case else {}
    accelerator, engine, optimizer = prepared_by_deepspeed(case, model, **clip)
    assert engine.zero_optimization_stage() == int(case[4])
    assert engine.zero_hpz_partition_size() == (2 if "secondary" in case else 1)
    for step in range(STEPS):
        accelerator.backward(loss_of(engine, batch(step, rank, world)))  # DeepSpeed steps inside
        optimizer.step()
        optimizer.zero_grad()
    told = {"state": symlm.diagnostics.state_bytes(engine.basic_optimizer)}
    told["rms"] = symlm.diagnostics.update_rms(engine.basic_optimizer)
    result = whole_under_zero(engine)
    engine.destroy()
    leave_deepspeed()
    return result, told


def leave_deepspeed():
    """Forget what accelerate and transformers keep for the whole process: the next model must be an ordinary one."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def mixed_precision(rank, world):
    """bf16 gradients and compute over fp32 shards: finite, and the same on all ranks."""
    model = model_of("fsdp2").float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, init_device_mesh("cpu", (world,)), mp_policy=policy)
    train(model, optimizer_of("fsdp2", model), 3, rank, world, clip=1.0)
    return whole(model)


def worker(rank, world, folder, seconds, *names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    for name in names:
        try:
            result = EXTRA_CASES[name](rank, world) if name in EXTRA_CASES else run_case(name, rank, world)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, Path(folder, f"{name}-{rank}.pt"))
        if name != "missing peer":
            dist.barrier()
    dist.destroy_process_group()


def run(world, names, limit=LIMIT):
    """Run cases in `world` real processes; return {case: [what each rank returned]}."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
        settings |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": get_free_port(),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        environment = os.environ | {key: str(value) for key, value in settings.items()}
        ranks = []
        for rank in range(world):
            command = [warm_python.executable(), __file__, json.dumps([rank, world, folder, limit.seconds, *names])]
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment | place))
        while (codes := [process.poll() for process in ranks]).count(None) and not any(codes):
            time.sleep(0.05)
        for process in ranks:
            process.kill()
        files = {(name, rank): Path(folder, f"{name}-{rank}.pt") for name in names for rank in range(world)}
        results = {place: torch.load(file, weights_only=True) for place, file in files.items() if file.exists()}
        if any(codes):
            raised = [f"{place}: {text}" for place, text in results.items() if str(text).startswith("Traceback")]
            raise RuntimeError("\n".join((f"the ranks ended with {codes}", *raised)))
        return {name: [results[name, rank] for rank in range(world)] for name in names}


def disagreement(rank, world):
    """Ranks with different tables, rates or models must all raise, not hang and not drift apart."""
    messages = []
    for key in ("preset", "lr", "overrides", "model"):
        model = tiny(vocab_size=61 + rank) if key == "model" else model_of("ddp")
        own = {"preset": ("default", "muon"), "lr": (0.02, 0.01), "overrides": ({}, {"lm_head": {"lr": 0.5}})}
        options = {key: own[key][min(rank, 1)]} if key in own else {}
        optimizer = symlm.SymOptimizer(model, **options)
        loss_of(model, batch(0)).backward()
        try:
            optimizer.step()
            messages.append(f"{key}: no error")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def own_gradients(rank, world):
    """Return what a first step warns of where every rank has its own batch: a bare model, DDP, and one that says so."""
    found = {}
    for case in ("bare", "ddp", "own"):
        model = model_of("ddp")
        optimizer = symlm.SymOptimizer(model, shared=case != "own")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            train(DistributedDataParallel(model) if case == "ddp" else model, optimizer, 2, rank, world)
        found[case] = [str(warning.message) for warning in warned]
    return found


def missing_peer(rank, world):
    """The last rank takes its second step too late for the others."""
    model = model_of("fsdp2")
    shard(model, init_device_mesh("cpu", (world,)))
    optimizer = optimizer_of("fsdp2", model)
    train(model, optimizer, 1, rank, world)
    loss_of(model, batch(1, rank, world)).backward()
    if rank == world - 1:
        time.sleep(2 * SHORT.total_seconds())
        return "late"
    start = time.monotonic()
    try:
        optimizer.step()
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.monotonic() - start}
    return "no error"


def nonfinite(rank, world):
    """A bad gradient on one rank makes all skip."""
    model = model_of("fsdp2")
    shard(model, init_device_mesh("cpu", (world,)))
    optimizer = optimizer_of("fsdp2", model)
    train(model, optimizer, 1, rank, world)
    before = whole(model)
    loss_of(model, batch(1, rank, world)).backward()
    if rank == world - 1:
        next(p for p in model.parameters() if p.grad.to_local().numel()).grad.to_local().fill_(torch.nan)
    optimizer.step()
    after = whole(model)
    return {"same": all(torch.equal(after[k], before[k]) for k in before), "skipped": optimizer.skipped_steps}


class Half(nn.Module):
    """A matrix, and experts, of which only the first rows get a gradient after the first step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Linear(8, 8, bias=False).double()
        self.experts = nn.Parameter(torch.randn(3, 8, 6, dtype=torch.float64))

    def gradients(self, step):
        for k, p in enumerate(self.parameters()):
            G = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(10 * step + k))
            G[..., 4 if step else 8 :, :] = 0
            yield G


def train_half(model, steps=3):
    optimizer = symlm.SymOptimizer(model, roles={"matrix.weight": "matrix", "experts": "expert_in"})
    for step in range(steps):
        for p, G in zip(model.parameters(), Half.gradients(model, step), strict=True):
            p.grad = distribute_tensor(G, p.device_mesh, p.placements) if isinstance(p, DTensor) else G
        optimizer.step()
    return whole(model)


def half(rank, world):
    """A shard without a gradient belongs to a matrix that has one: it steps with it."""
    model, mesh = Half(), init_device_mesh("cpu", (world,))
    model.matrix.weight = nn.Parameter(distribute_tensor(model.matrix.weight.detach(), mesh, [Shard(0)]))
    model.experts = nn.Parameter(distribute_tensor(model.experts.detach(), mesh, [Shard(0)]))
    return train_half(model)


def work(rank, world):
    """Count the matrices whose polar factor this rank computes in one step under DDP."""
    import symlm.step.directions

    counted = []
    original = symlm.step.directions.polar

    def counting(X, *arguments, **options):
        counted.append(len(X))
        return original(X, *arguments, **options)

    symlm.step.directions.polar = counting
    model = model_of("ddp")
    optimizer = optimizer_of("ddp", model)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    symlm.step.directions.polar = original
    return {"matrices": sum(counted)}


def overlap(rank, world):
    """Return what exchanges did in a step, in order, each with its number."""
    from symlm.distributed.exchange import Exchange

    found = {}
    kept = {name: getattr(Exchange, name) for name in ("send", "compute", "receive")}
    for case in ("ddp", "fsdp2"):
        told, numbers = [], {}

        def noting(name, told=told, numbers=numbers):
            def call(exchange, *arguments):
                told.append((name, numbers.setdefault(id(exchange), len(numbers))))
                return kept[name](exchange, *arguments)

            return call

        model = model_of("fsdp2")
        if case == "fsdp2":
            shard(model, init_device_mesh("cpu", (world,)))
        optimizer = optimizer_of("fsdp2", model)
        loss_of(model, batch(0)).backward()
        for name in kept:
            setattr(Exchange, name, noting(name))
        optimizer.step()
        for name, own in kept.items():
            setattr(Exchange, name, own)
        found[case] = told
    return found


def traffic(rank, world):
    """Count what exchanges sent and what row rules summed, and what the counting functions say."""
    from symlm.distributed.exchange import Exchange
    from symlm.distributed.layout import layout_of
    from symlm.rules import get_rule
    from symlm.step.rows import row_step

    sent, summed = [], []
    original = Exchange.receive

    def counting(self):
        found = original(self)
        sent.append((self.received_bytes, self.bytes_to_receive(self.like.element_size())))
        return found

    def counting_sums(x, layout):
        summed.append(x.numel() if layout.shards else 0)
        return plain(x, layout)

    Exchange.receive, row_step.summed, plain = counting, counting_sums, row_step.summed
    for case in ("ddp", "fsdp2") + (("hsdp",) if world == 4 else ()):
        model = model_of(case)
        if case != "ddp":
            grid = (2, world // 2) if case == "hsdp" else (world,)
            shard(model, init_device_mesh("cpu", grid, mesh_dim_names=("copies", "shards")[-len(grid) :]))
        optimizer = optimizer_of(case, model)
        train(model, optimizer, 1, 0, 1)
        if case != "ddp":
            rules = [(get_rule(group["rule"]), p) for group in optimizer.param_groups for p in group["params"]]
            told = [row_step.entries_to_sum(rule, layout_of(p)) for rule, p in rules if rule.row_map]
            sent.append((sum(summed), sum(told)))
        summed.clear()
    Exchange.receive, row_step.summed = original, plain
    return sent


def borrowed(rank, world):
    """Measure the most memory that a step allocates beside what it keeps, and what the plan says."""
    from torch.profiler import ProfilerActivity, profile

    from symlm.planning import plan
    from symlm.polar import factor
    from symlm.step import bucket

    factor.CPU_STACK = factor.CPU_PART = bucket.CPU_PART_ELEMENTS = (
        sys.maxsize
    )  # the plan is of a GPU, with whole stacks
    found = {}
    for case, copies in (("ddp", world), ("fsdp2", 1), ("fsdp2 experts", 1)):
        kind = "qwen3_moe" if "experts" in case else "qwen3"
        sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
        sizes |= {"moe_intermediate_size": 512, "num_experts": 8} if "experts" in case else {}
        model = tiny(kind, **sizes, num_hidden_layers=4, vocab_size=61)
        told = plan(model, shards=world // copies, copies=copies).temporary
        if copies == 1:
            shard(model, init_device_mesh("cpu", (world,)))
        optimizer = symlm.SymOptimizer(model)
        train(model, optimizer, 1)
        loss_of(model, batch(1)).backward()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            optimizer.step()
        changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = peak = 0
        for event in sorted(changes, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        found[case] = {"peak": peak, "told": told}
    return found


def checkpoint_folder(name):
    return str(Path(os.environ["SYMLM_TEST_CHECKPOINT"], name))


def save(rank, world):
    """Train five steps on shards, and the same repeated, and save both with torch's distributed checkpoint."""
    for name in ("copies", "shards"):
        model = model_of("fsdp2")
        if name == "shards":
            shard(model, init_device_mesh("cpu", (world,)))
        optimizer = optimizer_of("fsdp2", model)
        wrapped = model if name == "shards" else DistributedDataParallel(model)
        train(wrapped, optimizer, 5, rank, world)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(parts, checkpoint_id=checkpoint_folder(name))
        train(wrapped, optimizer, 5, rank, world, first=5)
    return whole(model)


def load(rank, world):
    """Load these checkpoints on this many ranks, either one as shards and repeated, and train on."""
    return {
        f"{saved} as {'shards' if sharded else 'copies'}": load_and_train(rank, world, saved, sharded)
        for saved in ("shards", "copies")
        for sharded in (True, False)
    }


def load_and_train(rank, world, saved, sharded):
    model = model_of("fsdp2")
    for p in model.parameters():
        nn.init.zeros_(p)
    if sharded:
        shard(model, init_device_mesh("cpu", (world,)))
    optimizer = optimizer_of("fsdp2", model)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=checkpoint_folder(saved))
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    wrapped = model if sharded or world == 1 else DistributedDataParallel(model)
    train(wrapped, optimizer, 5, rank, world, first=5)
    return whole(wrapped)


def misplaced(rank, world):
    """Load the last rank's shards on all, a whole state beside shards, and shards beside a whole model."""

    def built(sharded):
        model = model_of("fsdp2")
        if sharded:
            shard(model, init_device_mesh("cpu", (world,)))
        return model, optimizer_of("fsdp2", model)

    states = {}
    for sharded in (False, True):
        model, optimizer = built(sharded)
        train(model, optimizer, 1)
        states[sharded] = optimizer.state_dict()
    found = {"own": built(True)[1].load_state_dict(states[True])}
    files = [states[True]]
    dist.broadcast_object_list(files, src=world - 1)
    wrong = {"file": (files[0], True), "whole": (states[False], True), "shards": (states[True], False)}
    for name, (state, sharded) in wrong.items():
        try:
            found[name] = built(sharded)[1].load_state_dict(state)
        except ValueError as error:
            found[name] = str(error)
    return found


def watched(rank, world):
    """Router and logit metrics of this rank's share of the tokens, gathered over all."""

    def gather(x):
        found = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(found, x)
        return torch.cat(found)

    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).chunk(world)[rank]
    router = symlm.diagnostics.router_metrics(logits, 2, gather)
    return {**router, **{f"logit {k}": v for k, v in symlm.diagnostics.logit_metrics(logits, gather).items()}}


def refused_under_zero(rank, world):
    """One rotation a layer, momenta of 8 bits and parameters in another order are refused before any update."""
    found = [refused_by_zero(case, model_of("zero2"), rank, world) for case in ("zero2 aro layer", "zero2 8 bits")]
    return [*found, refused_by_zero("zero2", model_of("zero2"), rank, world, {"round_robin_gradients": True})]


def refused_by_zero(case, model, rank, world, zero=None):
    """Return the message of a first step under ZeRO."""
    accelerator, engine, _ = prepared_by_deepspeed(case, model, zero=zero or {})
    try:
        accelerator.backward(loss_of(engine, batch(0, rank, world)))
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    engine.destroy()
    leave_deepspeed()
    return message


def eight_bits(rank, world):
    """Momenta of 8 bits under DDP and FSDP2: after a step, in bytes, and a run that went on from its state."""
    found = {}
    for case in ("ddp", "fsdp2"):

        def built(case=case):
            model = model_of("zero2")
            if case == "fsdp2":
                shard(model, init_device_mesh("cpu", (world,)))
            wrapped = DistributedDataParallel(model) if case == "ddp" else model
            return model, wrapped, optimizer_of("8 bits", model)

        model, wrapped, optimizer = built()
        train(wrapped, optimizer, 1, rank, world)
        momenta = {name: stored_momentum(optimizer.state[p]) for name, p in model.named_parameters()}
        saved = copy.deepcopy(get_state_dict(model, optimizer))
        train(wrapped, optimizer, 2, rank, world, first=1)
        model_again, wrapped_again, again = built()
        set_state_dict(model_again, again, model_state_dict=saved[0], optim_state_dict=saved[1])
        train(wrapped_again, again, 2, rank, world, first=1)
        size = symlm.diagnostics.state_bytes(optimizer)
        found[case] = {"momenta": momenta, "bytes": size, "end": whole(model), "again": whole(model_again)}
    return found


def stored_momentum(state):
    """Return a stored momentum of 8 bits whole, and its scales; nothing for AdamW's means."""
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for key, x in state.items() if "momentum" in key]
    return [dequantized(*whole), whole[1].clone()] if whole else []


def refused_settings(rank, world):
    """Settings under which accelerate or DeepSpeed would not run symlm are refused before anything is wrapped."""
    messages = []
    refused = ({"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "cpu"}})
    for zero in (*refused, {"zero_quantized_weights": True}, {"elastic_checkpoint": True}):
        try:
            prepared_by_deepspeed("zero3", model_of("zero3"), zero=zero)
        except ValueError as error:
            messages.append(str(error))
        leave_deepspeed()
    return messages


def train_controlled(model, over, rank=0, world=1, wrap=lambda model: model):
    """Take steps that are all shortened; return the weights."""
    # By a difference, since the layers that DeepSpeed leaves behind in a process have no forward derivative.
    control = StepControl(model, optimizer_of("ddp", model), r_target=0.05, over=over, difference=True)
    wrapped = wrap(model)
    for step in range(3):
        wrapped.zero_grad()
        x = batch(step, rank, world)
        loss_of(wrapped, x).backward()
        control.step(input_ids=x)
    return whole(model)


def controlled(rank, world):
    """Shorten steps by what all ranks' batches say."""
    return {over: train_controlled(model_of("ddp"), over, rank, world, DistributedDataParallel) for over in REDUCTIONS}


def refused_shards(rank, world):
    """Return the messages of what needs whole weights and is given shards."""

    def sharded(model):
        return fully_shard(model, mesh=init_device_mesh("cpu", (world,)))

    def step_of_agd():
        layers = sharded(nn.Linear(8, 8, bias=False))
        optimizer = AGD(layers)
        layers(torch.ones(2, 8)).sum().backward()
        optimizer.step()

    messages = []
    for attempt in (
        lambda: train_controlled(model_of("ddp"), "max", rank, world, sharded),
        step_of_agd,
        lambda: symlm.agd.initialize_(sharded(nn.Linear(8, 8, bias=False))),
        lambda: symlm.scion.initialize_(sharded(model_of("ddp"))),
    ):
        try:
            messages.append(attempt())
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    return messages


CONDUCTED = ("text", "against")
CONDUCTED_STEPS = 4


def conducted_losses(model, x):
    """Return two losses of one forward pass that want opposite things."""
    logits = model(input_ids=x).logits[:, :-1].flatten(0, 1)
    shifted = nn.functional.cross_entropy(logits, x[:, 1:].flatten())
    return {"text": shifted, "against": 1e-2 * logits.square().mean() - 0.8 * shifted}


def train_conducted(model, optimizer, conductor, rank=0, world=1, first=0, steps=CONDUCTED_STEPS):
    """Take steps of two micro-batches where there is enough; return the reports of the steps."""
    reports = []
    for step in range(first, first + steps):
        parts = batch(step, rank, world).chunk(2)  # one on four ranks
        for part in parts:
            conductor.backward({name: loss / len(parts) for name, loss in conducted_losses(model, part).items()})
        reports.append(conductor.step())
        optimizer.step()
        optimizer.zero_grad()
    return reports


def conducted(rank, world):
    """Conduct two losses on copies and on shards; a second conductor loads the first's state and goes on."""
    found = {}
    for case in ("ddp", "fsdp2") + (("hsdp",) if world == 4 else ()):
        model = model_of(case)
        optimizer = optimizer_of(case, model)
        if case == "ddp":
            model = DistributedDataParallel(model)
        else:
            grid = (2, world // 2) if case == "hsdp" else (world,)
            shard(model, init_device_mesh("cpu", grid, mesh_dim_names=("copies", "shards")[-len(grid) :]))
            optimizer = optimizer_of(case, model)
        reports = []
        state = None
        for first in (0, CONDUCTED_STEPS // 2):
            conductor = GradientConductor(model, CONDUCTED, momentum=0.5)
            if state:
                conductor.load_state_dict(state)
            reports += train_conducted(model, optimizer, conductor, rank, world, first, CONDUCTED_STEPS // 2)
            state = conductor.state_dict()
        found[case] = {
            "weights": whole(model),
            "conflicts": [[tuple(conflict) for conflict in report.conflicts] for report in reports],
            "norms": [report.norms for report in reports],
            "gradients": state["gradients"],
            "skips": skips_together(model, conductor, rank, world),
        }
    return found


def skips_together(model, conductor, rank, world):
    """Give the last rank a bad gradient; return whether this rank skipped its step, with nothing written."""
    losses = conducted_losses(model, batch(9, rank, world))
    if rank == world - 1:
        losses["against"] = losses["against"] * torch.nan
    conductor.backward(losses)
    return not conductor.step().finite and all(p.grad is None for p in model.parameters())


EXTRA_CASES = {
    "controlled": controlled,
    "refused shards": refused_shards,
    "conducted": conducted,
    "refused settings": refused_settings,
    "refused under zero": refused_under_zero,
    "8 bits": eight_bits,
    "watched": watched,
    "misplaced": misplaced,
    "save": save,
    "load": load,
    "mixed precision": mixed_precision,
    "missing peer": missing_peer,
    "disagreement": disagreement,
    "own gradients": own_gradients,
    "nonfinite": nonfinite,
    "half": half,
    "work": work,
    "overlap": overlap,
    "traffic": traffic,
    "borrowed": borrowed,
}

if __name__ == "__main__":
    worker(*json.loads(sys.argv[1]))
