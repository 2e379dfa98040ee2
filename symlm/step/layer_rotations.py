"""One rotation a layer, shared by the matrices that read and write one residual stream.

Source:
    ARO, arXiv 2602.09006.
"""

import re
from collections.abc import Iterable
from math import sqrt
from typing import Any, NamedTuple

import torch
from symlm_kernels.reference import row_norms
from torch import Tensor

from symlm.distributed.tensors import local
from symlm.rules import get_rule
from symlm.rules.rotated import RETAINED, next_rotation
from symlm.step.bucket import Bucket
from symlm.step.directions import constants_of, wide
from symlm.step.member import Member
from symlm.views.matrix_view import MatrixView

LAYER = re.compile(r".*?\.\d+(?=\.)")


def layer_of(name: str) -> str:
    """Return the name of a parameter's layer.

    Args:
        name: The parameter's full name.

    Returns:
        The name up to its first number, such as `model.layers.3`; the full name of a parameter outside of layers.
    """
    match = LAYER.match(name)
    return match.group() if match else name


class Pull(NamedTuple):
    """Store a parameter's share of its layer's next rotation.

    Args:
        member: The parameter.
        pulls: `M f(RᵀM)ᵀ` of its matrices at an RMS of 1, (b, m, m).
        sizes: The RMS of its matrices, (b, 1, 1).
    """

    member: Member
    pulls: Tensor
    sizes: Tensor


def rotate_layers(buckets: Iterable[Bucket], finite: Tensor) -> None:
    """Run phase 1 of these buckets, and refresh each layer's rotation, `R <- QR(Σ_i M_i f(RᵀM_i)ᵀ + εR)`.

    Every M_i has the residual stream's dimensions as rows, so that the sum is that of the layer's momenta side by side.
    All ranks call this together, and each stores R with each parameter. Sharded momenta are gathered for this and once
    more for their directions, so that no rank stores those of a layer at once. The layers' factorizations are one
    batch.

    Args:
        buckets: The buckets of all groups whose rotation is shared by a layer.
        finite: Whether the step happens, a bool of one element; the rotations stay as they were if not.
    """
    layers: dict[tuple[str, int, torch.dtype, torch.device, float], list[Pull]] = {}
    for bucket in buckets:
        bucket.start()
        retained = constants_of(bucket.group).get("retained", RETAINED)
        for member, part in zip(bucket.batch, bucket.momenta, strict=True):
            M = MatrixView.parse(bucket.group["view"]).to_matrices(wide(member.whole(part)))
            key = (layer_of(member.name), M.shape[-2], M.dtype, M.device, retained)
            layers.setdefault(key, []).append(_pull(bucket.group, member, M))
    for alike in {key[1:] for key in layers}:
        same = [pulls for key, pulls in layers.items() if key[1:] == alike]
        before = torch.stack([local(pulls[0].member.state["rotation"])[0] for pulls in same])
        after = next_rotation(torch.stack([_sum(pulls) for pulls in same]), before, retained=alike[-1])
        for pulls, R in zip(same, after, strict=True):
            for member, pulled, _ in pulls:
                member.store_state({"rotation": R.expand_as(pulled)}, finite.to(R.device))


def _sum(pulls: list[Pull]) -> Tensor:
    """Return the sum of the pulls times their momenta's sizes over the largest size, so that nothing overflows."""
    largest = torch.cat([pull.sizes for pull in pulls]).max()
    largest = torch.where(largest > 0, largest, 1.0)
    return torch.cat([pull.pulls * (pull.sizes / largest) for pull in pulls]).sum(dim=0)


def _pull(group: dict[str, Any], member: Member, M: Tensor) -> Pull:
    """Return the pulls of a parameter's matrices M, (b, m, n), and their RMS."""
    rule = get_rule(group["rule"])
    state = {key: local(member.state[key]) for key in rule.state}
    sizes = row_norms(M.flatten(-2))[..., None] / sqrt(M.shape[-2] * M.shape[-1])
    return Pull(member, rule.pulled(M, state, group["betas"][1]), sizes)
