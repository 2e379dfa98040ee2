"""The view of a parameter: its storage from its module, its split into matrices from its route."""

from symlm.roles.recognizers.channels import Blocks, blocks_of_outputs
from symlm.roles.recognizers.fused import fused_order
from symlm.roles.recognizers.layers import is_convolution
from symlm.roles.recognizers.leaves import halves_of_filters
from symlm.roles.role import Role, Site
from symlm.roles.storage import block_of_experts, whole_shape
from symlm.views.heads import head_dim, kv_heads, shared_heads
from symlm.views.matrix_view import MatrixView

WHOLE = MatrixView("m n -> 1 m n")
TRANSPOSED = MatrixView("n m -> 1 m n")
VECTOR = MatrixView("n -> 1 1 n")
STACK = MatrixView("b m n -> b m n")
TRANSPOSED_STACK = MatrixView("b n m -> b m n")
ATTENTION = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_O)
CHANNELS = (Role.MLP_IN, Role.MLP_OUT)
OF_HEADS = {  # what a module calls the widths of the parts of a head
    "heads of k v": ("qk_nope_head_dim", "v_head_dim"),
    "heads of q gate": ("qk_head_dim", "v_head_dim"),
}
STACKED = (Role.EXPERT_IN, Role.EXPERT_OUT, Role.MLP_IN, Role.MLP_OUT, Role.MATRIX)


def row_heads(heads: int, transposed: bool = False) -> MatrixView:
    """Return the view of q, k or v, stored `[h·head_dim, d]`, as one (head_dim, d) matrix a head.

    Args:
        heads: The number h of heads.
        transposed: Whether it is stored `[d, h·head_dim]`.

    Returns:
        The view.
    """
    return MatrixView(_stored("(h m)", "n", transposed) + " -> h m n", {"h": (heads,)})


def column_heads(heads: int, transposed: bool = False) -> MatrixView:
    """Return the view of o, stored `[d, h·head_dim]`, as one (d, head_dim) matrix a head.

    Args:
        heads: The number h of heads.
        transposed: Whether it is stored `[h·head_dim, d]`.

    Returns:
        The view.
    """
    return MatrixView(_stored("m", "(h n)", transposed) + " -> h m n", {"h": (heads,)})


def gate_up(transposed: bool, concatenated: bool, paired: bool) -> MatrixView:
    """Return the view of the fused gate and up of E experts, stored `[E, 2r, d]`.

    Args:
        transposed: Whether they are stored `[E, d, 2r]`.
        concatenated: Whether all gate neurons come first; else gate and up alternate.
        paired: Whether a matrix is (r, 2d), each row the gate and the up weights of one neuron; else gate and up are
            separate (r, d) matrices.

    Returns:
        The view.
    """
    stored = _stored("(p m)" if concatenated else "(m p)", "n", transposed)
    return MatrixView(f"b {stored} -> {'b m (p n)' if paired else '(b p) m n'}", {"p": (2,)})


def view_of(site: Site, role: Role, granularity: str, equal: bool = False) -> MatrixView:
    """Return the view of a parameter: its storage from its module, its split from the route.

    Args:
        site: The parameter's site.
        role: Its role.
        granularity: The split: "whole"; "heads", one matrix a head for attention; "qk_heads", heads of q and k, v and o
            whole; "transposed", the neurons of a down projection as rows; or "pair", gate and up of a neuron in one
            row.
        equal: Whether all matrices must have one shape, as a rule with a state needs it; unequal blocks are one matrix
            then.

    Returns:
        The view.

    Raises:
        ValueError: The module has no head dimension, or it does not divide the projection.
    """
    axes = len(site.shape)
    if axes > 2 and is_convolution(site.module) and role is not Role.VECTOR:
        return _filters(site, role, granularity)
    if role in ATTENTION and axes == 3 and type(site.module).__name__.endswith("Experts"):
        return _heads_of_experts(site, role, granularity)
    if role in ATTENTION and axes == 3:
        return _heads_on_an_axis(role, granularity)
    if role is not Role.VECTOR and (axes not in (2, 3) or (axes == 3 and role not in STACKED)):
        raise ValueError(
            f"{site}: the role {role} needs a matrix, or for a stack of matrices one of {[str(r) for r in STACKED]}; "
            f"assign roles={{{site.name!r}: 'vector'}}, which is elementwise AdamW"
        )
    if role is Role.VECTOR or axes < 2:
        return VECTOR if axes == 1 else _rows_as_vectors(axes)
    if axes == 3:
        return _expert_view(site, role, granularity)
    if role is Role.ATTENTION_QKV:
        return _fused_view(site, granularity)
    blocks = blocks_of_outputs(site) if role in CHANNELS else None
    if blocks and not (equal and any(len(sizes) > 1 for sizes in blocks.sizes.values())):
        return _blocks_view(site, blocks, role, granularity)
    if granularity == "heads" or (granularity == "qk_heads" and role in (Role.ATTENTION_Q, Role.ATTENTION_K)):
        return _head_view(site, role)
    return TRANSPOSED if (granularity == "transposed") != site.transposed else WHOLE


