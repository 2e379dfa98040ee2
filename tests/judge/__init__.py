"""The judge of roles: what a role says may be moved is moved, in all layers that share it, and the loss is read."""

from itertools import chain

import torch
from numerics import LOSS_CHANGES, LOSS_STAYS

from judge.channels import (
    channel_moves,
    expert_moves,
    filter_moves,
    first_layer_moves,
    group_moves,
    joined_head_moves,
    low_rank_moves,
    pair_moves,
    per_layer_moves,
    stream_moves,
)
from judge.heads import ATTENTION, attention_moves
from judge.images import is_given_images
from judge.mixers import mixer_moves
from judge.running import gradients, loss_of, loud, renamed_rows, replaced
from judge.stream import TABLES, heads_axis, multiplies_the_stream, renamed_coordinates, rotating, sides
from symlm.roles.assignment import place
from symlm.roles.recognizers.channels import TOKENS_IN_COLUMNS
from symlm.roles.recognizers.layers import is_convolution
from symlm.roles.role import Role

__all__ = ["Judge", "attention_moves", "judged", "loss_of", "loud", "replaced"]
CHANNELS = (Role.MLP_IN, Role.MLP_OUT, Role.EXPERT_IN, Role.EXPERT_OUT)


class Judge:
    """Hold a model with loud weights, its sites, and what is known of them."""

    def __init__(self, model):
        self.model, self.base = model, loss_of(model)  # which may put other modules in place
        self.sites = place(model)
        self.roles = {site.name: role for site, role in self.sites}
        self.scale = max(1.0, abs(self.base))
        self.reached = set.intersection(*(set(gradients(model, seed)) for seed in (1, 2)))
        self.verdict = {
            site.name: "undecided" for site, _ in self.sites if sum(length > 1 for length in site.shape) > 1
        }

    def change(self, moved, **inputs):
        """Return how much the loss changes by moved values, relative."""
        with replaced(self.model, moved):
            return abs(loss_of(self.model, **inputs) - self.base) / self.scale

    def holds(self, moved):
        """Return the members of a joint move that leaves the loss, where each left out alone changes it."""
        if self.change(moved) > LOSS_STAYS:
            return None
        return {
            name
            for name in moved
            if name in self.verdict and self.change({k: v for k, v in moved.items() if k != name}) > LOSS_CHANGES
        }

    def try_all(self, alternatives):
        """Confirm the members of the joint moves that hold; members of none, whose roles claim one, are wrong."""
        claimed = {name for moved in alternatives for name in moved if self.verdict.get(name) == "undecided"}
        for moved in alternatives:
            for name in self.holds(moved) or ():
                self.verdict[name] = "right"
            if all(self.verdict[name] == "right" for name in claimed):
                return
        missed = {name for name in claimed if self.verdict[name] != "right" and name in self.reached}
        if not any(self.change(moved) < LOSS_STAYS for moved in alternatives):
            self.verdict |= {
                name: "wrong"
                for name in missed
                if self.roles[name] in (ATTENTION if len(alternatives) > 1 else CHANNELS)
            }

    def rows_are_names(self, site, role):
        """Tell whether the rows of a table, or all names of tokens, may be in another order."""
        rows = len(site.parameter)
        first = 3 * (role is Role.TIED_EMBEDDING)  # tokens that a model knows by number
        order = torch.cat([torch.arange(first), first + torch.arange(rows - first).roll(1)])
        moved = {site.name: torch.empty_like(site.parameter.detach())}
        moved[site.name][order] = site.parameter.detach()
        if role is not Role.TIED_EMBEDDING:
            with renamed_rows(site.parameter, order):
                return self.change(moved) < LOSS_STAYS < LOSS_CHANGES < self.change({})
        for name, p in self.model.named_parameters():  # biases of the logits, and other tables of tokens
            if len(p) == rows and (p.ndim == 1 or self.roles.get(name) is Role.EMBEDDING):
                moved[name] = torch.empty_like(p.detach())
                moved[name][order] = p.detach()
        for other, its in self.sites:  # the part of a head that stores its tokens in columns
            if its is Role.MLP_OUT and (type(other.parent).__name__, other.leaf) in TOKENS_IN_COLUMNS:
                moved[other.name] = torch.empty_like(other.parameter.detach())
                moved[other.name][:, order] = other.parameter.detach()
        alone = {key: value for key, value in moved.items() if key != site.name}
        return (
            self.change(moved, names=order, labels=order)
            < LOSS_STAYS
            < LOSS_CHANGES
            < self.change(alone, names=order, labels=order)
        )

    def reads_images(self, site):
        """Tell whether a filter's inputs are patches of images, which may be in any basis that it shares."""
        if not is_given_images(self.model):
            return False
        W = site.parameter.detach().flatten(1)
        normal = torch.randn(W.shape[1], W.shape[1], dtype=W.dtype, generator=torch.Generator().manual_seed(4))
        basis = torch.linalg.qr(normal)[0]
        moved = {site.name: (W @ basis.T).view_as(site.parameter)}
        try:
            return self.change(moved, pixels=basis) < LOSS_STAYS < LOSS_CHANGES < self.change({}, pixels=basis)
        except RuntimeError:  # patches of another size
            return False


