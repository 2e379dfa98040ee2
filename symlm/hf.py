"""Adapters for the Hugging Face Trainer: its argument `optimizer_cls_and_kwargs`, and manifests for checkpoints."""

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from symlm.distributed.collectives import wait_for_all
from symlm.manifests import MANIFEST, newest_whole, write_manifest
from symlm.optimizer import SymOptimizer
from symlm.qk_clip import QKClip

ADAMWS_RATE = ("adamw", "adamw-compatible")  # presets that take an AdamW learning rate
UNUSED = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args")
FRAMES = 8  # how far above the factory the Trainer's own method may be


class TrainerOptimizer:
    """Make a SymOptimizer of a model's parameters; the Trainer calls `TrainerOptimizer()(model, **kwargs)`."""

    def __call__(
        self, model: nn.Module, arguments: Any = None, qk_clip: float | None = None, **kwargs: Any
    ) -> SymOptimizer:
        """Make the optimizer of the model, and of what the Trainer trains beside it: the modules of its loss.

        Args:
            model: The model.
            arguments: The Trainer's arguments; those of the calling Trainer by default. `weight_decay` is taken
                unless `kwargs` has one, and `learning_rate` by the presets that take an AdamW learning rate.
            qk_clip: The largest attention logit, see `symlm.qk_clip.QKClip`; None for no bound.
            kwargs: The other arguments of `SymOptimizer`.

        Returns:
            The optimizer.

        Raises:
            ValueError: As `SymOptimizer`; and for `optim_target_modules`, which names other parameters.
            TypeError: As `SymOptimizer`.
        """
        trainer = _calling_trainer()
        arguments = arguments if arguments is not None else getattr(trainer, "args", None)
        for name, module in _additions(trainer, model):
            beside = model if isinstance(model, _Together) else _Together(model)
            beside.add_module(name, module)
            model = beside
        optimizer = SymOptimizer(model, **_with_arguments(kwargs, arguments))
        if qk_clip is not None:
            QKClip(model, optimizer, qk_clip)
        return optimizer


class _Together(nn.Module):
    """A model beside what a Trainer trains with it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def trainer_optimizer(lr: float | None = None, **kwargs: Any) -> tuple[type[TrainerOptimizer], dict[str, Any]]:
    """Return the argument `optimizer_cls_and_kwargs` of a Trainer, in transformers from 5.17 on and in TRL.

    The Trainer's schedule and warm-up scale the rate of every group. Its `weight_decay` is taken unless one is given
    here, its `learning_rate` by the presets `adamw` and `adamw-compatible` alone; of other settings that are not used
    a warning is given. Its `max_grad_norm` weighs a step inside the momentum.

    Args:
        lr: The rate η, as in `SymOptimizer`; 0.02 by default.
        kwargs: The other arguments of `SymOptimizer`, without the model; and `qk_clip`, the largest attention logit.

    Returns:
        The factory class, and the arguments with which the Trainer calls it.

    Raises:
        ValueError: The DeepSpeed configuration of the Trainer's arguments has an optimizer of its own.
    """
    deepspeed: Any = sys.modules.get("transformers.integrations.deepspeed")
    if "optimizer" in ((deepspeed and deepspeed.deepspeed_config()) or {}):
        raise ValueError(
            'DeepSpeed\'s configuration has an "optimizer", which the Trainer takes in the place of this one: remove '
            'that section, and "scheduler" too, which would set one rate for all roles'
        )
    return TrainerOptimizer, kwargs if lr is None else {"lr": lr, **kwargs}


class SafeCheckpoints:
    """A Trainer's callback that writes a manifest (size, SHA-256) into each checkpoint when all of it is there.

    `trainer.train(resume_from_checkpoint=SafeCheckpoints.newest(output_dir))` goes on from the newest whole one. The
    Trainer deletes what exceeds `save_total_limit` before a manifest is written: set it to 2 or more.
    """

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the manifest of the checkpoint that the Trainer has just saved, on its first process.

        Args:
            args: The Trainer's arguments.
            state: Where it is.
            control: Not used.
        """
        wait_for_all()
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def __getattr__(self, event: str) -> Callable[..., None]:
        """Return what does nothing at the Trainer's other events."""
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda *arguments, **more: None

    @staticmethod
    def newest(folder: str | Path, below: float = math.inf) -> str | None:
        """Return the newest whole checkpoint in a Trainer's output folder; what is newer and is not is renamed, loudly.

        Args:
            folder: The output folder.
            below: A step that it comes before, as the run's last: from there the Trainer would make one step more.

        Returns:
            Its path, or None where there is no checkpoint but the first, which a kill left half.

        Raises:
            RuntimeError: There were whole ones, and all are damaged.
        """
        found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        steps = {int(path.name.split("-")[1]): path for path in found}
        found = [steps[step] for step in sorted(steps) if step < below]
        first_is_half = len(found) == 1 and not (found[0] / MANIFEST).exists()
        whole = newest_whole(found, lambda text: warnings.warn(text, stacklevel=4), required=True)
        if found and not whole and not first_is_half:
            raise RuntimeError(
                f"no checkpoint in {folder} is whole: begin anew in another folder, or restore one of *.damaged"
            )
        return str(whole) if whole else None


def _calling_trainer() -> Any:
    """Return the Trainer whose method is running: it passes the model alone to a factory."""
    frame: Any = sys._getframe(2)
    for _ in range(FRAMES):
        trainer = frame.f_locals.get("self") if frame else None
        if hasattr(trainer, "optimizer_cls_and_kwargs") and hasattr(trainer, "args"):
            return trainer
        frame = frame.f_back if frame else None
    return None


def _additions(trainer: Any, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the Trainer's losses that have trainable parameters of their own, as sentence-transformers' SoftmaxLoss."""
    known = set(model.parameters())
    for name, value in vars(trainer).items() if trainer is not None else ():
        losses = value.items() if isinstance(value, dict) else [("", value)]
        for key, loss in losses if "loss" in name else ():
            if isinstance(loss, nn.Module) and any(p.requires_grad and p not in known for p in loss.parameters()):
                yield f"{name}_{key}".rstrip("_").replace(".", "_"), loss


def _with_arguments(kwargs: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """Return the optimizer's arguments with what a Trainer's own settings mean for it.

    Raises: ValueError for `optim_target_modules`.
    """
    given = dict(_changed(arguments))
    if given.get("optim_target_modules"):
        raise ValueError(
            f"optim_target_modules={given['optim_target_modules']!r} has no meaning here: symlm updates every "
            "trainable parameter by its role. Leave it out, and freeze what must not move"
        )
    if given.get("weight_decay") and "weight_decay" not in kwargs:
        kwargs = {**kwargs, "weight_decay": given["weight_decay"]}
    if hasattr(arguments, "learning_rate") and "lr" not in kwargs and kwargs.get("preset") in ADAMWS_RATE:
        kwargs = {**kwargs, "lr": arguments.learning_rate}
        given.pop("learning_rate", None)
    if unused := {key: given[key] for key in UNUSED if key in given}:
        warnings.warn(
            f"the Trainer's {unused} are not used: symlm's rate is trainer_optimizer(lr=...), here "
            f"{kwargs.get('lr', 0.02)}, and its other settings are arguments of trainer_optimizer",
            stacklevel=4,
        )
    return kwargs


def _changed(arguments: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a Trainer's arguments that are not at their default."""
    for field in fields(arguments) if is_dataclass(arguments) else ():
        value = getattr(arguments, field.name, None)
        plain, default = (getattr(x, "value", x) for x in (value, field.default))  # `optim` becomes an enum
        if plain != default:
            yield field.name, value
