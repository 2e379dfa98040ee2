"""Moves of state spaces and linear attention: their heads or channels to the next place, in all that they have."""

from functools import partial

import torch

from judge.heads import rolled
from symlm.roles.recognizers.channels import blocks_of_outputs, is_mixer
from symlm.roles.recognizers.layers import heads_of
from symlm.roles.role import Role


def mixer_moves(sites, model):
    """Move the heads (or channels) of every state space or linear attention to the next place, in all that it has."""
    placed = {site.name: (site, role) for site, role in sites}
    for path, mixer in model.named_modules():
        outs = [site.shape[1] for site, role in sites if site.parent is mixer and role is Role.MLP_OUT]
        sizes = Sizes(mixer, outs[-1] if outs else 0)
        if not is_mixer(mixer) or not sizes.heads:
            continue
        moved = {}
        decays = {name: p for name, p in mixer.named_buffers() if p.ndim > 1 and p.is_floating_point()}
        for name, p in (*mixer.named_parameters(), *decays.items()):
            whole, leaf = f"{path}.{name}", name.split(".")[0]
            site, role = placed.get(whole, (None, None))
            if role is Role.MLP_OUT:
                moved[whole] = rolled(p.detach().T, sizes.heads).T.contiguous()
            elif "_a_proj" in name or ("norm" in leaf and len(p) != sizes.inner) or _is_out(placed, whole):
                continue
            elif len(p) == 1 and sizes.heads in p.shape and sizes.heads != sizes.inner:
                axis = p.shape.index(sizes.heads)
                moved[whole] = p.detach().roll(1, axis)
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

    def __init__(self, mixer, out):
        size = partial(_size_of, mixer)
        self.keys = size("num_k_heads")
        convolution = next((m for n, m in mixer.named_children() if n.startswith("conv")), None)
        channels = len(convolution.weight) if hasattr(convolution, "weight") else out
        counted = size("num_heads") or size("nheads")
        of_states = (size("n_groups") or size("ngroups")) * (size("ssm_state_size") or size("d_state"))
        self.states = of_states if counted and not self.keys else 0
        self.inner = size("value_dim") or channels - 2 * self.states
        stacked = [len(p) for p in mixer.parameters() if p.ndim == 3 and p.shape[1] == p.shape[2]]  # gates by blocks
        self.heads = self.keys or (counted if self.states else [*stacked, channels][0])
        self.convolved = [size("key_dim")] * 2 + [size("value_dim")] if self.keys else [channels]
        if not self.keys and channels == 3 * out:  # q, k and v in one convolution
            self.heads, self.convolved = counted, [out] * 3
        if not hasattr(convolution, "weight"):
            self.heads = heads_of(mixer) or channels
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
