"""The check of the kernels on the machine at hand: "auto" takes them only where they agree with their torch twins."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from symlm_kernels import reference

TOLERANCE = 1e-2  # of products of half-precision entries; what is wrong is wrong by more
SHAPE = (2, 96, 160)


@cache
def agrees(what: str, device: str) -> bool:
    """Compare the kernels with their twins once, on small random inputs; it waits for the device, and warns if not.

    Args:
        what: "products", "rows" or "stacks".
        device: A device, such as "cuda:0".

    Returns:
        Whether every result is within `TOLERANCE` of its twin's.
    """
    try:
        worst = max(_differences(what, device))
        said = f"differ from torch by {worst:.1e}"
    except Exception as error:  # a compiler's or driver's, of any kind
        worst, said = torch.inf, f"fail: {type(error).__name__}: {error}"
    if worst <= TOLERANCE:
        return True
    warnings.warn(
        f"symlm's Triton kernels of {what} {said} on {device}; torch's operations are used. Please report it with the "
        "versions of torch, triton and the driver",
        stacklevel=2,
    )
    return False


def _differences(what: str, device: str) -> list[float]:
    """Return the relative differences of all results of one kind of kernels from their twins'."""
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(SHAPE, generator=generator).to(device)

    G, M, W = random(), random(), random()
    kernels = import_module(f"symlm_kernels.{what}")
    return [
        ((ours - twin).norm() / twin.norm()).item()
        for ours, twin in zip(*(COMPARED[what](module, G, M, W) for module in (kernels, reference)), strict=True)
    ]


def _products(module: ModuleType, G: Tensor, M: Tensor, W: Tensor) -> list[Tensor]:
    """Return the results of the products' functions of a module."""
    X = (M / M.shape[-1] ** 0.5).half()
    A = module.gram(X)
    return [x.float() for x in (A, module.symmetric_product(A, A, A, 0.5, 2.0), module.apply_polynomial(A, X, 3.0))]


def _rows(module: ModuleType, G: Tensor, M: Tensor, W: Tensor) -> list[Tensor]:
    """Return the results of the rows' functions of a module."""
    size, factor, finite = (torch.tensor(x, device=M.device) for x in (0.3, 0.9, 1.0))
    results = []
    for step in (module.row_norm_step, module.centered_row_norm_step):
        momentum, weights = M[0].clone(), W[0].clone()
        mean = reference.MeanNorms(torch.ones_like(M[0][:, :1]), torch.tensor(0.5, device=M.device), 0.95)
        results += [step(G[0], momentum, weights, 0.9, size, factor, finite, True, mean), momentum, weights]
    momentum, weights = M[1].clone(), W[1].clone()
    D, row = module.row_directions(G[1], momentum, 0.9, finite, True, None, True)
    return [*results, module.step_by_directions(D, row, weights, size, factor, finite), momentum, weights]


def _stacks(module: ModuleType, G: Tensor, M: Tensor, W: Tensor) -> list[Tensor]:
    """Return the results of the stacks' functions of a module."""
    momenta, weights = list(M.clone()), list(W.clone())
    one = torch.ones((), device=M.device)
    X = module.stack_inputs(list(G), momenta, 0.9, one, 2, 1.02, True, torch.float16)
    squares = module.stack_step(X, weights, torch.ones(len(M), 2, device=M.device), 0.1 * one, 2.0, 0.3)
    return [X.float(), squares.sum(), *momenta, *weights]


COMPARED: dict[str, Callable[[ModuleType, Tensor, Tensor, Tensor], list[Tensor]]] = {
    "products": _products,
    "rows": _rows,
    "stacks": _stacks,
}
