"""What a run trains, and what with: model, data, optimizer and schedule, as accelerate prepares them; and its start."""

import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env
from torch.distributed import distributed_c10d
from torch.utils.data import DataLoader

import symlm
from pretraining import corpus
from pretraining.averages import Averages
from pretraining.background import Background
from pretraining.checkpoints import Checkpoints
from pretraining.conducting import Conducting
from pretraining.config import OptimizerConfig, RunConfig, TrainConfig
from pretraining.folder import forget_after
from pretraining.models import build_model
from pretraining.packing import Collate
from pretraining.routers import Routers
from pretraining.smoothness import SmoothnessProbe
from pretraining.spikes import Spikes
from pretraining.teleporting import Teleporter
from symlm.agd import AGD, initialize_
from symlm.qk_clip import QKClip
from symlm.step_control import StepControl

POWER = 1.2  # of the cooldown in the record of modded-nanogpt, track 3


def build_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, train.warmup))
        left = (train.steps - step) / train.steps
        if train.schedule == "cosine":
            return warm * 0.5 * (1 - math.cos(math.pi * left))
        return warm * min(1.0, left / max(train.decay, 1e-9)) ** (POWER if train.schedule == "power" else 1)

    if train.schedule not in ("linear", "power", "cosine"):
        raise ValueError(f"unknown schedule {train.schedule!r}; choose 'linear', 'power' or 'cosine'")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def prepare_model(config: RunConfig, tokenizer: Any) -> torch.nn.Module:
    """Build the model over the tokenizer's vocabulary; without one over `data.vocab_size`, unless `sizes` say more."""
    settings, vocabulary_size = config.model, config.model.sizes.get("vocab_size", config.data.vocab_size)
    vocabulary, end = (len(tokenizer), tokenizer.eos_token_id) if tokenizer else (vocabulary_size, None)
    model = build_model(settings.preset, settings.config, settings.sizes, vocabulary, end)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