def _stored(outputs: str, inputs: str, transposed: bool) -> str:
    """Return the two axes in the order in which they are stored."""
    return f"{inputs} {outputs}" if transposed else f"{outputs} {inputs}"


def _rows_as_vectors(ndim: int) -> MatrixView:
    """Return the view of a vector that is stored with several axes, as one row."""
    axes = [f"a{k}" for k in range(ndim)]
    return MatrixView(f"{' '.join(axes)} -> 1 1 ({' '.join(axes)})")


def _head_view(site: Site, role: Role) -> MatrixView:
    """Return the view of an attention projection as one matrix a head."""
    columns, width = role is Role.ATTENTION_O, head_dim(site, role)
    channels = site.shape[int(columns != site.transposed)]
    if channels % width:
        raise ValueError(f"{site}: head_dim {width} does not divide its {channels} channels; set the module's head_dim")
    return (column_heads if columns else row_heads)(channels // width, site.transposed)


def _heads_on_an_axis(role: Role, granularity: str) -> MatrixView:
    """Return the view of an attention projection stored `[d, h, head_dim]`, q, k and v read and o written that way."""
    if granularity == "whole":
        return MatrixView("d h m -> 1 (h m) d" if role is not Role.ATTENTION_O else "d h m -> 1 d (h m)")
    return MatrixView("d h m -> h m d" if role is not Role.ATTENTION_O else "d h m -> h d m")


def _heads_of_experts(site: Site, role: Role, granularity: str) -> MatrixView:
    """Return the view of experts that are queries `[E, h·head_dim, d]` or outputs `[E, d, h·head_dim]` of attention."""
    columns = role is Role.ATTENTION_O
    if granularity != "heads" and (columns or granularity != "qk_heads"):
        return STACK
    heads = site.shape[1 + columns] // head_dim(site, role)
    return MatrixView(f"b {'m (h n)' if columns else '(h m) n'} -> (b h) m n", {"h": (heads,)})


def _filters(site: Site, role: Role, granularity: str) -> MatrixView:
    """Return the view of a convolution as one matrix a group or a head, `outputs × (inputs · positions)`."""
    places = [f"k{k}" for k in range(len(site.shape) - 2)]
    columns, groups = f"(c {' '.join(places)})", int(getattr(site.module, "groups", 1))
    if role in (Role.ATTENTION_Q, Role.ATTENTION_K) and granularity in ("heads", "qk_heads"):
        groups = max(site.shape[0] // head_dim(site, role), groups)
    if role is Role.MLP_IN:
        groups = max(halves_of_filters(site), groups)
    if granularity == "transposed":
        return MatrixView(f"(g m) c {' '.join(places)} -> g {columns} m", {"g": (groups,)})
    if getattr(site.module, "transposed", False):
        return MatrixView(f"(g c) m {' '.join(places)} -> g m {columns}", {"g": (groups,)})
    return MatrixView(f"(g m) c {' '.join(places)} -> g m {columns}", {"g": (groups,)})


def _blocks_view(site: Site, blocks: Blocks, role: Role, granularity: str) -> MatrixView:
    """Return the view of a layer whose outputs are blocks: each is a matrix of its own."""
    stored = _stored(blocks.axis, "n", site.transposed)
    if blocks.axis in ("(p m)", "(m p)"):
        if granularity == "transposed":
            return MatrixView(f"{stored} -> p n m", blocks.sizes)
        return MatrixView(f"{stored} -> {'1 m (p n)' if granularity == 'pair' else 'p m n'}", blocks.sizes)
    rows = blocks.axis if blocks.axis.startswith("(") else "m"
    return MatrixView(f"{stored} -> {f'1 n {rows}' if granularity == 'transposed' else f'1 {rows} n'}", blocks.sizes)


def _fused_view(site: Site, granularity: str) -> MatrixView:
    """Return the view of a fused projection, in its `fused_order`."""
    order = fused_order(site)
    if order in OF_HEADS:
        stacks = {"heads": "h m n", "qk_heads": "h m n | 1 (h m) n"}.get(granularity, "1 (h m) n")
        sizes = _sizes(site, *OF_HEADS[order])
        return MatrixView(f"(h m) n -> {stacks}", {"h": (site.shape[0] // sum(sizes),), "m": sizes})
    channels, width = site.shape[int(site.transposed)], head_dim(site, Role.ATTENTION_QKV)
    if channels % width:
        raise ValueError(f"{site}: head_dim {width} does not divide its {channels} channels; set the module's head_dim")
    heads = channels // width
    if order == "four of q v k":
        stored = _stored("(g p h m)", "n", site.transposed)
        by_head = {"heads": "(g p h) m n", "qk_heads": "(g p h) m n | p (g h m) n | (g p h) m n"}
        of_four: dict[str, tuple[int, ...]] = {"g": (4,), "p": (1, 1, 1), "m": (width,)}
        return MatrixView(f"{stored} -> {by_head.get(granularity, 'p (g h m) n')}", of_four)
    if order in ("heads of q k v", "groups of q k v"):
        return _groups_view(site, granularity, heads, width)
    if granularity == "heads":
        return row_heads(heads, site.transposed)
    # A cross-attention has its queries in another projection.
    shared = heads // 2 if order == "k v" else shared_heads(site, heads)
    queries = heads - 2 * shared
    if queries < 0 or (queries == 0) != (order == "k v") or (shared and queries % shared):
        raise ValueError(
            f"{site}: {channels} channels in heads of {width} do not split into q, k, v with {shared} heads of k "
            f"and of v; set num_key_value_heads on {type(site.parent).__name__}"
        )
    if granularity == "qk_heads":
        stored = _stored("(h m)", "n", site.transposed)
        return MatrixView(f"{stored} -> h m n | 1 (h m) n", {"h": (heads - shared, shared)})
    blocks = (queries * width,) * (queries > 0) + (shared * width,) * 2
    return MatrixView(f"{_stored('m', 'n', site.transposed)} -> 1 m n", {"m": blocks})


def _groups_view(site: Site, granularity: str, heads: int, width: int) -> MatrixView:
    """Return the view of a projection fused by groups: query heads, then the k and v that they share."""
    groups = kv_heads(site, heads) if fused_order(site) == "groups of q k v" else heads // 3
    if not groups or heads % groups or heads // groups < 3:
        raise ValueError(
            f"{site}: {heads} heads do not split into groups of q, k and v; set num_key_value_heads on "
            f"{type(site.parent).__name__}"
        )
    queries = heads // groups - 2
    stored = _stored("(h p m)", "n", site.transposed)
    if granularity == "heads":
        return MatrixView(f"{stored} -> (h p) m n", {"p": (queries + 2,), "m": (width,)})
    if granularity == "qk_heads":
        return MatrixView(f"{stored} -> (h p) m n | p (h m) n", {"p": (queries + 1, 1), "m": (width,)})
    if queries == 1:
        return MatrixView(f"{stored} -> p (h m) n", {"p": (3,), "m": (width,)})
    return MatrixView(f"{stored} -> 1 (h p m) n", {"p": (queries, 1, 1), "m": (width,)})


def _sizes(site: Site, *names: str) -> tuple[int, ...]:
    """Return the sizes that the parent module has under these names."""
    return tuple(int(getattr(site.parent, name)) for name in names)


def _expert_view(site: Site, role: Role, granularity: str) -> MatrixView:
    """Return the view of a parameter that stacks the matrices of all experts."""
    if role is Role.EXPERT_IN and _is_pair(site) and granularity != "transposed":
        concatenated = bool(getattr(site.module, "is_concatenated", True))
        return gate_up(site.transposed, concatenated, paired=granularity == "pair")
    return TRANSPOSED_STACK if site.transposed != (granularity == "transposed") else STACK


def _is_pair(site: Site) -> bool:
    """Tell whether experts' inputs are gate and up in one tensor: by the name, or twice as wide as what is read."""
    if site.leaf == "gate_up_proj":
        return True
    if block := block_of_experts(site.module):
        outputs, inputs = (2, 1) if site.transposed else (1, 2)
        return site.shape[outputs] == 2 * whole_shape(block[1])[inputs]
    out = getattr(getattr(site.parent, "output_linear", None), "weight", None)
    return site.leaf == "input_linear" and out is not None and site.shape[1] == 2 * whole_shape(out)[2]
