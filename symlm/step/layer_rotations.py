"""One rotation a layer: matrices that read and write one residual stream turn together (ARO, arXiv 2602.09006)."""

import re
from collections.abc import Iterable
from math import sqrt
from typing import Any, NamedTuple

import torch
from symlm_kernels.reference import row_norms
from torch import Tensor

from symlm.distributed.tensors import local
from symlm.rules import get_rule
from symlm.rules.rotated import next_rotation
from symlm.step.bucket import Bucket
from symlm.step.directions import wide
from symlm.step.member import Member
from symlm.views.matrix_view import MatrixView

LAYER = re.compile(r".*?\.\d+(?=\.)")


def layer_of(name: str) -> str:
    """Return the name of the layer that a parameter lies in, up to its first number; its own name outside of layers."""
    found = LAYER.match(name)
    return found.group() if found else name


class Pull(NamedTuple):
    """A parameter in the turn of its layer: `M f(RᵀM)ᵀ` of its matrices at an RMS of 1, and what their RMS was."""

    member: Member
    pulls: Tensor  # (b, m, m)
    sizes: Tensor  # (b, 1, 1)


def rotate_layers(buckets: Iterable[Bucket], finite: Tensor) -> None:
    """Do phase 1 of all these buckets, and turn each layer's rotation: `R <- QR(Σ_i M_i f(RᵀM_i)ᵀ + εR)`.

    Every M_i has the residual stream's dimensions as rows, so that the sum is that of the layer's momenta side by side.
    All ranks call this together; each keeps R with each parameter. Momenta that are cut are gathered for this, and once
    more for their directions, so that no rank holds a layer's at once. The layers' factorizations are one batch.
    """
    layers: dict[tuple[str, int, torch.dtype, torch.device], list[Pull]] = {}
    for bucket in buckets:
        bucket.start()
        for member, seen in zip(bucket.batch, bucket.momenta, strict=True):
            M = MatrixView.parse(bucket.group["view"]).to_matrices(wide(member.whole(seen)))
            layers.setdefault((layer_of(member.name), M.shape[-2], M.dtype, M.device), []).append(
                _pull(bucket.group, member, M)
            )
    for alike in {key[1:] for key in layers}:
        same = [pulls for key, pulls in layers.items() if key[1:] == alike]
        before = torch.stack([local(pulls[0].member.state["rotation"])[0] for pulls in same])
        after = next_rotation(torch.stack([_sum(pulls) for pulls in same]), before)
        for pulls, R in zip(same, after, strict=True):
            for member, own, _ in pulls:
                member.store_state({"rotation": R.expand_as(own)}, finite.to(R.device))


def _sum(pulls: list[Pull]) -> Tensor:
    """Return the pulls' sum at the momenta's sizes, the largest as 1, so that nothing overflows."""
    largest = torch.cat([pull.sizes for pull in pulls]).max()
    largest = torch.where(largest > 0, largest, 1.0)
    return torch.cat([pull.pulls * (pull.sizes / largest) for pull in pulls]).sum(dim=0)


def _pull(group: dict[str, Any], member: Member, M: Tensor) -> Pull:
    rule = get_rule(group["rule"])
    state = {key: local(member.state[key]) for key in rule.state}
    sizes = row_norms(M.flatten(-2))[..., None] / sqrt(M.shape[-2] * M.shape[-1])
    return Pull(member, rule.pulled(M, state, group["betas"][1]), sizes)