@dataclass
class Training:
    """What a run trains and what with, as accelerate prepared it; `plain` is the optimizer without its wrapper."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    plain: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    loader: DataLoader
    held: DataLoader
    routers: Routers
    qk_clip: QKClip | None
    control: StepControl | None
    teleporter: Teleporter | None
    conducting: Conducting | None
    probe: SmoothnessProbe | None
    averages: Averages
    spikes: Spikes


def build_accelerator(config: RunConfig) -> Accelerator:
    """Return the launch's accelerator; without a GPU all its processes take the CPU.

    Under DeepSpeed clipping and accumulation are the engine's, and accelerate would clip at 1 unasked: it gets ours.
    """
    train, deepspeed = config.train, parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    on_cpu = not torch.accelerator.is_available()
    group: dict[str, Any] = {"backend": "gloo"} if on_cpu and deepspeed else {}
    if train.timeout:
        group["timeout"] = limit = timedelta(seconds=train.timeout)
        # and of the groups that DeepSpeed and meshes make, which take torch's default
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,  # which accelerate would turn off
        kwargs_handlers=[InitProcessGroupKwargs(**group)] if group else [],
        mixed_precision=train.mixed_precision,
        gradient_accumulation_steps=train.accumulate,
        log_with=None if train.tracker == "none" else train.tracker,
        project_dir=str(Path(config.out) / config.name),
        step_scheduler_with_optimizer=False,
    )
    if deepspeed:
        options = {"gradient_clipping": train.clip or 0.0, "gradient_accumulation_steps": train.accumulate}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(options)
    return accelerator


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig, accelerator: Accelerator) -> torch.optim.Optimizer:
    """Return the optimizer, its table printed.  Raises: ValueError for an unknown algorithm, and what AGD cannot do."""
    if config.algorithm == "symlm":
        kernels = config.options.get("kernels", "auto")
        options = {"kernels": kernels, "lr": config.lr, "overrides": config.overrides}
        accelerator.print(symlm.describe_routing(model, config.preset, **options))
        return symlm.SymOptimizer(model, config.lr, config.preset, config.overrides, **config.options)
    if config.algorithm != "agd":
        raise ValueError(f"unknown optimizer.algorithm {config.algorithm!r}; choose 'symlm' or 'agd'")
    plain = OptimizerConfig()
    if (config.lr, config.preset, config.overrides) != (plain.lr, plain.preset, plain.overrides):
        raise ValueError(
            "AGD finds its rate by itself, one for all layers: leave out optimizer.lr, preset and overrides"
        )
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        raise ValueError("AGD's rate needs every layer's whole gradient: use one process or DDP")
    for p in model.parameters():
        p.requires_grad_(p.ndim > 1)
    initialize_(model)
    accelerator.print(f"AGD: {sum(p.requires_grad for p in model.parameters())} layers, one rate for all; gains frozen")
    return AGD(model, **config.options)


def prepare(config: RunConfig, accelerator: Accelerator) -> tuple[Training, Any]:
    """Build data, model, optimizer and schedule, and have accelerate prepare them; return the tokenizer too."""
    train = config.train
    samples = train.steps * train.accumulate * train.batch * accelerator.num_processes
    tokenizer, data, validation = corpus.load(config.data, train.seed, samples)
    model = prepare_model(config, tokenizer)
    collate = Collate(model.config.vocab_size)
    routers = Routers(model, train)
    plain = build_optimizer(model, config.optimizer, accelerator)
    qk_clip = QKClip(model, plain, train.qk_clip) if train.qk_clip is not None else None
    schedule = build_schedule(plain, train)
    if config.model.compile:
        model = torch.compile(model)
    loader = DataLoader(data, batch_size=train.batch, shuffle=False, drop_last=True, collate_fn=collate)
    held = DataLoader(validation, batch_size=train.batch, collate_fn=collate)
    model, optimizer, loader, held = accelerator.prepare(model, plain, loader, held)
    accelerator.register_for_checkpointing(schedule)
    alone = accelerator.num_processes == 1 and not accelerator.state.deepspeed_plugin
    for name in ("r_target", "teleport_every", "smoothness_every"):
        if getattr(train, name) is not None and not alone:
            raise ValueError(
                f"train.{name} looks at one process's batch and weights: use one process without DeepSpeed, or leave "
                "it out"
            )
    if train.teleport_every and accelerator.mixed_precision != "no":
        raise ValueError("train.teleport_every compares losses that rounding would change: set mixed_precision to no")
    control = None
    if train.r_target is not None:
        control = StepControl(model, optimizer, None, train.r_target, train.r_over, standalone=train.r_standalone)
    teleporter = Teleporter(model, plain, train.teleport_every) if train.teleport_every else None
    conducting = Conducting(model, routers, train, accelerator) if train.conductor else None
    probe = SmoothnessProbe(model, routers, train.smoothness_every) if train.smoothness_every else None
    stateful = (teleporter, conducting, probe)
    spikes = Spikes(plain, accelerator, train)
    rewinding = spikes if train.rewind else None  # whose place in the data is the number of the step otherwise
    accelerator.register_for_checkpointing(*(part for part in (*stateful, rewinding) if part))
    beside = (qk_clip, control, *stateful, Averages(plain, train), spikes)
    return Training(model, optimizer, plain, schedule, loader, held, routers, *beside), tokenizer


def begin(job: Training, config: RunConfig, accelerator: Accelerator, folder: Path) -> tuple[Checkpoints, int]:
    """Load the last checkpoint, if one is asked for, and forget the rows behind it.

    Returns: the run's checkpoints, and the step of the last.
    """
    behind = Background(accelerator) if config.train.async_save else None
    checkpoints = Checkpoints(folder / "checkpoints", config.train.keep, behind)
    first = checkpoints.load(accelerator) if config.resume else 0
    with checkpoints.named("a checkpoint"):  # before the first step is paid for
        checkpoints.refuse_what_does_not_fit(sum(p.numel() * p.element_size() for p in job.model.parameters()))
    if accelerator.is_main_process:
        forget_after(first, folder)
    if accelerator.log_with:
        accelerator.init_trackers("symlm")
    return checkpoints, first
