"""The passes before and behind the products of polar factors, in Triton; the torch twins are in `reference`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from symlm_kernels.jit import stacks as kernels

PART = 4096  # the entries of a program: 16 a thread of eight warps
WARPS = 8
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def stack_inputs(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    beta: float,
    finite: Tensor,
    matrices: int,
    bound: float,
    nesterov: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `M <- βM + (1−β)G` of k parameters of one shape, and `X / (bound·‖X‖_F)` of each matrix X of them.

    Two passes: G is read and M written with the parts of the norms, then X is computed again, divided and rounded.

    Args:
        gradients: G of each parameter, contiguous, of one dtype.
        momenta: M of each parameter, same shape, contiguous, of one dtype, updated in place.
        beta: The momentum's decay β.
        finite: M does not change, and G counts as M, if it is 0; one element on the device.
        matrices: The number of matrices of a parameter, each of consecutive entries.
        bound: The factor of the norm.
        nesterov: Whether X is `(1−β)G + βM` in place of M.
        dtype: The dtype of the result.

    Returns:
        The divided inputs, (k, *shape); a zero matrix stays zero.

    Raises:
        ValueError: Shapes or dtypes differ, or a tensor is not contiguous.
    """
    M = momenta[0]
    X = torch.empty((len(momenta), *M.shape), dtype=dtype, device=M.device)
    grid, sizes, constants = _launch(X, matrices, gradients, momenta)
    types = {"G_TYPE": TYPES[gradients[0].dtype], "M_TYPE": TYPES[M.dtype], "NESTEROV": nesterov}
    largest, squares = (torch.empty(grid, dtype=torch.float32, device=M.device) for _ in range(2))
    divisors = torch.empty(len(momenta) * matrices, 2, dtype=torch.float32, device=M.device)
    with torch.cuda.device_of(M):
        tables = _table(gradients), _table(momenta)
        kernels.momentum_kernel[grid](*tables, largest, squares, finite, *sizes, beta, **types, **constants)
        kernels.norm_kernel[(len(divisors),)](largest, squares, divisors, sizes[-1], bound, BLOCK=1024)
        kernels.input_kernel[grid](*tables, divisors, X, finite, *sizes, beta, **types, **constants)
    return X


def stack_step(
    U: Tensor, weights: Sequence[Tensor], active: Tensor, rate: Tensor, scale: float, decay: float
) -> Tensor:
    """Compute `W <- (1 − rate·decay)W − rate·scale·a·U` in place, of k parameters of one shape.

    Args:
        U: The directions, (k, *shape), contiguous.
        weights: W of each parameter, contiguous, of one dtype.
        active: The factor a of each part of a parameter, (k, parts), fp32, contiguous; parts are equal and have
            consecutive entries.
        rate: The rate, 0 for a step that does not happen, fp32, one element on the device.
        scale: The scale of the directions.
        decay: The weight decay.

    Returns:
        `Σ(rate·scale·a·U)²` of the programs that share the work, whose sum is that of all entries.

    Raises:
        ValueError: As `stack_inputs`.
    """
    grid, numbers, constants = _launch(U, active.shape[1], weights)
    squares = torch.empty(grid, dtype=torch.float32, device=U.device)
    with torch.cuda.device_of(U):
        arguments = (U, _table(weights), active, rate, squares, *numbers, float(scale), float(decay))
        kernels.step_kernel[grid](*arguments, W_TYPE=TYPES[weights[0].dtype], **constants)
    return squares


def _launch(
    stack: Tensor, matrices: int, *lists: Sequence[Tensor]
) -> tuple[tuple[int], tuple[int, int, int], dict[str, Any]]:
    """Check the tensors; return the grid, the sizes that `_place` takes, and the kernels' constants."""
    shape, count = stack.shape[1:], len(stack)
    for tensors in lists:
        if {(T.shape, T.dtype, T.is_contiguous()) for T in tensors} != {(shape, tensors[0].dtype, True)}:
            raise ValueError(
                f"the tensors of a stack need one shape {tuple(shape)}, one dtype and contiguous entries, got "
                f"{[(tuple(T.shape), T.dtype, T.stride()) for T in tensors]}; call .contiguous()"
            )
        if len(tensors) != count:
            raise ValueError(f"a stack of {count} parameters got a list of {len(tensors)}; pass one tensor for each")
    entries = stack[0].numel() // matrices
    parts = triton.cdiv(entries, PART)
    aligned = entries % 16 == 0 and all(T.data_ptr() % 16 == 0 for tensors in lists for T in tensors)
    constants = {"ALIGN": 16 if aligned else 1, "PART": PART, "num_warps": WARPS}
    return (count * matrices * parts,), (entries, matrices, parts), constants


def _table(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors' addresses on their device."""
    return _addresses(tuple(T.data_ptr() for T in tensors), tensors[0].device)


@lru_cache(maxsize=1024)  # most gradients come back to the same memory; a graph that is captured finds the table here
def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the addresses on a device."""
    return torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)
