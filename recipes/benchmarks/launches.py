"""How many operations a piece of code launches, on any device: torch's dispatcher tells."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {  # what computes nothing
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "split", "split_with_sizes", "unbind", "slice"),
    *("select", "expand", "alias", "detach", "as_strided", "unsqueeze", "squeeze", "squeeze_", "diagonal", "unflatten"),
    *("empty", "empty_like", "new_empty", "promote_types", "_record_function_enter_new", "_record_function_exit"),
}


class Launches(TorchDispatchMode):
    """Count the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation._schema.name.split("::")[1]
        self.by_name[name] += name not in VIEWS
        return operation(*args, **(kwargs or {}))
