"""The device of a launch: Triton launches on the current device, and a model may be on several."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def on_its_device(launch: Callable[Concatenate[Tensor, Rest], Result]) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Make the device of the first argument the current one while the decorated function runs.

    Args:
        launch: A function that launches kernels; its first argument is a tensor on their device.

    Returns:
        The decorated function.
    """

    @wraps(launch)
    def launched(X: Tensor, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        if not X.is_cuda or X.device.index == torch.cuda.current_device():  # a context takes longer than a look
            return launch(X, *args, **kwargs)
        with torch.cuda.device_of(X):
            return launch(X, *args, **kwargs)

    return launched
