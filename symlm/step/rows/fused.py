"""Row rules in Triton kernels: momentum, direction and update in one pass, where a kernel exists and is chosen."""

from typing import Any

import torch
from symlm_kernels.reference import MeanNorms
from symlm_kernels.selection import LARGEST_ROW, choose
from torch import Tensor

from symlm.distributed.layout import Layout, cut_rows
from symlm.polar.precision import resolve_dtype
from symlm.routing.costs import ROWS_AT_A_TIME
from symlm.rules import get_rule
from symlm.rules.rows import whitener
from symlm.step.rows.row_step import gram_weight, product, root_of


def serves(group: dict[str, Any], layout: Layout, W: Tensor) -> bool:
    """Return whether a kernel can run this group's step on the rows that this rank stores.

    It cannot with a momentum of directions, on split rows, on sharded rows if the rule needs their mean or Gram matrix,
    or on parameters that are updated in a wide copy. All ranks must return the same, so that it depends on the layout
    and not on how many rows a rank stores.

    Args:
        group: The parameter group.
        layout: The parameter's layout.
        W: This rank's part of the parameter, (m, n).

    Returns:
        Whether `step` can be called.

    Raises:
        ValueError: The group's `kernels` is unknown.
        RuntimeError: The group's `kernels` is "triton", and Triton cannot run here.
    """
    rule = get_rule(group["rule"])
    if not rule.fused or group["momentum_of"] != "gradients" or group["constraint"] != "decay":
        return False
    if cut_rows(layout) or ((rule.symmetry.shift or rule.whitens) and not layout.whole):
        return False
    if W.dtype != torch.float32 or W.stride(-1) != 1 or layout.shape[-1] > LARGEST_ROW:
        return False
    return choose(W.device.type, W.dtype, layout.shape[-1], group["kernels"], "rows") == "triton"


def step(
    group: dict[str, Any], W: Tensor, G: Tensor, M: Tensor, state: dict[str, Tensor], scale: float, finite: Tensor
) -> Tensor:
    """Compute `M <- βM + (1−β)G`, `W <- (1 − ηλ)W − η·s·U(M)` and the rule's next state, in place.

    Args:
        group: The parameter group.
        W: This rank's rows of the parameter, (m, n), fp32.
        G: Their gradient, (m, n).
        M: Their momentum, (m, n).
        state: The rule's state, see `rule_state`.
        scale: The scale s.
        finite: Whether the step happens, a bool of one element; nothing changes if not.

    Returns:
        `Σ(ηsU)²` of each row.
    """
    from symlm_kernels import rows

    if not W.numel():
        return torch.zeros(0, device=W.device)
    # A rate on the CPU is not copied to the device: a graph could not capture that.
    lr = group["lr"] * torch.ones((), device=W.device)
    decay_factor = 1 - lr * (group["weight_decay"] * group["weight_decay_multiplier"])
    mean = None
    if state:
        beta2 = group["betas"][1]
        mean = MeanNorms(state["row_rms"], 1 - beta2 ** state["step"], beta2)
    rule, factors = get_rule(group["rule"]), (lr * scale, decay_factor, finite.float())
    if rule.whitens:
        return _whitened_step(group, W, G.contiguous(), M, state["gram"], factors, mean)
    one_pass = rows.centered_row_norm_step if rule.symmetry.shift else rows.row_norm_step
    return one_pass(G.contiguous(), M, W, group["momentum"], *factors, group["nesterov"], mean)


def _whitened_step(
    group: dict[str, Any],
    W: Tensor,
    G: Tensor,
    M: Tensor,
    gram: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    mean: MeanNorms | None,
) -> Tensor:
    """Run the step of a whitened rule; `factors` are the step's size, the decay factor, and whether it happens."""
    from symlm_kernels import rows

    centered = get_rule(group["rule"]).symmetry.shift
    dtype, finite = resolve_dtype(W, group["compute_dtype"]), factors[-1]
    dtype = dtype if dtype.itemsize == 2 else W.dtype
    D, row = rows.row_directions(G, M, group["momentum"], finite, group["nesterov"], mean, centered, dtype)
    if weight := gram_weight(group):
        refreshed = gram.lerp(product(D.mT, D, dtype) / len(D), weight)
        gram.copy_(torch.where(finite > 0, refreshed, gram))
    root = whitener(gram, len(D), root_of(group))
    row, root = row @ root if centered else torch.zeros_like(row), root.to(dtype)
    parts = zip(D.split(ROWS_AT_A_TIME), W.split(ROWS_AT_A_TIME), strict=True)
    squares = [rows.step_by_directions(some @ root, row, weights, *factors) for some, weights in parts]
    return torch.cat(squares)
