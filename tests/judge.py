"""The judge of roles: what a role says may be moved is moved, in all layers that share it, and the loss is read."""

from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from torch import nn

from symlm.roles.assignment import place
from symlm.roles.recognizers.attention import core_of, fused_order
from symlm.roles.recognizers.channels import _scope, blocks_of_outputs, is_mixer
from symlm.roles.role import Role
from symlm.views.heads import head_dim, kv_heads, shared_heads
from symlm.views.storage import view_of

ATTENTION = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_O, Role.ATTENTION_QKV)


@contextmanager
def in_double():
    """Let nothing leave float64: models cast norms, softmaxes and logits to fp32."""
    to, float_ = torch.Tensor.to, torch.Tensor.float
    softmax = nn.functional.softmax

    def stays(self, *args, **kwargs):
        narrow = [x for x in (*args, *kwargs.values()) if x in (torch.float32, torch.bfloat16, torch.float16)]
        if self.dtype == torch.float64 and narrow:
            args = tuple(torch.float64 if x in narrow else x for x in args)
            kwargs = {key: torch.float64 if x in narrow else x for key, x in kwargs.items()}
        return to(self, *args, **kwargs)

    def soft(x, dim=None, _stacklevel=3, dtype=None):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    cast = torch.Tensor.type

    def keeps(self, dtype=None, **kwargs):
        return self if self.dtype == torch.float64 and dtype == torch.float32 else cast(self, dtype, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "to", stays),
        mock.patch.object(torch.Tensor, "type", keeps),
        mock.patch.object(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else float_(x)),
        mock.patch.object(nn.functional, "softmax", soft),
        mock.patch.object(torch, "softmax", lambda x, dim, dtype=None: soft(x, dim)),
    ):
        yield


def loud(model, seed=0):
    """Make every weight matter, in float64: fresh matrices of RMS 0.3, vectors near their values."""
    torch.manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.is_floating_point():
                p.copy_(0.3 * torch.randn_like(p))
            elif p.is_floating_point():
                p.add_(0.2 * torch.randn_like(p))
    return model


def loss_of(model, length=12, names=None, labels=None):
    ids = torch.randint(
        3, model.config.get_text_config().vocab_size, (2, length), generator=torch.Generator().manual_seed(1)
    )
    if model.config.is_encoder_decoder and getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = 0
    with torch.no_grad(), in_double():
        cached = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
        inputs, targets = (ids if order is None else order[ids] for order in (names, labels))
        return model(input_ids=inputs, labels=targets, **cached).loss.double().item()


