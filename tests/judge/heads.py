"""Moves of attention: heads to the next place, or their signs, in q, k, v and o together."""

import math
import re
from collections import defaultdict

import torch
from torch import nn

from symlm.roles.recognizers.attention import core_of
from symlm.roles.recognizers.channels import is_mixer
from symlm.roles.recognizers.fused import fused_order
from symlm.roles.recognizers.layers import is_pointwise
from symlm.roles.role import Role
from symlm.views.heads import head_dim, kv_heads, shared_heads
from symlm.views.storage import view_of

OF_HEADS = re.compile(r"(q|k|v|query|key|value|kv)_?(layer_?)?(norm|ln)\d?|.*_a_(layer)?norm|kv_norm")
ATTENTION = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_O, Role.ATTENTION_QKV)


def turned(x, groups):
    """Turn the signs of the first group of heads, along the first axis: heads of ALiBi keep their places."""
    x = x.clone()
    x[: len(x) // groups] *= -1
    return x


def attention_moves(sites):
    """Yield of every attention the joint moves that its roles allow, any of which may be the model's: a list a core.

    Heads go to the next place in q, k, v and o, alone and with whatever else in the module is by heads; or the first
    head changes its sign in q and k, in v and o, or in all four, where positions or pairs tie a head to its place.
    """
    for members in cores(sites).values():
        roles = {role for _, role in members}
        if Role.ATTENTION_O not in roles or roles == {Role.ATTENTION_O}:
            continue
        try:
            groups = groups_of(members)
            groups = queries_of(members) if groups == 1 else groups  # all query heads share one head of k and v
            if groups is None or groups < 2:
                continue
            base = together(members, groups, rolled)
            flips = [
                together([(site, role) for site, role in members if role in some], groups, turned)
                for some in (ATTENTION, ATTENTION[:2], ATTENTION[2:4])
            ]
            more = [by_heads(members, sites, groups, base, *how) for how in ((0, 0), (1, 0), (0, 1))]
            gated = base | gates(members, sites, groups)
            yield [gated, *(start | moved for start in (base, gated) for moved in more), base, *filter(None, flips)]
        except (ValueError, RuntimeError):
            continue


def together(members, groups, move_groups):
    """Return what the projections of one attention become."""
    moved = {}
    rows = {role: site.shape[int(site.transposed)] for site, role in members if len(site.shape) == 2}
    q, k, v = (rows.get(role, 0) for role in ATTENTION[:3])
    for site, role in members:
        blocks = (
            site.shape[int(not site.transposed)] * k // (v * q) if role is Role.ATTENTION_O and q and k and v else 1
        )
        moved |= moved_heads(site, role, groups, move_groups, max(blocks, 1))
    return moved


def cores(sites):
    """Return {id of the module that knows the heads: its projections, with their roles}."""
    found = defaultdict(list)
    for site, role in sites:
        if role in ATTENTION and not (site.parent is not None and is_mixer(site.parent)):
            found[id(core(site))].append((site, role))
    return found


def core(site):
    """Return the module that knows the heads: that of projections which are layers, or are held as they are."""
    return site.module if site.name.rpartition(".")[2] == site.leaf else core_of(site)


def gates(members, sites, groups):
    """Return what else is by heads at first sight: output gates, sinks, filters."""
    middle, moved = core(members[0][0]), {}
    for site, role in sites:
        if site.parent is middle and role is Role.MLP_IN and "a_proj" not in site.leaf:
            moved |= moved_heads(site, Role.ATTENTION_Q, groups, rolled)
        filters = site.parent is middle and len(site.shape) > 2 and site.shape[0] == groups
        numbers = site.module is middle and len(site.shape) == 1 and site.shape[0] % groups == 0
        if filters or numbers:
            moved[site.name] = rolled(site.parameter.detach(), groups)
    return moved


def by_heads(members, sites, groups, base, every, norms):
    """Return what the module has beside q, k, v and o, moved along axes as long as heads are, or that they divide."""
    moved, inside = {}, {id(module) for module in core(members[0][0]).modules()}
    widths = {site.shape[inputs_axis(site, role)] for site, role in members}
    lengths = {groups, queries_of(members)} | {
        math.prod(site.shape) // site.shape[inputs_axis(site, role)] for site, role in members
    }
    for site, _ in sites:
        if id(site.module) not in inside or site.name in base or is_of_stream(site, members, norms):
            continue
        axes = [axis for axis, length in enumerate(site.shape) if length in lengths and length not in widths]
        if every and (len(site.shape) > 1 or site.name.endswith("bias")):
            axes = [axis for axis, length in enumerate(site.shape) if length % groups == 0 and length not in widths]
        if not axes and len(site.shape) == 1 and site.shape[0] in lengths:
            axes = [0]
        value = site.parameter.detach()
        for axis in axes:
            value = rolled(value.movedim(axis, 0), groups).movedim(0, axis)
        if axes:
            moved[site.name] = value.contiguous()
    return moved


def inputs_axis(site, role):
    """Return the axis of a projection that is the stream."""
    if type(site.module).__name__.endswith("Experts"):
        return 2 - (role is Role.ATTENTION_O)
    if len(site.shape) == 3 and not is_pointwise(site.module):
        return 0
    return int((role is not Role.ATTENTION_O) != site.transposed)


def is_of_stream(site, members, norms):
    """Tell whether a vector is a norm of the stream, or the bias of what writes it."""
    outputs = {
        id(other.module) for other, role in members if role is Role.ATTENTION_O and other.name.endswith("weight")
    }
    norm = not norms and bool(site.path) and "norm" in site.path[-1].lower() and not OF_HEADS.fullmatch(site.path[-1])
    return len(site.shape) == 1 and (norm or id(site.module) in outputs)


def groups_of(members):
    """Return the number of heads of k and v: groups of query heads share one."""
    for site, role in members:
        if role in (Role.ATTENTION_K, Role.ATTENTION_V) and len(site.shape) == 3 and not is_pointwise(site.module):
            return site.shape[1]
        if role in (Role.ATTENTION_K, Role.ATTENTION_V):
            return site.shape[int(site.transposed)] // head_dim(site, role)
        if role is Role.ATTENTION_QKV and fused_order(site) in ("heads of k v", "heads of q gate"):
            return view_of(site, role, "heads").shape(site.shape)[0] // 2 or None
        if role is Role.ATTENTION_QKV:
            heads = site.shape[int(site.transposed)] // head_dim(site, role)
            order = fused_order(site)
            if order == "four of q v k":
                return heads // 3
            if order in ("heads of q k v", "groups of q k v"):
                return kv_heads(site) if order.startswith("groups") else heads // 3
            return heads // 2 if order == "k v" else shared_heads(site, heads)
    return None


def queries_of(members):
    """Return the number of query heads."""
    for site, role in members:
        if role is Role.ATTENTION_O and len(site.shape) == 3 and not is_pointwise(site.module):
            return site.shape[1]
        if role is Role.ATTENTION_O:
            return site.shape[int(not site.transposed)] // head_dim(site, role)
    return None


def rolled(x, groups):
    """Move every group of heads to the place of the next, along the first axis."""
    return x.unflatten(0, (groups, -1)).roll(1, 0).flatten(0, 1)


def moved_heads(site, role, groups, move_groups, blocks=1):
    """Return {name: moved} of one projection and its bias."""
    W = site.parameter.detach()
    if is_pointwise(site.module):
        W = W.flatten(1)
    if W.ndim == 3 and type(site.module).__name__.endswith("Experts"):
        axis = 1 + (role is Role.ATTENTION_O)
        return {site.name: move_groups(W.movedim(axis, 0), groups).movedim(0, axis).contiguous()}
    if W.ndim == 3:  # stored [d, heads, head_dim]
        return {site.name: move_groups(W.movedim(1, 0), groups).movedim(0, 1).contiguous()}
    rows = role is not Role.ATTENTION_O
    bias = getattr(site.module, site.name.rpartition(".")[2].removesuffix("weight") + "bias", None)
    move = by_order(site, role, groups, move_groups)
    axis = int(rows == site.transposed)
    W = W.movedim(axis, 0)
    W = W.unflatten(0, (blocks, -1)) if blocks > 1 else W[None]  # of heads and of something else by heads
    moved = {site.name: torch.cat([move(part) for part in W]).movedim(0, axis).reshape(site.shape)}
    if rows and isinstance(bias, nn.Parameter) and site.name.endswith("weight"):
        moved[site.name.removesuffix("weight") + "bias"] = move(bias.detach())
    return moved


def by_order(site, role, groups, move_groups):
    """Return the function that moves the outputs (for o: the inputs) of a projection by heads."""
    order = fused_order(site) if role is Role.ATTENTION_QKV else None
    if order in (None, "heads of q k v", "groups of q k v", "heads of k v", "heads of q gate"):
        return lambda x: move_groups(x, groups)
    if order == "four of q v k":
        width = head_dim(site, role)

        def four(x):
            y = x.unflatten(0, (4, 3, -1, width)).transpose(0, 1).flatten(1, 2)  # (q v k), heads, width
            parts = [move_groups(part.flatten(0, 1), y.shape[1]).view_as(part) for part in y]
            return torch.stack(parts).unflatten(1, (4, -1)).transpose(0, 1).flatten(0, 3)

        return four
    width = head_dim(site, role)

    def in_sequence(x):
        heads = len(x) // width
        if heads == groups + 2 and order != "k v":  # one head of k and of v
            return torch.cat([move_groups(x[: groups * width], groups), x[groups * width :]])
        blocks = [groups, groups] if order == "k v" else [heads - 2 * groups, groups, groups]
        return torch.cat([move_groups(part, groups) for part in x.split([b * width for b in blocks])])

    return in_sequence
