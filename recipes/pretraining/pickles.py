"""A checkpoint is data: whatever format its files have, reading them runs no code of theirs."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # also where accelerate, DCP and DeepSpeed ask for weights_only=False
STATES = {  # what DeepSpeed's states hold besides plain data and tensors
    "deepspeed.runtime.fp16.loss_scaler": ("DynamicLossScaler", "LossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
METADATA = {  # what the index of a distributed checkpoint holds, which torch reads by pickle alone
    "pathlib": ("PosixPath", "WindowsPath"),
    "torch": ("Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.serialization": ("_get_layout",),
}


class _Index(pickle.Unpickler):
    """Read the index of a distributed checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return super().find_class(module, name)


@contextmanager
def only_data(checkpoint: Path) -> Iterator[None]:
    """Load a checkpoint in a `with` block: torch reads plain data and tensors alone, whoever calls it.

    Raises: ValueError for an index that holds anything else.
    """
    for path in checkpoint.rglob(".metadata"):
        try:
            with path.open("rb") as file:
                _Index(file).load()
        except Exception as error:  # a damaged pickle raises whatever its bytes say
            raise ValueError(f"{path} is no index of a distributed checkpoint: {error}") from error
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        with safe_globals(list(_classes(checkpoint))):
            yield
    finally:
        os.environ.pop(FORCED)
        os.environ.update({FORCED: before} if before else {})


def _classes(checkpoint: Path) -> Iterator[Any]:
    """Yield DeepSpeed's classes for a checkpoint of DeepSpeed's."""
    if any(checkpoint.rglob("*_states.pt")):
        for module, names in STATES.items():
            yield from (getattr(import_module(module), name) for name in names)