def judged(model):
    """Return {parameter: "right", "wrong" or "undecided"} of a model whose weights are loud, and its roles."""
    judge = Judge(model)
    verdict, roles = judge.verdict, judge.roles
    claims = (
        channel_moves(judge.sites, model),
        expert_moves(judge.sites),
        low_rank_moves(judge.sites, model),
        first_layer_moves(judge.sites),
        per_layer_moves(judge.sites),
        pair_moves(judge.sites),
        group_moves(judge.sites),
        filter_moves(judge.sites),
        joined_head_moves(judge.sites, model),
        stream_moves(judge.sites),
        mixer_moves(judge.sites, model),
    )
    for alternatives in chain(attention_moves(judge.sites), ([moved] for moves in claims for moved in moves)):
        judge.try_all(alternatives)
    spaces(judge)
    shifts(judge)
    for name in verdict.keys() - judge.reached:
        verdict[name] = "unreached" if verdict[name] == "undecided" else verdict[name]
    return verdict, roles


def spaces(judge):
    """Judge what claims rotations or no order: tables, plain matrices on both sides; and what claims nothing."""
    turning, named = rotating(judge.model, judge.sites), set()
    for moved in renamed_coordinates(judge.sites, judge.model):
        held = judge.holds(moved)
        named |= held or set()
    widths = {site.shape[1] for site, role in judge.sites if role in TABLES}
    rigid = {site.shape[1] for site, role in judge.sites if role in TABLES and (site.name, 1) not in turning}
    for site, role in judge.sites:
        if site.name not in judge.reached or judge.verdict.get(site.name) != "undecided":
            continue
        turns = {axis for axis in range(len(site.shape)) if (site.name, axis) in turning}
        if role in TABLES and (1 in turns or site.name in named) and judge.rows_are_names(site, role):
            judge.verdict[site.name] = "right"
        if role is Role.MATRIX:
            still = [site.shape[axis] for axis in sides(site) if axis not in turns]
            fixed = site.name in named and all(any(length % width == 0 for width in rigid) for length in still)
            if not still or fixed or (sides(site)[0] in turns and judge.reads_images(site)):
                judge.verdict[site.name] = "right"
            elif widths - rigid and not is_convolution(site.module) and min(still) >= 4:
                judge.verdict[site.name] = "wrong"
        if (
            site.name in named
            and multiplies_the_stream(site, role, judge.sites)
            and any(site.shape[sides(site)[0]] % width == 0 for width in widths)
        ):
            judge.verdict[site.name] = "right"
        if role in (Role.ATTENTION_V, Role.ATTENTION_O) and heads_axis(site, role) in turns:
            judge.verdict[site.name] = "right"
        if role is Role.VECTOR and (site.name.endswith("bias") or not (turns and site.shape[-1] in widths)):
            judge.verdict[site.name] = "right"


def shifts(judge):
    """Judge one vector added to every row of heads and routers, which the loss feels or not as the role says."""
    for site, role in judge.sites:
        if role not in (Role.LM_HEAD, Role.CAPPED_LM_HEAD, Role.ROUTER, Role.SIGMOID_ROUTER) or len(site.shape) != 2:
            continue
        W, free = site.parameter.detach(), role in (Role.LM_HEAD, Role.ROUTER)
        rows = int(site.transposed)
        shift = torch.randn(W.shape[1 - rows], dtype=W.dtype, generator=torch.Generator().manual_seed(3))
        shifted = W + shift.unsqueeze(rows)
        change = judge.change({site.name: shifted})
        if change < LOSS_STAYS and not free and judge.change({site.name: shifted.flip(1 - rows)}) < LOSS_STAYS:
            continue  # a router that this loss does not reach
        judge.verdict[site.name] = "right" if (change < LOSS_STAYS) == free else "wrong"
