"""What a piece of code costs beside its time: operations launched, bytes read and written, temporary memory."""

from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = {  # what computes nothing
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "split", "split_with_sizes", "unbind", "slice"),
    *("select", "expand", "alias", "detach", "as_strided", "unsqueeze", "squeeze", "squeeze_", "diagonal", "unflatten"),
    *("empty", "empty_like", "new_empty", "promote_types", "_record_function_enter_new", "_record_function_exit"),
}


class Launches(TorchDispatchMode):
    """Count the operations that compute something, and the bytes of what they read and write.

    An operand counts once an operation, however often a product reads it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation._schema.name.split("::")[1]
        result = operation(*args, **(kwargs or {}))
        if name not in VIEWS:
            self.by_name[name] += 1
            self.bytes += _bytes_of(operation._schema.arguments, args, kwargs or {}, result)
        return result


def _bytes_of(parameters: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes of the operands, of what is changed in place, and of new results."""
    named = dict(zip([parameter.name for parameter in parameters], args, strict=False)) | kwargs
    changed = [named.get(p.name) for p in parameters if p.alias_info is not None and p.alias_info.is_write]
    written = _distinct([changed, result])
    return sum(_distinct(list(named.values())).values()) + sum(written.values())


def _distinct(tree: Any) -> dict[Any, int]:
    """Return the bytes of the tensors in a tree by their place in memory."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {(T.data_ptr(), tuple(T.shape)): T.numel() * T.element_size() for T in tensors}


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that a call has allocated on the CPU at one time, beyond those from before it.

    Args:
        work: The call; what it leaves allocated counts too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)
