"""Scion's initialization: every weight begins on the boundary of the ball in which the constrained form moves it."""

import torch
from torch import nn

from symlm.optimizer import SymOptimizer
from symlm.roles.assignment import refuse_without_weights
from symlm.roles.role import Role
from symlm.routing.options import named_parameters, with_rate
from symlm.step.directions import whole_directions

RADIUS = 50.0  # ρ of the spectral norm, of which the table's rates are multiples; the source's


@torch.no_grad()
def initialize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set weights to `W = ρ·s·U(N)`, N normal: semi-orthogonal, of rows of one length, or of one size, by their norm.

    Biases become 0, and other vectors stay: the source has no gains. Call it before the model is wrapped or sharded.

    Args:
        model: The model, with weights in fp32 or wider.
        seed: The seed of N.

    Returns:
        The model.

    Raises:
        ValueError: The model is on the meta device, or sharded.

    Source:
        Pethick et al., arXiv 2502.07529, section 5, and the `init` of its code.
    """
    refuse_without_weights(model)
    groups = SymOptimizer(model, 1.0, "scion", polar_method="svd").param_groups
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        for name, p in named_parameters(group):
            if group["role"] != Role.VECTOR:
                N = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                (U,), _ = whole_directions(group, N[None])
                p.copy_(RADIUS * with_rate(group)["lr"] * U)
            elif name.endswith("bias"):
                p.zero_()
    return model
