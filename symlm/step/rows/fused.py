"""Row rules in Triton passes, momentum, direction and update together, where a kernel serves and is asked for."""

from typing import Any

import torch
from symlm_kernels.reference import MeanNorms
from symlm_kernels.selection import LARGEST_ROW, choose
from torch import Tensor

from symlm.distributed.layout import Layout, cut_rows
from symlm.polar.precision import resolve_dtype
from symlm.rules import get_rule
from symlm.rules.rows import whitener
from symlm.step.rows.row_step import product

ROWS_AT_A_TIME = 2**15  # of a vocabulary's directions are turned and stepped, so that few are alive twice


def serves(group: dict[str, Any], layout: Layout, W: Tensor) -> bool:
    """Tell whether a kernel does this group's step on rows (m, n) that lie here.

    All ranks must answer alike: by the layout, not by how many rows each holds. Not with a momentum of directions, on
    cut rows, on rows in several shards whose mean or Gram matrix the rule wants, nor on parameters that are updated
    in a wide copy.
    """
    rule = get_rule(group["rule"])
    if not rule.fused or group["momentum_of"] != "gradients":
        return False
    if cut_rows(layout) or ((rule.symmetry.shift or rule.whitens) and not layout.whole):
        return False
    if W.dtype != torch.float32 or W.stride(-1) != 1 or layout.shape[-1] > LARGEST_ROW:
        return False
    return choose(W.device.type, W.dtype, layout.shape[-1], group["kernels"], "rows") == "triton"


def step(
    group: dict[str, Any], W: Tensor, G: Tensor, M: Tensor, state: dict[str, Tensor], scale: float, finite: Tensor
) -> None:
    """Do `M <- βM + (1−β)G`, `W <- (1 − ηλ)W − η·s·U(M)` and refresh what the rule keeps, in place."""
    from symlm_kernels import rows

    if not W.numel():
        return
    # A rate that lies on the CPU is not copied, which a graph could not capture.
    lr = group["lr"] * torch.ones((), device=W.device)
    keep = 1 - lr * (group["weight_decay"] * group["weight_decay_multiplier"])
    mean = None
    if state:
        beta2 = group["betas"][1]
        mean = MeanNorms(state["row_rms"], 1 - beta2 ** state["step"], beta2)
    rule, told = get_rule(group["rule"]), (lr * scale, keep, finite.float())
    if rule.whitens:
        return _whitened_step(group, W, G.contiguous(), M, state["gram"], told, mean)
    one_pass = rows.centered_row_norm_step if rule.symmetry.shift else rows.row_norm_step
    one_pass(G.contiguous(), M, W, group["momentum"], *told, group["nesterov"], mean)


def _whitened_step(
    group: dict[str, Any],
    W: Tensor,
    G: Tensor,
    M: Tensor,
    gram: Tensor,
    told: tuple[Tensor, Tensor, Tensor],
    mean: MeanNorms | None,
) -> None:
    """Do the step of directions that are turned by their Gram matrix, in half precision on a GPU.

    told: the size of the step, what is kept of the weights, and whether it happens, one element each.
    """
    from symlm_kernels import rows

    centered, beta2 = get_rule(group["rule"]).symmetry.shift, group["betas"][1]
    dtype, finite = resolve_dtype(W, group["compute_dtype"]), told[-1]
    dtype = dtype if dtype.itemsize == 2 else W.dtype
    D, row = rows.row_directions(G, M, group["momentum"], finite, group["nesterov"], mean, centered, dtype)
    seen = gram.lerp(product(D.mT, D, dtype) / len(D), 1 - beta2)
    gram.copy_(torch.where(finite > 0, seen, gram))
    turn = whitener(gram, len(D))
    row, turn = row @ turn if centered else torch.zeros_like(row), turn.to(dtype)
    for some, weights in zip(D.split(ROWS_AT_A_TIME), W.split(ROWS_AT_A_TIME), strict=True):
        rows.step_by_directions(some @ turn, row, weights, *told)
