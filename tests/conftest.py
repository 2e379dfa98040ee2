"""One thread a process, here and in what tests start: two workers on two cores do not fight, and sums keep an order."""

import os

os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}

import torch

torch.set_num_threads(1)

LONG = ("test_reproduce.py", "test_launch.py", "test_kernels.py", "test_distributed.py", "test_pretrain.py")


def pytest_collection_modifyitems(items):
    """Start with the longest files, so that no worker ends long after the others."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
