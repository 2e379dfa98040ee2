"""Watch an attention while it runs: whichever way it computes its scores, its queries and keys are seen."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from symlm.qk_clip.logits import largest_logits

Record = Callable[[Tensor], None]


@contextmanager
def watching(attention: nn.Module, record: Record) -> Iterator[None]:
    """Record the largest logits of an attention while it runs.

    They are those of transformers' attention interface, whichever implementation it chooses, and of
    `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        attention: The module that attends.
        record: Is given the largest logits of each call, (heads,).
    """
    interface = _interface(attention)
    original = interface.get_interface if interface is not None else None
    watch = _Watch(record)

    def get_interface(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        assert original is not None
        function = original(*args, **kwargs)

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
            record(_of_interface(module, q, k, mask, options))
            watch.recorded = True  # what the function calls
            try:
                return function(module, q, k, v, mask, **options)
            finally:
                watch.recorded = False

        return attend

    if interface is not None:
        interface.get_interface = get_interface
    try:
        with watch:
            yield
    finally:
        if interface is not None:
            del interface.get_interface


def _interface(attention: nn.Module) -> Any:
    """Return transformers' registry of attention functions, where the module's code has one."""
    modules = (sys.modules.get(kind.__module__) for kind in type(attention).__mro__)
    return next((found for m in modules if (found := getattr(m, "ALL_ATTENTION_FUNCTIONS", None)) is not None), None)


def _of_interface(module: nn.Module, q: Tensor, k: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
    """Return the largest logits of a call of transformers' interface."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = mask if isinstance(mask, Tensor) else None  # FlexAttention's mask is code
    whole = plain is not None and plain.ndim > 2  # says all about order and window itself
    window = None if whole else options.get("sliding_window")
    causal = bool(causal) and not whole and q.shape[2] > 1
    return largest_logits(q, k, plain, causal=causal, scale=options.get("scaling"), window=window)


class _Watch(TorchFunctionMode):
    """Record the largest logits of calls of torch's scaled dot products."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record, self.recorded = record, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention and not self.recorded:
            self.record(_of_dot_products(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _of_dot_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the largest logits of a call of torch's scaled dot products, which aligns the first query and key."""
    queries = query.shape[-2]
    k = key[..., :queries, :] if is_causal else key
    return largest_logits(query, k, attn_mask, causal=is_causal, scale=scale)


class LogitWatch:
    """Store the largest logits of an attention's heads over its forward passes in training mode.

    Args:
        name: The attention's full name.
        attention: The module that attends.
        heads: The number of its query heads.
        wanted: Whether logits are measured now.

    Raises:
        ValueError: The attention is watched already.
        RuntimeError: In a forward pass whose logits cannot be seen, or which has other heads.
    """

    wanted: Callable[[], bool]

    def __init__(self, name: str, attention: nn.Module, heads: int, wanted: Callable[[], bool]) -> None:
        watchers = (getattr(hook, "__self__", None) for hook in attention._forward_pre_hooks.values())
        if any(isinstance(watcher, LogitWatch) and watcher.wanted is not _never for watcher in watchers):
            raise ValueError(f"QKClip: {name} has a clip already; call remove() on that one before you make another")
        self.name, self.heads, self.wanted = name, heads, wanted
        self.largest: Tensor | None = None
        self._stack, self._calls = ExitStack(), 0
        self._hooks = [
            attention.register_forward_pre_hook(self._begin),
            attention.register_forward_hook(self._end, always_call=True),
        ]

    def __reduce__(self) -> tuple[Callable[..., "LogitWatch"], tuple[str, int]]:
        """Copy as a watch that never measures: a copy of the model would bring the clip and its optimizer with it."""
        return _asleep, (self.name, self.heads)

    def remove(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()

    def _record(self, largest: Tensor) -> None:
        """Store the larger of these logits and those before."""
        if len(largest) != self.heads:
            raise RuntimeError(
                f"QKClip: {self.name} attends with {len(largest)} heads on this rank and has {self.heads} by its "
                "weights; it does not run where heads are sharded (tensor parallelism)"
            )
        self._calls += 1
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def _begin(self, module: nn.Module, args: Any) -> None:
        """Begin to watch, before a forward pass."""
        self._calls = 0
        if module.training and self.wanted():
            self._stack.enter_context(watching(module, self._record))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """End to watch, after a forward pass; also after one that raised, which has no output."""
        self._stack.close()
        if output is not None and module.training and self.wanted() and not self._calls:
            raise RuntimeError(
                f"QKClip sees no attention logits in {self.name} ({type(module).__name__}): its forward must call "
                "transformers' attention interface or torch.nn.functional.scaled_dot_product_attention"
            )


def _never() -> bool:
    return False


def _asleep(name: str, heads: int) -> LogitWatch:
    return LogitWatch(name, nn.Module(), heads, _never)