def turned(x, groups):
    """Turn the signs of the first group of heads, along the first axis: heads of ALiBi keep their places."""
    x = x.clone()
    x[: len(x) // groups] *= -1
    return x


def attention_moves(sites, move_groups):
    """Move the heads of every attention, q, k, v and o together: {core: {site name: moved}}."""
    cores = defaultdict(list)
    for site, role in sites:
        if role in ATTENTION and not (site.parent is not None and is_mixer(site.parent)) and len(site.shape) == 2:
            cores[id(core_of(site))].append((site, role))
    for members in cores.values():
        moved = {}
        if {Role.ATTENTION_O} == {role for _, role in members} or Role.ATTENTION_O not in {role for _, role in members}:
            continue
        try:
            groups = groups_of(members)
            if groups == 1:  # all query heads share one head of k and v
                groups = queries_of(members)
            if groups is None or groups < 2:
                continue
            for site, role in members:
                moved |= moved_heads(site, role, groups, move_groups)
            if move_groups is rolled:  # what else is by heads: output gates and sinks
                core = core_of(members[0][0])
                for site, role in sites:
                    if site.parent is core and role is Role.MLP_IN and "a_proj" not in site.leaf:
                        moved |= moved_heads(site, Role.ATTENTION_Q, groups, move_groups)
                    filters = site.parent is core and len(site.shape) > 2 and site.shape[0] == groups
                    numbers = site.module is core and len(site.shape) == 1 and site.shape[0] % groups == 0
                    if filters or numbers:
                        moved[site.name] = rolled(site.parameter.detach(), groups)
        except (ValueError, RuntimeError):
            continue
        yield moved


def groups_of(members):
    """Return the number of heads of k and v: groups of query heads share one."""
    for site, role in members:
        if role in (Role.ATTENTION_K, Role.ATTENTION_V):
            return site.shape[int(site.transposed)] // head_dim(site, role)
        if role is Role.ATTENTION_QKV and fused_order(site) == "heads of k v":
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
        if role is Role.ATTENTION_O:
            return site.shape[int(not site.transposed)] // head_dim(site, role)
    return None


def rolled(x, groups):
    """Move every group of heads to the place of the next, along the first axis."""
    return x.unflatten(0, (groups, -1)).roll(1, 0).flatten(0, 1)


def moved_heads(site, role, groups, move_groups):
    """Return {name: moved} of one projection and its bias."""
    W = site.parameter.detach()
    rows = role is not Role.ATTENTION_O
    bias = getattr(site.module, "bias", None)
    move = by_order(site, role, groups, move_groups)
    axis = int(rows == site.transposed)
    moved = {site.name: move(W.movedim(axis, 0)).movedim(0, axis).contiguous()}
    if rows and isinstance(bias, nn.Parameter) and site.name.endswith("weight"):
        moved[site.name.removesuffix("weight") + "bias"] = move(bias.detach())
    return moved


def by_order(site, role, groups, move_groups):
    """Return the function that moves the outputs (for o: the inputs) of a projection by heads."""
    order = fused_order(site) if role is Role.ATTENTION_QKV else None
    if order in (None, "heads of q k v", "groups of q k v", "heads of k v"):
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
        if heads == groups + 2:  # one head of k and of v
            return torch.cat([move_groups(x[: groups * width], groups), x[groups * width :]])
        blocks = [groups, groups] if order == "k v" else [heads - 2 * groups, groups, groups]
        return torch.cat([move_groups(part, groups) for part in x.split([b * width for b in blocks])])

    return in_sequence


def channel_moves(sites, model):
    """Permute the channels of every MLP, in the layers into them and out of them together."""
    scopes = defaultdict(list)
    for site, role in sites:
        if role in (Role.MLP_IN, Role.MLP_OUT) and len(site.shape) == 2 and not is_mixer(site.parent):
            scope = _scope(site)
            scopes[id(scope if scope is not None else site.parent)].append((site, role))
    for members in scopes.values():
        outs = [site for site, role in members if role is Role.MLP_OUT]
        if len(outs) != 1 or len(members) < 2:
            continue
        width = outs[0].shape[int(not outs[0].transposed)]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
        moved = {}
        for site, role in members:
            axis = int((role is Role.MLP_OUT) != site.transposed)
            if site.shape[axis] % width or site.shape[axis] // width > 2:
                continue
            doubled = site.shape[axis] // width == 2
            assert doubled == (blocks_of_outputs(site) is not None or (role is Role.MLP_OUT and doubled)), site
            index = torch.cat([order + k * width for k in range(site.shape[axis] // width)])
            moved[site.name] = site.parameter.detach().index_select(axis, index)
            bias = getattr(site.module, "bias", None)
            if role is Role.MLP_IN and isinstance(bias, nn.Parameter):
                moved[site.name.removesuffix("weight") + "bias"] = bias.detach()[index]
        scope = _scope(outs[0]) or outs[0].parent
        names = {id(p): name for name, p in model.named_parameters()}
        for module in scope.modules():  # the gains of a norm between the layers
            gain = getattr(module, "weight", None)
            if (
                isinstance(gain, nn.Parameter)
                and gain.shape == (width,)
                and id(gain) in names
                and width != _stream(outs[0])
            ):
                moved[names[id(gain)]] = gain.detach()[order]
        if len(moved) > 1:
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


def mixer_moves(sites, model):
    """Move the heads (or channels) of every state space or linear attention to the next place, in all that it has."""
    placed = {site.name: (site, role) for site, role in sites}
    for path, mixer in model.named_modules():
        sizes = Sizes(mixer)
        if not is_mixer(mixer) or not sizes.heads:
            continue
        moved = {}
        for name, p in mixer.named_parameters():
            whole, leaf = f"{path}.{name}", name.split(".")[0]
            site, role = placed.get(whole, (None, None))
            if role is Role.MLP_OUT:
                moved[whole] = rolled(p.detach().T, sizes.heads).T.contiguous()
            elif ("norm" in leaf and len(p) != sizes.inner) or _is_out(placed, whole):
                continue
            elif blocks := sizes.blocks(leaf, len(p), site):
                parts = [
                    rolled(part, sizes.heads) if moves else part
                    for part, moves in zip(
                        p.detach().split([n for n, _ in blocks]), [m for _, m in blocks], strict=True
                    )
                ]
                moved[whole] = torch.cat(parts)
        yield moved


def _is_out(placed, name):
    """Tell whether a bias is that of a layer out of the channels."""
    return name.endswith(".bias") and placed.get(name.removesuffix("bias") + "weight", (None, None))[1] is Role.MLP_OUT


class Sizes:
    """Hold how many heads a mixer has, how wide its channels are, and which parts of its outputs are by heads."""

    def __init__(self, mixer):
        size = partial(_size_of, mixer)
        self.keys = size("num_k_heads")
        convolution = next((m for n, m in mixer.named_children() if n.startswith("conv")), None)
        channels = len(convolution.weight) if hasattr(convolution, "weight") else 0
        self.states = size("n_groups") * size("ssm_state_size") if size("num_heads") and not self.keys else 0
        self.inner = size("value_dim") or channels - 2 * self.states
        stacked = [len(p) for p in mixer.parameters() if p.ndim == 3 and p.shape[1] == p.shape[2]]  # gates by blocks
        self.heads = self.keys or (size("num_heads") if self.states else [*stacked, channels][0])
        self.convolved = [size("key_dim")] * 2 + [size("value_dim")] if self.keys else [channels]
        if self.states:
            self.convolved = [self.inner, self.states, self.states]

    def blocks(self, leaf, rows, site):
        """Return (length, whether it moves) of the blocks of a tensor's first axis."""
        found = (
            blocks_of_outputs(site)
            if site is not None and len(site.shape) == 2 and leaf.startswith("in_proj")
            else None
        )
        if found and found.axis == "m":
            lengths = found.sizes["m"]
        elif found and found.axis == "(p m)":
            lengths = [rows // found.sizes["p"][0]] * found.sizes["p"][0]
        elif leaf.startswith("conv"):
            lengths = self.convolved
        else:
            lengths = [rows]
        stay = {len(lengths) - 3, len(lengths) - 2} if found else {1, 2}  # B and C, which all heads share
        flags = [not (self.states and len(lengths) > 2 and place in stay) for place in range(len(lengths))]
        if sum(lengths) != rows or any(n % self.heads for n, moves in zip(lengths, flags, strict=True) if moves):
            return None
        return list(zip(lengths, flags, strict=True))


def _size_of(module, name):
    value = getattr(module, name, 0)
    return value if isinstance(value, int) else 0


def low_rank_moves(sites, model):
    """Permute the rank of latent attention's projections, with the gains between the two layers."""
    parameters = dict(model.named_parameters())
    for site, role in sites:
        if role is not Role.MLP_IN or site.leaf not in ("q_a_proj", "kv_a_proj_with_mqa"):
            continue
        above, stem = site.name.rpartition(f"{site.leaf}.weight")[0], site.leaf.split("_")[0]
        gain, after = (
            parameters.get(f"{above}{stem}_a_layernorm.weight"),
            parameters.get(f"{above}{stem}_b_proj.weight"),
        )
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
        moved[f"{above}{stem}_a_layernorm.weight"] = gain.detach()[order]
        moved[f"{above}{stem}_b_proj.weight"] = after.detach()[:, order]
        yield moved


def _stream(site):
    return site.shape[int(site.transposed)]


def shifts(sites):
    """Add one vector to every row of each head and router: (name, moved, whether the role says that it is free)."""
    for site, role in sites:
        if role in (Role.LM_HEAD, Role.CAPPED_LM_HEAD, Role.ROUTER, Role.SIGMOID_ROUTER) and len(site.shape) == 2:
            W = site.parameter.detach()
            shift = torch.randn(W.shape[1], dtype=W.dtype, generator=torch.Generator().manual_seed(3))
            yield site.name, {site.name: W + shift}, role in (Role.LM_HEAD, Role.ROUTER)


def renamed_tokens(model, sites, base):
    """Yield the tables of tokens, where another name for every token, and rows moved alike, leave the loss alone."""
    tables = [model.get_input_embeddings()]
    weight = getattr(tables[0], "weight", None)
    named = [(site, role) for site, role in sites if site.parameter is weight]
    if not named or len(weight) != model.config.get_text_config().vocab_size:
        return
    site, tied = named[0][0], named[0][1] is Role.TIED_EMBEDDING
    order = torch.cat(
        [torch.arange(3), 3 + torch.randperm(len(weight) - 3, generator=torch.Generator().manual_seed(4))]
    )
    moved = torch.empty_like(weight.detach())
    moved[order] = weight.detach()
    with replaced(model, {site.name: moved}):
        if not tied and abs(loss_of(model, names=order) - base) < 1e-9:
            yield site.name
        if tied and abs(loss_of(model, names=order, labels=order) - base) < 1e-9:
            yield site.name


@contextmanager
def replaced(model, moved):
    """Put moved values in place for a while."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in moved}
    with torch.no_grad():
        for name, value in moved.items():
            parameters[name].copy_(value)
        yield
        for name, value in before.items():
            parameters[name].copy_(value)


def judged(model):
    """Return {parameter: "right", "wrong" or "undecided"} of the matrices of a model whose weights are loud."""
    sites = place(model)
    roles = {site.name: role for site, role in sites}
    verdict = {site.name: "undecided" for site, _ in sites if len(site.shape) >= 2}
    base = loss_of(model)
    scale = max(1.0, abs(base))
    kinds = (
        partial(attention_moves, move_groups=rolled),
        partial(attention_moves, move_groups=turned),
        partial(channel_moves, model=model),
    )
    kinds += (expert_moves, partial(low_rank_moves, model=model), partial(mixer_moves, model=model))
    for moves in kinds:
        for moved in moves(sites):
            with replaced(model, moved):
                together = abs(loss_of(model) - base) / scale
            for name in (name for name in moved if name in verdict):
                with replaced(model, {key: value for key, value in moved.items() if key != name}):
                    apart = abs(loss_of(model) - base) / scale
                if together > 1e-9:
                    claims = moves is not kinds[0] or roles[name] in ATTENTION  # a gate may have other partners too
                    verdict[name] = "wrong" if verdict[name] == "undecided" and claims else verdict[name]
                elif apart > 1e-7:
                    verdict[name] = "right"
    for name in renamed_tokens(model, sites, base):
        verdict[name] = "right"
    for name, moved, is_free in shifts(sites):
        with replaced(model, moved):
            change = abs(loss_of(model) - base) / scale
        if change < 1e-9 and not is_free:
            with replaced(model, {key: W.flip(-1) for key, W in moved.items()}):
                if abs(loss_of(model) - base) / scale < 1e-9:
                    continue  # a router that this loss does not reach
        verdict[name] = "right" if (change < 1e-9) == is_free else "wrong"
    return verdict, roles
