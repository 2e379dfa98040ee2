"""Phase 1: the momentum, and the rule's input that is made from it."""

from typing import Any

import torch
from torch import Tensor

from symlm.polar.precision import accumulation_dtype
from symlm.rules import get_rule
from symlm.step.directions import wide
from symlm.step.member import Member
from symlm.step.rows.blocks import ALL, Block


def takes_gradient(group: dict[str, Any]) -> bool:
    """Return whether the rule's input is the gradient, and the momentum is updated behind the rule.

    Args:
        group: The parameter group.
    """
    return group["momentum_of"] == "directions" or get_rule(group["rule"]).reads_weight


def update_momentum(group: dict[str, Any], member: Member, finite: Tensor, block: Block = ALL) -> Tensor:
    """Update the momentum, `M <- βM + (1−β)G`; that of `takes_gradient` is updated later.

    Args:
        group: The parameter group.
        member: The parameter.
        finite: Whether the step happens, a bool of one element.
        block: The rows, all by default.

    Returns:
        G in M's dtype; on a device whose step does not happen M, so that M stays as it was.
    """
    M = block.of(member.momentum)
    G = masked(block.of(member.gradient), M, finite)
    if not takes_gradient(group):
        M.lerp_(G, 1 - group["momentum"])
    return G


def rule_inputs(group: dict[str, Any], members: list[Member], finite: Tensor) -> Tensor:
    """Update the momenta of members of one layout, and return the rule's inputs.

    Args:
        group: The parameter group.
        members: The members.
        finite: Whether the step happens, a bool of one element.

    Returns:
        The inputs, (members, *shape), in fp32 or wider.
    """
    momenta, beta = [m.momentum for m in members], group["momentum"]
    M = momenta[0]
    X = M.new_empty((len(members), *M.shape), dtype=accumulation_dtype(M.dtype))
    inputs = list(X.unbind())
    if X.dtype != M.dtype or isinstance(beta, Tensor) or not M.numel():
        for member, out in zip(members, inputs, strict=True):
            rule_input(group, member.momentum, update_momentum(group, member, finite), out=out)
        return X
    torch._foreach_copy_(inputs, [member.gradient for member in members])
    if M.device.type != "cpu":
        X.copy_(torch.where(finite, X, torch.stack(momenta)))
    if not takes_gradient(group):
        torch._foreach_lerp_(momenta, inputs, 1 - beta)
        if group["nesterov"]:
            torch._foreach_lerp_(inputs, momenta, beta)
        else:
            torch._foreach_copy_(inputs, momenta)
    return X


class BlockInputs:
    """Return the rule's input for blocks of a momentum, each of which is updated before its first use.

    A pass over a vocabulary reads momentum and gradient, and the momentum's own would be one more.

    Args:
        group: The parameter group.
        member: The parameter.
        finite: Whether the step happens, a bool of one element.
    """

    def __init__(self, group: dict[str, Any], member: Member, finite: Tensor) -> None:
        self.group, self.member, self.finite = group, member, finite
        self.updated: set[int] = set()  # the first rows of the blocks

    def __call__(self, block: Block, out: Tensor) -> Tensor:
        """Return `rule_input` of the block.

        Args:
            block: The rows, of a division that is the same in every call.
            out: Where the result is written, of the block's shape.
        """
        M = block.of(self.member.momentum)
        if block.rows.start in self.updated:
            return rule_input(self.group, M, masked(block.of(self.member.gradient), M, self.finite), out)
        self.updated.add(block.rows.start)
        return rule_input(self.group, M, update_momentum(self.group, self.member, self.finite, block), out)


def rule_input(group: dict[str, Any], M: Tensor, G: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the rule's input: M, with Nesterov momentum `(1−β)G + βM`, or G of `takes_gradient`.

    Args:
        group: The parameter group.
        M: The updated momentum.
        G: The gradient, same shape and dtype.
        out: Where the result is written; a new tensor if None.

    Returns:
        The input in fp32 or wider; M or G themselves where nothing is computed and `out` is None.
    """
    X = G if takes_gradient(group) else M
    if X is M and group["nesterov"]:
        into = out if out is not None and out.dtype == M.dtype else None
        X = torch.lerp(G, M, group["momentum"], out=into)
    if out is None or X is out:
        return wide(X)
    return out.copy_(X)


def masked(G: Tensor, M: Tensor, finite: Tensor) -> Tensor:
    """Return the gradient if the step happens, else M.

    Args:
        G: The gradient, or the direction that takes its place.
        M: The momentum, same shape.
        finite: Whether the step happens, a bool of one element. A CPU does not begin a step that must not happen, so
            there it is not read.

    Returns:
        G in M's dtype, or M.
    """
    G = G.to(M.dtype)
    return G if G.device.type == "cpu" else torch.where(finite, G, M)
