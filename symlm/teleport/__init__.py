"""Symmetry teleportation: move a model along a group that preserves its loss, to where the gradient is large.

A group acts on a weight as `W' = L W R^{-1}`. The loss is the same there, so its gradient, and any mean of gradients in
an optimizer's state, moves as the covector `G' = L^{-T} G R^T`: the search needs one gradient, and does not evaluate
the model again.

Source:
    Zhao, Dehmamy, Walters & Yu, NeurIPS 2022; the transformer's groups are derived here.
"""

from symlm.teleport.actions import (
    Transports,
    head_shift,
    neuron_permutations,
    neuron_scales,
    residual_rotation,
    rope_rotations,
    value_output,
)
from symlm.teleport.activations import extended_atanh, extended_logit, extended_sigmoid, extended_tanh
from symlm.teleport.data import DataTransform, data_transformation, fold_
from symlm.teleport.moving import refuse_unmovable, teleport
from symlm.teleport.nonlinear import act_on_mlp, act_on_quadratic
from symlm.teleport.search import ascend, climb

__all__ = [
    "DataTransform",
    "Transports",
    "act_on_mlp",
    "act_on_quadratic",
    "ascend",
    "climb",
    "data_transformation",
    "extended_atanh",
    "extended_logit",
    "extended_sigmoid",
    "extended_tanh",
    "fold_",
    "head_shift",
    "neuron_permutations",
    "neuron_scales",
    "refuse_unmovable",
    "residual_rotation",
    "rope_rotations",
    "teleport",
    "value_output",
]
