"""Moves of whole spaces: what rotates together, found from one gradient, and the names of the stream's coordinates."""

from collections import defaultdict
from contextlib import contextmanager

import torch
from numerics import MEMBER, STILL, TURNS
from torch import nn

from judge.heads import ATTENTION, OF_HEADS, core, cores
from judge.running import gradients, reads_given_states, tensors_of
from symlm.roles.recognizers.channels import is_mixer
from symlm.roles.recognizers.layers import is_convolution
from symlm.roles.role import Role
from symlm.views.heads import head_dim

READS = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_QKV, Role.MLP_IN, Role.EXPERT_IN)
READS += (Role.LM_HEAD, Role.CAPPED_LM_HEAD, Role.ROUTER, Role.SIGMOID_ROUTER)
WRITES = (Role.ATTENTION_O, Role.MLP_OUT, Role.EXPERT_OUT)
TABLES = (Role.EMBEDDING, Role.TIED_EMBEDDING)


def sides(site):
    """Return the axes of a matrix's outputs and inputs."""
    if len(site.shape) == 3 and not isinstance(site.module, nn.modules.conv._ConvNd):
        return (2, 1) if site.transposed else (1, 2)
    return (1, 0) if site.transposed else (0, 1)


def rotating(model, sites):
    """Return {(name, axis)} of the axes that some rotation moves, with others or alone, and leaves the loss.

    A rotation exp(tA) of the axes S leaves the loss if the sum over S of the skew part of W ∂L/∂Wᵀ, along the axis, is
    zero. What multiplies coordinates one by one is made equal for it, and the rotations fix (1, ..., 1), as a mean
    needs it. Of v and o the heads are axes of their own, and all of them have to turn.
    """
    with even_gains(model):
        batches = [gradients(model, seed) for seed in (1, 2, 3)]
    spaces, widths = defaultdict(dict), {site.shape[1] for site, role in sites if role in TABLES}
    for name, p in tensors_of(model).items():
        if name in batches[0] and name in batches[1] and name in batches[2]:
            for axis, length in enumerate(p.shape):
                spaces[length][name, axis] = skew(p, [grads[name] for grads in batches], axis)
            for axis, width in joined(p, widths):
                for inner, sizes in enumerate(((-1, width), (width, -1))):  # one after the other, or in turn
                    for k, part in enumerate(p.unflatten(axis, sizes).unbind(axis + inner)):
                        pieces = [grads[name].unflatten(axis, sizes).select(axis + inner, k) for grads in batches]
                        spaces[width][name, axis, inner, k] = skew(part, pieces, axis)
    turned = {key for space in spaces.values() for key in _dependent(space)}
    turning = {key for key in turned if len(key) == 2}
    turning |= whole_of(turned, [key for space in spaces.values() for key in space if len(key) > 2])
    for members in cores(sites).values():
        heads = {}
        for site, role in members:
            if role not in (Role.ATTENTION_V, Role.ATTENTION_O) or not all(site.name in grads for grads in batches):
                continue
            axis = heads_axis(site, role)
            for k, part in enumerate(parts_of(site, role, axis)):
                slices = [(slice(None),) * axis + (part,)]
                heads[site.name, axis, k] = skew(
                    site.parameter.detach()[slices[0]],
                    [grads[site.name][slices[0]] for grads in batches],
                    axis,
                    mean=False,
                )
        turning |= whole_of(set(_dependent(heads)), heads)
    return turning


def whole_of(turned, parts):
    """Return the axes all of whose parts turn."""
    missed = {key[:-1] for key in parts if key not in turned}
    return {key[:2] for key in parts if key[:-1] not in missed}


