"""Moves of channels: neurons of MLPs and experts, ranks of latent attention."""

from collections import defaultdict

import torch
from torch import nn

from symlm.roles.recognizers.chains import layers_of_experts
from symlm.roles.recognizers.channels import TOKENS_IN_COLUMNS, blocks_of_outputs, is_mixer
from symlm.roles.recognizers.layers import is_pointwise
from symlm.roles.recognizers.shapes import is_activated_first, is_gate_and_up, scope_of
from symlm.roles.role import Role
from symlm.views.storage import view_of

OF_TOKENS = (Role.LM_HEAD, Role.CAPPED_LM_HEAD)


def channel_moves(sites, model):
    """Permute the channels of every MLP, in the layers into them and out of them together; its last may be a head."""
    scopes = defaultdict(list)
    for site, role in sites:
        role = Role.MLP_OUT if role in OF_TOKENS and isinstance(site.parent, nn.Sequential) else role
        by_layer = site.leaf.startswith(("per_layer", "o_a_proj", "o_b_proj"))
        if role in (Role.MLP_IN, Role.MLP_OUT) and len(site.shape) == 2 and not is_mixer(site.parent) and not by_layer:
            scope = site.ancestors[1] if is_gate_and_up(site.parent) else scope_of(site)
            key = (id(site.ancestors[1]), site.path[-1]) if layers_of_experts(site) else id(scope or site.parent)
            scopes[key].append((site, role))
    for members in scopes.values():
        outs = [site for site, role in members if role is Role.MLP_OUT]
        if not outs or len(members) == len(outs):
            continue
        width = outs[0].shape[int(not outs[0].transposed)]
        if any(out.shape[int(not out.transposed)] != width for out in outs):
            continue
        order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
        moved, scope = {}, scope_of(outs[0]) or outs[0].parent
        inside = {id(module) for module in scope.modules()} - {id(site.module) for site, _ in members}
        adapters = [(site, role) for site, role in sites if id(site.module) in inside and role is Role.MLP_IN]
        adapters = [(site, role) for site, role in adapters if "adapter" in site.name]
        for site, role in [*members, *adapters]:
            axis = int((role is Role.MLP_OUT) != site.transposed)
            if site.shape[axis] % width or site.shape[axis] // width > 2:
                continue
            doubled = site.shape[axis] // width == 2
            assert (site, role) in adapters or doubled == (
                blocks_of_outputs(site) is not None or (role is Role.MLP_OUT and doubled)
            ), site
            index = torch.cat([order + k * width for k in range(site.shape[axis] // width)])
            moved[site.name] = site.parameter.detach().index_select(axis, index)
            bias = getattr(site.module, "bias", None)
            if role is Role.MLP_IN and isinstance(bias, nn.Parameter):
                moved[site.name.removesuffix("weight") + "bias"] = bias.detach()[index]
        names = {id(p): name for name, p in model.named_parameters()}
        for module in scope.modules():  # the norms between the layers
            bias = getattr(module, "bias", None) if "norm" in type(module).__name__.lower() else None
            for gain in (getattr(module, "weight", None), bias):
                between = isinstance(gain, nn.Parameter) and gain.shape == (width,) and width != _stream(outs[0])
                if between and names.get(id(gain), ...) not in (..., *moved):
                    moved[names[id(gain)]] = gain.detach()[order]
        if len(moved) > 1:
            yield moved


def joined_head_moves(sites, model):
    """Permute what a layer writes for the second part of a head, of the channels that the tied embedding has not."""
    parameters = dict(model.named_parameters())
    for site, role in sites:
        if role is not Role.MLP_OUT or (type(site.parent).__name__, site.leaf) not in TOKENS_IN_COLUMNS:
            continue
        above, rows = site.name.removesuffix("dense.weight") + "transform.", len(site.parameter)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
        moved = {site.name: site.parameter.detach()[order]}
        for name in (f"{above}{part}" for part in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")):
            value = parameters[name].detach()
            moved[name] = torch.cat([value[:-rows], value[-rows:][order]])
        yield moved


def group_moves(sites):
    """Permute the channels between two convolutions over single places, within the groups of the second."""
    placed = {site.name: (site, role) for site, role in sites}
    for site, role in sites:
        before = placed.get(site.name.replace(".output.", ".intermediate."), (None, None))
        if role is not Role.MLP_OUT or not is_pointwise(site.module) or before[1] is not Role.MLP_IN:
            continue
        length, groups = site.shape[1], site.module.groups
        order = torch.randperm(length, generator=torch.Generator().manual_seed(2))
        index = torch.cat([order + k * length for k in range(groups)])
        into, bias = before[0].name, before[0].name.removesuffix("weight") + "bias"
        moved = {site.name: site.parameter.detach()[:, order], into: before[0].parameter.detach()[index]}
        yield moved | {bias: before[0].module.bias.detach()[index]}


def filter_moves(sites):
    """Permute the channels between two convolutions over single places, and in the filters of channels between them."""
    parents = defaultdict(list)
    for site, role in sites:
        if isinstance(site.module, nn.modules.conv._ConvNd) and role in (Role.MLP_IN, Role.MLP_OUT, Role.VECTOR):
            parents[id(site.parent)].append((site, role))
    for members in parents.values():
        outs = [site for site, role in members if role is Role.MLP_OUT and is_pointwise(site.module)]
        if len(outs) != 1 or all(role is not Role.MLP_IN for _, role in members):
            continue
        width = outs[0].shape[1]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
        moved = {}
        for site, _ in members:
            if site.module is not outs[0].module or site is outs[0]:
                axis = int(site is outs[0])
                index = torch.cat([order + k * width for k in range(site.shape[axis] // width)])
                moved[site.name] = site.parameter.detach().index_select(axis, index)
        yield moved


def expert_moves(sites):
    """Permute the neurons of every expert, in gate, up and down together."""
    modules = defaultdict(list)
    for site, role in sites:
        if role in (Role.EXPERT_IN, Role.EXPERT_OUT) and len(site.shape) == 3:
            modules[id(site.parent if site.leaf != site.name.rpartition(".")[2] else site.module)].append((site, role))
    for members in modules.values():
        if {role for _, role in members} != {Role.EXPERT_IN, Role.EXPERT_OUT}:
            continue
        moved = {}
        for site, role in members:
            view = view_of(site, role, "whole" if role is Role.EXPERT_IN else "transposed")
            stack = view.to_matrices(site.parameter.detach())
            order = torch.randperm(stack.shape[1], generator=torch.Generator().manual_seed(2))
            moved[site.name] = view.from_matrices(stack[:, order], site.shape)
            bias = getattr(site.module, f"{site.leaf}_bias", None)
            if role is Role.EXPERT_IN and isinstance(bias, nn.Parameter):
                pairs = view.to_matrices(
                    bias.detach()[..., None].expand(*bias.shape, stack.shape[2]).movedim(-1, 1)
                    if site.transposed
                    else bias.detach()[..., None].expand(*bias.shape, stack.shape[2])
                )
                whole = view.from_matrices(pairs[:, order], site.shape)
                moved[site.name + "_bias"] = whole[:, 0] if site.transposed else whole[..., 0]
        yield moved


LATENTS = {  # into a latent: the layer out of it, and what the norm between them may be called
    "q_a_proj": ("q_b_proj", "q_a_layernorm", "q_a_norm"),
    "kv_a_proj_with_mqa": ("kv_b_proj", "kv_a_layernorm", "kv_a_norm"),
    "wq_a": ("wq_b", "q_norm"),
    "wkv_a": ("wkv_b", "kv_norm"),
}


def low_rank_moves(sites, model):
    """Permute the rank of latent attention's projections, with the gains between the two layers."""
    parameters = dict(model.named_parameters())
    for site, role in sites:
        if role is not Role.MLP_IN or site.leaf not in LATENTS:
            continue
        above, (after_leaf, *norms) = site.name.rpartition(f"{site.leaf}.weight")[0], LATENTS[site.leaf]
        norm = next((f"{above}{n}" for n in norms if f"{above}{n}.weight" in parameters), "")
        gain, after = parameters.get(f"{norm}.weight"), parameters.get(f"{above}{after_leaf}.weight")
        if gain is None or after is None or after.shape[1] != len(gain):
            continue
        order = torch.randperm(len(gain), generator=torch.Generator().manual_seed(2))
        W, moved = site.parameter.detach(), {}
        moved[site.name] = torch.cat([W[order], W[len(gain) :]])
        bias = parameters.get(site.name.removesuffix("weight") + "bias")
        if bias is not None:
            moved[site.name.removesuffix("weight") + "bias"] = torch.cat(
                [bias.detach()[order], bias.detach()[len(gain) :]]
            )
        moved[f"{norm}.weight"] = gain.detach()[order]
        moved[f"{above}{after_leaf}.weight"] = after.detach()[:, order]
        yield moved


def first_layer_moves(sites):
    """Permute the outputs of a layer with a norm and an activation of its own, in what a gated MLP behind it reads."""
    for site, role in sites:
        if role is not Role.MLP_IN or len(site.shape) != 2 or site.transposed or not is_activated_first(site):
            continue
        rows, above = site.shape[0], site.name.removesuffix(f"{site.leaf}.weight")
        order, moved = torch.randperm(rows, generator=torch.Generator().manual_seed(2)), {}
        for name, p in site.parent.named_parameters():
            of_norm = p.ndim == 1 and "norm" in name and len(p) == rows
            if p is site.parameter or of_norm or name == f"{site.leaf}.bias":
                moved[above + name] = p.detach()[order]
            elif p.ndim == 2 and p.shape[1] == rows and "down" not in name:
                moved[above + name] = p.detach()[:, order]
        yield moved


def _stream(site):
    return site.shape[int(site.transposed)]


def per_layer_moves(sites):
    """Permute the few channels of embeddings by layer, in their table and projection, and in every layer's two."""
    gates = [site for site, _ in sites if site.leaf == "per_layer_input_gate" and site.name.endswith("weight")]
    if not gates:
        return
    width = gates[0].shape[0]
    order, moved = torch.randperm(width, generator=torch.Generator().manual_seed(2)), {}
    for site, role in sites:
        by_layer = "per_layer" in site.name
        axis = 1 if role in (Role.MLP_OUT, Role.EMBEDDING) else 0
        if not by_layer or len(site.shape) <= axis or site.shape[axis] % width:
            continue
        index = torch.cat([order + k * width for k in range(site.shape[axis] // width)])
        if len(site.shape) > 1 or site.shape[0] == width:
            moved[site.name] = site.parameter.detach().index_select(axis, index)
    yield moved


def pair_moves(sites):
    """Permute the rank between two layers with nothing between them, within each group where there are groups."""
    placed = {site.name: site for site, _ in sites}
    for site, _ in sites:
        after = placed.get(site.name.replace("_a_proj", "_b_proj")) if site.leaf.endswith("_a_proj") else None
        groups = getattr(site.module, "n_groups", 1)
        if after is None or site.leaf in ("q_a_proj", "kv_a_proj"):
            continue
        rank = site.shape[0] // groups
        order = torch.randperm(rank, generator=torch.Generator().manual_seed(2))
        index = torch.cat([order + k * rank for k in range(groups)])
        yield {
            site.name: site.parameter.detach()[index],
            after.name: after.parameter.detach()[:, index],
        }


def stream_moves(sites):
    """Permute the streams of hyper-connections: blocks of columns, and rows that are a number a stream or a pair."""
    found = [site for site, _ in sites if site.leaf in ("fn", "hc_fn")]
    if not found:
        return
    streams = min(len(site.parameter) for site in found)  # the last reads each into one
    moved = {}
    beside = {id(site.module) for site in found}
    for site, _ in sites:
        if id(site.module) not in beside or site.shape[0] not in (streams, 2 * streams, 2 * streams + streams**2):
            continue
        value = site.parameter.detach()
        parts = list(value.split(streams))
        pairs = torch.stack(parts[2:]).roll((1, 1), (0, 1)).flatten(0, 1) if len(parts) > 2 else value[:0]
        value = torch.cat([*(part.roll(1, 0) for part in parts[:2]), pairs])
        if value.ndim > 1:
            value = value.unflatten(1, (streams, -1)).roll(1, 1).flatten(1)
        moved[site.name] = value
    if moved:
        yield moved
