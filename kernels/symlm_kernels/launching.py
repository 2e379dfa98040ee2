"""Where a kernel runs: Triton launches on the current device, and a model may lie on several."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Told = ParamSpec("Told")
Result = TypeVar("Result")


def on_its_device(launch: Callable[Concatenate[Tensor, Told], Result]) -> Callable[Concatenate[Tensor, Told], Result]:
    """Make the device of the first argument the current one while the decorated function runs."""

    @wraps(launch)
    def launched(X: Tensor, *args: Told.args, **kwargs: Told.kwargs) -> Result:
        with torch.cuda.device_of(X):
            return launch(X, *args, **kwargs)

    return launched