def joined(p, widths):
    """Yield (axis, width) of the axes along which several states of one width stand."""
    for axis, length in enumerate(p.shape):
        fits = [width for width in widths if length not in widths and length % width == 0 and length // width <= 8]
        if p.ndim > 1 and fits:
            yield axis, max(fits)


def heads_axis(site, role):
    """Return the axis of v or o along which its heads are."""
    return sides(site)[int(role is Role.ATTENTION_O)] if len(site.shape) == 2 else 1


def parts_of(site, role, axis):
    """Return the slices of an axis that are heads; none where nothing says how wide a head is."""
    try:
        width = head_dim(site, role)
    except ValueError:
        return []
    return [slice(k, k + width) for k in range(0, site.shape[axis], width)] if len(site.shape) == 2 else []


def skew(value, gradients_of_it, axis, mean=True):
    """Return the skew part of W ∂L/∂Wᵀ along an axis, of every batch, relative to the first's size."""
    length = value.shape[axis]
    if not 4 <= length <= 256:
        return value.new_zeros(0)
    whole = value.detach().movedim(axis, 0).reshape(length, -1)
    around = torch.eye(length, dtype=value.dtype) - mean / length
    upper = torch.triu_indices(length, length, 1)
    parts = []
    for gradient in gradients_of_it:
        M = around @ whole @ gradient.movedim(axis, 0).reshape(length, -1).T @ around
        parts.append((M - M.T)[upper[0], upper[1]])
    return torch.cat(parts) / (whole.norm() * gradients_of_it[0].norm())


def _dependent(columns):
    """Yield the columns that others, or nothing, add to zero."""
    sizes = {key: column.norm() for key, column in columns.items() if len(column)}
    yield from (key for key, size in sizes.items() if size < STILL)
    long = {key: column / sizes[key] for key, column in columns.items() if sizes.get(key, 0) >= STILL}
    if not long or len(next(iter(long.values()))) < 2 * len(long):
        return
    _, values, rows = torch.linalg.svd(torch.stack(list(long.values()), 1), full_matrices=False)
    null = rows[values < TURNS * values[0]]
    yield from (key for k, key in enumerate(long) if null[:, k].norm() > MEMBER)


@contextmanager
def even_gains(model):
    """Make equal, for a while, what multiplies coordinates one by one: gains, mixes, scales."""
    gains = [
        p
        for name, p in model.named_parameters()
        if sum(length > 1 for length in p.shape) == 1 and "bias" not in name.rpartition(".")[2]
    ]
    before = [p.detach().clone() for p in gains]
    with torch.no_grad():
        for p in gains:
            p.fill_(p.mean())
    yield
    with torch.no_grad():
        for p, value in zip(gains, before, strict=True):
            p.copy_(value)


def renamed_coordinates(sites, model):
    """Yield, for every width of the stream, all that reads or writes it with its coordinates in another order."""
    ends = (*TABLES, Role.LM_HEAD, Role.CAPPED_LM_HEAD)
    widths = {site.shape[1] for site, role in sites if role in ends}
    config = model.config.get_text_config()
    widths |= {size for name in ("hidden_size", "d_model", "n_embd") if (size := getattr(config, name, 0))}
    tensors = tensors_of(model)
    for width in sorted(widths):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(5))
        moved = {}
        for name, axes in coordinates(sites, tensors, width).items():
            if reads_given_states(name, model):
                continue
            value = tensors[name].detach()
            for axis in axes:
                states = range(value.shape[axis] // width)
                value = value.index_select(axis, torch.cat([order + k * width for k in states]))
            moved[name] = value
        for name, p in model.named_parameters():  # in front of a head, the channels that a narrower embedding has
            if "predictions.transform." in name and len(p) > width and name not in moved:
                moved[name] = torch.cat([p.detach()[:width][order], p.detach()[width:]])
        yield moved


def coordinates(sites, tensors, width):
    """Return {name: axes along the stream}, by what the roles claim."""
    placed = {site.name: (site, role) for site, role in sites}
    axes = {
        name: [value.ndim - 1] for name, value in tensors.items() if name not in placed and value.shape[-1] == width
    }
    for site, role in sites:
        if len(site.shape) < 2:
            continue
        out, into = sides(site)
        if role in TABLES:
            axes[site.name] = [1] * (site.shape[1] == width)
        elif role is Role.VECTOR:
            last = len(site.shape) - 1
            axes[site.name] = [
                axis for axis in (0 if is_convolution(site.module) else last,) if site.shape[axis] == width
            ]
        else:
            reads = role not in WRITES and site.shape[into] % width == 0
            factors = multiplies_the_stream(site, role, sites)
            joined_states = (role in WRITES or factors) and site.shape[out] % width == 0
            writes = (joined_states or site.shape[out] == width) and (role not in READS or factors)
            axes[site.name] = [into] * reads + [out] * writes
    attentions = {id(core(site)) for site, role in sites if role in ATTENTION}
    for site, role in sites:
        if role is not Role.VECTOR or id(site.module) in attentions or is_mixer(site.module):
            continue
        weight = site.name.rpartition(".")[0] + ".weight"
        layer = placed.get(weight, (None, None))[0]
        of_layer = layer is not None and site.name.endswith("bias") and len(layer.shape) > 1
        states = 8 if of_layer or (site.path and "norm" in site.path[-1]) else 1
        if len(site.shape) != 1 or len(site.parameter) % width or len(site.parameter) > states * width:
            continue
        of_heads = bool(site.path and OF_HEADS.fullmatch(site.path[-1]))
        axes[site.name] = [0] * (sides(layer)[0] in axes[weight] if of_layer else not of_heads)
    return {name: mine for name, mine in axes.items() if mine}


def multiplies_the_stream(site, role, sites):
    """Tell whether the outputs of a layer into channels are factors of the stream's, or of a tied head's inputs."""
    if role is not Role.MLP_IN or (site.parent is not None and is_mixer(site.parent)):
        return False
    beside = [(other, its) for other, its in sites if other.parent is site.parent]
    rows = site.shape[sides(site)[0]]
    used = any(its is Role.MLP_OUT and other.shape[sides(other)[1]] == rows for other, its in beside)
    return not used and not any(its in ATTENTION for _, its in beside)
