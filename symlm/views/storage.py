"""The view of a parameter: its storage from its module, its split into matrices from its route."""

from symlm.roles.role import Role, Site
from symlm.views.heads import head_dim, shared_heads
from symlm.views.matrix_view import MatrixView

WHOLE = MatrixView("m n -> 1 m n")


TRANSPOSED = MatrixView("n m -> 1 m n")


VECTOR = MatrixView("n -> 1 1 n")


STACK = MatrixView("b m n -> b m n")


TRANSPOSED_STACK = MatrixView("b n m -> b m n")


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


def view_of(site: Site, role: Role, granularity: str) -> MatrixView:
    """Return the view of a parameter: its storage from its module, its split from the route.

    Args:
        site: The parameter's site.
        role: Its role.
        granularity: The split: "whole"; "heads", one matrix a head for attention; "qk_heads", heads of q and k, v and o
            whole; "transposed", the neurons of a down projection as rows; or "pair", gate and up of a neuron in one
            row.

    Returns:
        The view.

    Raises:
        ValueError: The module has no head dimension, or it does not divide the projection.
    """
    axes = len(site.shape)
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
    if site.leaf == "gate_up_proj" and granularity != "transposed":
        stored = _stored("(p m)", "n", site.transposed)
        return MatrixView(f"{stored} -> {'1 m (p n)' if granularity == 'pair' else 'p m n'}", {"p": (2,)})
    if site.leaf == "kv_a_proj_with_mqa":
        return MatrixView("m n -> 1 m n", {"m": _sizes(site, "kv_lora_rank", "qk_rope_head_dim")})
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


def _fused_view(site: Site, granularity: str) -> MatrixView:
    """Return the view of a fused projection, in the order of `site.fused`: its heads, or q, k and v in sequence."""
    if site.fused == "heads of k v":
        stacks = {"heads": "h m n", "qk_heads": "h m n | 1 (h m) n"}.get(granularity, "1 (h m) n")
        sizes = {"h": _sizes(site, "num_heads"), "m": _sizes(site, "qk_nope_head_dim", "v_head_dim")}
        return MatrixView(f"(h m) n -> {stacks}", sizes)
    channels, width = site.shape[int(site.transposed)], head_dim(site, Role.ATTENTION_QKV)
    if channels % width:
        raise ValueError(f"{site}: head_dim {width} does not divide its {channels} channels; set the module's head_dim")
    if site.fused == "heads of q k v":
        stacks = {"heads": "(h p) m n", "qk_heads": "(h p) m n | p (h m) n"}.get(granularity, "p (h m) n")
        sizes = {"p": (2, 1) if granularity == "qk_heads" else (3,), "m": (width,)}
        return MatrixView(f"{_stored('(h p m)', 'n', site.transposed)} -> {stacks}", sizes)
    heads = channels // width
    if granularity == "heads":
        return row_heads(heads, site.transposed)
    # A cross-attention has its queries in another projection.
    shared = heads // 2 if site.fused == "k v" else shared_heads(site, heads)
    queries = heads - 2 * shared
    if queries < 0 or (queries == 0) != (site.fused == "k v") or (shared and queries % shared):
        raise ValueError(
            f"{site}: {channels} channels in heads of {width} do not split into q, k, v with {shared} heads of k "
            f"and of v; set num_key_value_heads on {type(site.parent).__name__}"
        )
    if granularity == "qk_heads":
        stacks, sizes = "h m n | 1 (h m) n", {"h": (heads - shared, shared)}
        return MatrixView(f"{_stored('(h m)', 'n', site.transposed)} -> {stacks}", sizes)
    blocks = (queries * width,) * (queries > 0) + (shared * width,) * 2
    return MatrixView(f"{_stored('m', 'n', site.transposed)} -> 1 m n", {"m": blocks})


def _sizes(site: Site, *names: str) -> tuple[int, ...]:
    """Return the sizes that the parent module has under these names."""
    return tuple(int(getattr(site.parent, name)) for name in names)


def _expert_view(site: Site, role: Role, granularity: str) -> MatrixView:
    """Return the view of a parameter that stacks the matrices of all experts."""
    if role is Role.EXPERT_IN and site.leaf == "gate_up_proj" and granularity != "transposed":
        concatenated = bool(getattr(site.module, "is_concatenated", True))
        return gate_up(site.transposed, concatenated, paired=granularity == "pair")
    return TRANSPOSED_STACK if site.transposed != (granularity == "transposed") else STACK
