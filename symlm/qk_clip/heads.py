"""Which outputs of which tensors make the query and the key of each head of an attention."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from symlm.roles.assignment import place
from symlm.roles.recognizers.attention import core_of, is_value_too
from symlm.roles.recognizers.fused import fused_order
from symlm.roles.role import Role, Site
from symlm.roles.storage import whole_shape
from symlm.views.heads import head_dim, kv_heads, query_heads, shared_heads

MAKES_LOGITS = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_QKV)
QUERY_NORMS = ("q_norm", "query_norm", "norm_q", "q_layernorm", "q_ln", "query_layernorm", "q_b_norm", "qk_norm")
KEY_NORMS = ("k_norm", "key_norm", "norm_k", "k_layernorm", "k_ln", "key_layernorm", "qk_norm")


@dataclass(frozen=True)
class ScaledTensor:
    """Locate a tensor, and say which factor each of its outputs is multiplied by.

    Args:
        name: The full name.
        module: The module that holds it.
        leaf: Its name there.
        factors: For each output an index of `Attention.factors`.
        axis: The axis of the outputs.
        offset: What is added to the tensor where it is used: 1 for gains stored as their difference from 1.
    """

    name: str
    module: nn.Module
    leaf: str
    factors: Tensor
    axis: int = 0
    offset: float = 0.0

    @property
    def parameter(self) -> Tensor:
        """The tensor, as the module holds it now: FSDP2 replaces parameters."""
        return getattr(self.module, self.leaf)

    def by_entries(self, factors: Tensor) -> Tensor:
        """Return the factors of the outputs in a shape that multiplies the whole tensor.

        Args:
            factors: `Attention.factors`.
        """
        shape = whole_shape(self.parameter)
        spread = [-1 if axis == self.axis else 1 for axis in range(len(shape))]
        return factors[self.factors.to(factors.device)].view(spread)


@dataclass
class Attention:
    """Describe an attention whose logits can be scaled.

    Args:
        name: The full name of its module.
        module: The module that attends.
        queries: The number of query heads.
        keys: The number of key heads, each shared by a group of query heads.
        tensors: What is scaled.
    """

    name: str
    module: nn.Module
    queries: int
    keys: int
    tensors: list[ScaledTensor] = field(default_factory=list)

    def factors(self, gamma: Tensor) -> Tensor:
        """Return all factors that outputs are multiplied by, where the logits of head h shall be by γ_h.

        Args:
            gamma: γ of the query heads, (queries,), at most 1.

        Returns:
            `√γ` of the query heads, `√min γ` over the group of each key head, `γ` of the query heads, `√min γ` over
            all heads, and 1: (2·queries + keys + 2,).
        """
        of_groups = gamma.view(self.keys, -1).amin(1)
        return torch.cat([gamma.sqrt(), of_groups.sqrt(), gamma, gamma.amin()[None].sqrt(), gamma.new_ones(1)])

    @property
    def all_heads(self) -> int:
        """The index of the factor of what all heads share."""
        return 2 * self.queries + self.keys

    @property
    def untouched(self) -> int:
        """The index of the factor 1."""
        return self.all_heads + 1


def attentions(model: nn.Module, roles: dict[str, str] | None = None) -> list[Attention]:
    """Return the attentions of a model whose queries or keys can be scaled.

    Args:
        model: The model.
        roles: Roles of parameters whose role the structure does not show, as `symlm.assign_roles` takes them.

    Raises:
        ValueError: No attention has queries and keys with trained projections or gains.
    """
    projections: dict[int, list[tuple[Site, Role]]] = {}
    for site, role in place(model, roles):
        if role in MAKES_LOGITS and len(site.shape) == 2 and not is_value_too(site):
            projections.setdefault(id(core_of(site)), []).append((site, role))
    names = {id(module): name for name, module in model.named_modules()}
    found = [_attention(names, some) for some in projections.values()]
    if not (scaled := [attention for attention in found if attention and attention.tensors]):
        raise ValueError(
            f"{type(model).__name__} has no attention whose queries and keys QKClip can scale: their projections are "
            "not known, not trained, or normalized without gains, which bounds the logits; assign the roles "
            "attention_q and attention_k where you know better (roles=...), or train without it"
        )
    return scaled


def _attention(names: dict[int, str], sites: list[tuple[Site, Role]]) -> Attention | None:
    """Return the attention of projections that stand together; None where none of them makes queries."""
    core = core_of(sites[0][0])
    layouts = [(site, *_outputs(site, role)) for site, role in sites]
    queries = max(count for _, _, count, _ in layouts)
    if core is None or not queries:
        return None
    keys = max((count for _, _, _, count in layouts), default=0)
    attention = Attention(names[id(core)], core, queries, keys or queries)
    normed = {kind: _norm(core, kinds) for kind, kinds in (("q", QUERY_NORMS), ("k", KEY_NORMS))}
    if normed["q"] is normed["k"]:  # one norm of both is scaled once for both
        normed["k"] = None
    if not any(normed.values()):
        for site, outputs, _, _ in layouts:
            attention.tensors.extend(_projection(attention, names, site, outputs, alone=not keys))
        return attention
    for kind, norm in normed.items():
        if norm is not None:
            attention.tensors.extend(_gains(attention, names, norm, kind))
    return attention


def _outputs(site: Site, role: Role) -> tuple[list[tuple[str, int, int]], int, int]:
    """Return what a projection's outputs are, in their order, and how many heads of q and of k it has.

    The outputs are `(kind, head, width)`, of the kinds "q", "k", "r" (a query's part whose key no head can scale), and
    "" (neither).
    """
    channels, core = site.shape[int(site.transposed)], core_of(site)
    order = fused_order(site) if role is Role.ATTENTION_QKV else None
    nope, rope = (getattr(core, name, 0) for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    if order == "heads of k v":
        value = int(site.parent.v_head_dim)  # type: ignore[union-attr, arg-type]
        heads = channels // (nope + value)
        return [part for h in range(heads) for part in (("k", h, nope), ("", h, value))], 0, heads
    if role is Role.ATTENTION_Q and nope and rope:
        heads = channels // (nope + rope)
        return [part for h in range(heads) for part in (("q", h, nope), ("r", h, rope))], heads, 0
    width = head_dim(site, role)
    heads = channels // width
    if role is Role.ATTENTION_Q and query_heads(site) == heads / 2:  # a gate for each head behind its query
        return [part for h in range(heads // 2) for part in (("q", h, width), ("", h, width))], heads // 2, 0
    if role is not Role.ATTENTION_QKV:
        kind = "q" if role is Role.ATTENTION_Q else "k"
        return [(kind, h, width) for h in range(heads)], heads * (kind == "q"), heads * (kind == "k")
    return _fused_outputs(site, order or "q k v", heads, width)


def _fused_outputs(site: Site, order: str, heads: int, width: int) -> tuple[list[tuple[str, int, int]], int, int]:
    """Return `_outputs` of a projection that fuses q, k and v by heads of one width."""
    if order == "k v":
        return [("k", h, width) for h in range(heads // 2)] + [("", 0, width)] * (heads // 2), 0, heads // 2
    if order in ("heads of q k v", "groups of q k v"):
        groups = (kv_heads(site) if order == "groups of q k v" else None) or heads // 3
        each = heads // groups - 2
        parts = [
            part
            for g in range(groups)
            for part in (*(("q", g * each + i, width) for i in range(each)), ("k", g, width), ("", g, width))
        ]
        return parts, groups * each, groups
    if order == "four of q v k":
        each = heads // 12
        blocks = [(kind, b * each + i, width) for b in range(4) for kind in ("q", "", "k") for i in range(each)]
        return blocks, heads // 3, heads // 3
    shared = shared_heads(site, heads)
    queries = heads - 2 * shared
    parts = [("q", h, width) for h in range(queries)] + [("k", h, width) for h in range(shared)]
    return [*parts, *[("", h, width) for h in range(shared)]], queries, shared


def _projection(
    attention: Attention, names: dict[int, str], site: Site, outputs: list[tuple[str, int, int]], alone: bool
) -> Iterator[ScaledTensor]:
    """Yield the weight and the bias of a projection; queries whose keys are elsewhere are scaled `alone`."""
    first = {"q": 0, "k": attention.queries, "r": attention.queries + attention.keys}
    first["q"] = first["r"] if alone else 0
    index = [first[kind] + head if kind else attention.untouched for kind, head, width in outputs for _ in range(width)]
    factors = torch.tensor(index)
    yield _scaled(names, site.module, "weight", factors, axis=int(site.transposed))
    if getattr(site.module, "bias", None) is not None:
        yield _scaled(names, site.module, "bias", factors)


def _norm(core: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """Return the norm of queries or keys that stands in an attention."""
    found = (getattr(core, name, None) for name in names)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def _gains(attention: Attention, names: dict[int, str], norm: nn.Module, kind: str) -> Iterator[ScaledTensor]:
    """Yield the gains of a norm behind a projection, which alone decide how large its outputs are; and its biases."""
    heads, first = (attention.queries, 0) if kind == "q" else (attention.keys, attention.queries)
    gain = getattr(norm, "weight", None)
    if gain is None:
        return
    shape = whole_shape(gain)
    apart = shape[0] % heads == 0 and (len(shape) > 1 or shape[0] > _width(attention))
    each = shape[0] // heads
    index = [first + h for h in range(heads) for _ in range(each)] if apart else [attention.all_heads] * shape[0]
    yield _scaled(names, norm, "weight", torch.tensor(index), offset=1.0 - _share_of_gain(norm))
    if getattr(norm, "bias", None) is not None:
        yield _scaled(names, norm, "bias", torch.tensor(index))


def _width(attention: Attention) -> int:
    """Return the width of a head, as the module or its config names it."""
    owners = (attention.module, getattr(attention.module, "config", None))
    widths = (getattr(owner, name, None) for owner in owners for name in ("head_dim", "qk_head_dim", "head_size"))
    return next((int(width) for width in widths if width), 0)


def _share_of_gain(norm: nn.Module) -> float:
    """Return 1 where a norm multiplies by its weight, and 0 where by 1 + weight."""
    zeros = {name: torch.zeros(whole_shape(p)) for name, p in norm.named_parameters()}
    ramp = torch.linspace(-1, 2, zeros["weight"].numel()).view_as(zeros["weight"])
    return 0.0 if functional_call(norm, zeros, ramp).any() else 1.0


def _scaled(
    names: dict[int, str], module: nn.Module, leaf: str, factors: Tensor, axis: int = 0, offset: float = 0.0
) -> ScaledTensor:
    """Return a scaled tensor with its full name."""
    return ScaledTensor(f"{names[id(module)]}.{leaf}".lstrip("."), module, leaf, factors, axis, offset)
