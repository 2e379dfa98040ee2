"""What Triton's kernels move, recorded in the interpreter: the addresses that they load and store, launch by launch."""

from collections import Counter

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

PRODUCTS = {"_symmetric_kernel", "_apply_kernel", "mm", "bmm", "baddbmm"}


class Traffic(TorchDispatchMode):
    """Record launches by name, the bytes of passes, and the bytes of products' operands.

    A pass moves each address once that it loads, and once that it stores; a product each operand and its result once.
    The products of an inverse root, torch's `baddbmm`, are launches whose bytes are left out.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.launches, self.passes, self.operands = Counter(), 0, 0
        self.touched = {}
        builder = interpreter.interpreter_builder
        for kind in ("load", "store"):
            name = f"create_masked_{kind}"
            monkeypatch.setattr(builder, name, self.watched(kind, getattr(builder, name)), raising=False)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", self.launched(interpreter.GridExecutor.__call__))

    def watched(self, kind, access):
        def recorded(ptrs, second, third, *rest):
            mask = (second if kind == "load" else third).data
            size = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
            addresses, inside = np.broadcast_arrays(ptrs.data, mask)
            self.touched.setdefault((kind, size), []).append(addresses[inside.astype(bool)])
            return access(ptrs, second, third, *rest)

        return recorded

    def launched(self, run):
        def recorded(executor, *args, **kwargs):
            self.touched = {}
            result = run(executor, *args, **kwargs)
            name = executor.fn.__name__
            self.launches[name] += 1
            if name in PRODUCTS:
                self.operands += distinct(args)
            else:
                found = self.touched.items()
                self.passes += sum(size * len(np.unique(np.concatenate(some))) for (_, size), some in found)
            return result

        return recorded

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result, name = operation(*args, **(kwargs or {})), operation._schema.name.split("::")[1]
        if name in PRODUCTS:
            self.launches[name] += 1
            self.operands += distinct((*args, result)) if name != "baddbmm" else 0
        return result


def distinct(tensors):
    """Return the bytes of tensors, each place in memory once."""
    return sum({T.data_ptr(): T.numel() * T.element_size() for T in tensors if isinstance(T, torch.Tensor)}.values())
