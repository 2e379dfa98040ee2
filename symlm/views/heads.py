"""How many heads an attention projection has and how wide they are, as its module or its config names them."""

from torch import nn

from symlm.roles.recognizers.attention import core_of
from symlm.roles.recognizers.fused import fused_order, has_equal_parts
from symlm.roles.recognizers.layers import CONTAINERS, dense_children, shape_of
from symlm.roles.recognizers.names import HEAD_COUNTS, projection
from symlm.roles.role import Role, Site

HEAD_DIMS = (
    *("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "dim_head", "d_head", "d_kv"),
    "kv_channels",
)
HEAD_DIMS_BY_ROLE = {Role.ATTENTION_Q: ("qk_head_dim",), Role.ATTENTION_O: ("v_head_dim",)}
KV_COUNTS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_query_groups", "num_query_groups"),
    *("n_local_kv_heads", "multi_query_group_num", "kv_heads", "num_kv", "nheads_kv"),
)


def head_dim(site: Site, role: Role) -> int:
    """Return the width of a head, from its attention module's head dimension or else its number of heads.

    Args:
        site: The site of an attention projection.
        role: Its role.

    Returns:
        The width.

    Raises:
        ValueError: Neither the module nor its config has one of the usual names.
    """
    if width := _asked(site, (*HEAD_DIMS_BY_ROLE.get(role, ()), *HEAD_DIMS)):
        return width
    channels = site.shape[int((role is Role.ATTENTION_O) != site.transposed)]
    if len(site.path) > 2 and isinstance(site.ancestors[1], nn.ModuleList) and "head" in site.path[-3].lower():
        return channels  # a module a head
    count = _asked(site, HEAD_COUNTS)
    if role is Role.ATTENTION_QKV and count:  # of equal q, k and v each is as wide as the model
        cross = fused_order(site) == "k v"
        equal = channels == 3 * site.shape[int(not site.transposed)] or has_equal_parts(site.parent, site.leaf)
        kv_count = kv_heads(site) or _heads_by_queries(site, channels // 2 if cross else 0, count)
        kv_count = kv_count or (count if cross or equal else None)
        count = count * (not cross) + 2 * kv_count if kv_count else None
    elif role in (Role.ATTENTION_K, Role.ATTENTION_V):
        count = kv_heads(site) or _heads_by_queries(site, channels, count)
    if count and channels % count == 0:
        return channels // count
    raise ValueError(
        f"{site}: {type(site.parent).__name__} has neither head_dim nor num_heads (and num_key_value_heads) that fit; "
        f"set them on the module, or assign this parameter the role 'matrix', which is one matrix: "
        f"roles={{{site.name!r}: 'matrix'}}"
    )


def query_heads(site: Site) -> int | None:
    """Return the number of query heads, as the attention module or its config names it; None if neither does.

    Args:
        site: The site of an attention projection.
    """
    return _asked(site, HEAD_COUNTS)


def kv_heads(site: Site, fused: int = 0) -> int | None:
    """Return the number of heads of k and v, as the attention module or its config names it; None if neither does.

    Args:
        site: The site of an attention projection.
        fused: Of a projection fused by groups, all of its heads.
    """
    if count := _asked(site, KV_COUNTS):
        return count
    heads, groups = _asked(site, HEAD_COUNTS), _asked(site, ("num_key_value_groups", "heads_per_kv"))
    if groups and (heads or fused):
        return heads // groups if heads else fused // (groups + 2)
    return None


def _heads_by_queries(site: Site, channels: int, count: int | None) -> int | None:
    """Return the number of heads of k or v, each as wide as one of the queries beside them; None where it is not seen.

    Without queries beside them there are as many.
    """
    layers = dense_children(site.parent).items() if site.parent is not None else ()
    rows = {projection(name): shape_of(layer)[1] for name, layer in layers}
    if Role.ATTENTION_Q not in rows or not count:
        return count if channels else None
    if rows.get(Role.ATTENTION_K, channels) != channels:
        return None  # values of another width
    width, rest = divmod(rows[Role.ATTENTION_Q], count)
    return channels // width if not rest and width and channels and channels % width == 0 else None


def _asked(site: Site, names: tuple[str, ...]) -> int | None:
    """Return the first positive number with one of these names on the parent, the module, or one of their configs."""
    around = site.ancestors[1:2] if isinstance(site.parent, CONTAINERS) else ()
    owners = dict.fromkeys((site.parent, core_of(site), site.module, *around))
    configs = (getattr(owner, "config", None) for owner in owners)
    for owner in (*owners, *configs):
        for name in names:
            value = getattr(owner, name, None)
            value = len(value) if isinstance(value, nn.ModuleList) else value  # a module a head
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def shared_heads(site: Site, heads: int) -> int:
    """Return how many of a fused projection's heads are those of k, which is the number of those of v.

    Args:
        site: The site of the fused projection of q, k and v.
        heads: All of its heads.

    Returns:
        The number that the module or its config names, or else what remains beside the query heads.

    Raises:
        ValueError: Neither number is named.
    """
    queries, named = _asked(site, HEAD_COUNTS), kv_heads(site)
    if named and queries in (None, heads - 2 * named):
        return named
    if queries is None or not 0 < queries < heads:
        raise ValueError(
            f"{site}: {type(site.parent).__name__} does not show how many of its {heads} heads are queries; set "
            f"num_heads or num_key_value_heads on it, or roles={{{site.name!r}: 'matrix'}}"
        )
    return (heads - queries) // 2
