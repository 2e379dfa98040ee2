"""Row rules in one Triton pass, momentum, direction and update together, where a kernel serves and is asked for."""

from typing import Any

import torch
from symlm_kernels.reference import MeanNorms
from symlm_kernels.selection import LARGEST_ROW, choose
from torch import Tensor

from symlm.by_rows import cut_rows
from symlm.collectives import Layout
from symlm.rules import get_rule

RULES = ("row_norm", "centered_row_norm", "row_adam", "centered_row_adam")


def serves(group: dict[str, Any], layout: Layout, W: Tensor) -> bool:
    """Tell whether a kernel does this group's step on rows (m, n) that lie here.

    All ranks must answer alike: by the layout, not by how many rows each holds. Not with a momentum of directions, on
    cut rows, on a centered rule's rows in several shards, nor on parameters that are updated in a wide copy.
    """
    if group["rule"] not in RULES or group["momentum_of"] != "gradients":
        return False
    if cut_rows(layout) or (get_rule(group["rule"]).symmetry.shift and not layout.whole):
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
    lr = group["lr"]
    lr = lr.to(W.device) if isinstance(lr, Tensor) else torch.full((), lr, device=W.device)
    keep = 1 - lr * (group["weight_decay"] * group["weight_decay_multiplier"])
    mean = None
    if state:
        beta2 = group["betas"][1]
        mean = MeanNorms(state["row_rms"], 1 - beta2 ** state["step"], beta2)
    rule = rows.centered_row_norm_step if get_rule(group["rule"]).symmetry.shift else rows.row_norm_step
    rule(G.contiguous(), M, W, group["momentum"], lr * scale, keep, finite.float(), group["nesterov"], mean)
