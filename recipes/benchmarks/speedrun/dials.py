"""The dials of an arm as they stand at a model's width, printed before anything is trained."""

import pandas as pd
import torch

from symlm.rules import get_rule
from symlm.step.directions import scale_of
from symlm.views.matrix_view import MatrixView


def describe_dials(optimizer: torch.optim.Optimizer) -> str:
    """Return a line a group: its rate, and by how much the table's scale multiplies a direction of its first shape.

    A rate is the one dial times the table's multiple, or the absolute value that the arm sets; a scale is a formula of
    the shape alone. Nothing else depends on the width.

    Args:
        optimizer: a `SymOptimizer`, before its first step.
    """
    lines = []
    for group in optimizer.param_groups:
        rule = get_rule(group["rule"])
        view, shape = MatrixView.parse(group["view"]), tuple(group["params"][0].shape)
        factor = scale_of(group, view, shape)
        means = f"betas {tuple(group['betas'])}" if rule.elementwise else f"momentum {group['momentum']:g}"
        lines.append(
            {
                "group": group["name"],
                "matrices": " × ".join(map(str, view.shape(shape))),
                "rule": group["rule"],
                "rate": f"{group['lr'] * group['lr_multiplier']:.4g}",
                "scale": "" if rule.elementwise else f"{group['scale']} = {factor:.4g}",
                "means": means,
                "decay": f"{group['weight_decay'] * group['weight_decay_multiplier']:g}",
            }
        )
    return pd.DataFrame(lines).set_index("group").to_markdown(disable_numparse=True)
