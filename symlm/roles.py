"""What each parameter of a model is: every trainable one gets exactly one role, from structure first, names last."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from torch import Tensor, nn


class Role(StrEnum):
    """The classes of parameters that differ in symmetry.

    `attention_qkv` is a projection that fuses several of q, k and v, `lora` a low-rank adapter's factor, and `vector`
    all that is no matrix.
    """

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    TIED_EMBEDDING = "tied_embedding"
    ROUTER = "router"
    ATTENTION_Q = "attention_q"
    ATTENTION_K = "attention_k"
    ATTENTION_V = "attention_v"
    ATTENTION_O = "attention_o"
    ATTENTION_QKV = "attention_qkv"
    MLP_IN = "mlp_in"
    MLP_OUT = "mlp_out"
    EXPERT_IN = "expert_in"
    EXPERT_OUT = "expert_out"
    LORA = "lora"
    MATRIX = "matrix"
    VECTOR = "vector"


def whole_shape(p: Tensor) -> tuple[int, ...]:
    """Return a parameter's shape, also of one that ZeRO-3 has emptied: it keeps its shape aside between uses."""
    return tuple(getattr(p, "ds_shape", p.shape))


@dataclass(frozen=True)
class Site:
    """A parameter where it stands: its first name, the module that holds it and that module's parent."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    parent: nn.Module | None

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} in {type(self.module).__name__}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's."""
        return whole_shape(self.parameter)

    @property
    def leaf(self) -> str:
        """The name that tells the projection: `q_proj` of `...q_proj.weight`, `down_proj` of `...down_proj`."""
        *path, own = self.name.split(".")
        return path[-1] if own in ("weight", "bias") and path else own

    @property
    def transposed(self) -> bool:
        """Tell whether the module stores [..., inputs, outputs], as Conv1D and some experts do.

        Experts tell by their shapes: gate and up's last axis is down's middle one, the width, unless they are.
        """
        into, out = (getattr(self.module, leaf, None) for leaf in ("gate_up_proj", "down_proj"))
        if isinstance(into, Tensor) and isinstance(out, Tensor) and len(whole_shape(into)) == 3:
            return whole_shape(into)[-1] != whole_shape(out)[-2]
        return type(self.module).__name__ == "Conv1D" or bool(getattr(self.module, "is_transposed", False))

    @property
    def fused(self) -> str | None:
        """The order in which the parent's own code lays q, k and v in this projection, if it is a known one."""
        order = FUSED_ATTENTION.get((type(self.parent).__name__, self.leaf))
        return "k v" if order == "q k v" and getattr(self.parent, "is_cross_attention", False) else order


class UnplacedParameters(ValueError):
    """Some trainable parameters fit no role; the message names each, and the way to place it."""


ATTENTION = {
    "q_proj": Role.ATTENTION_Q,
    "q_b_proj": Role.ATTENTION_Q,
    "q_attn": Role.ATTENTION_Q,
    "k_proj": Role.ATTENTION_K,
    "v_proj": Role.ATTENTION_V,
    **dict.fromkeys(("o_proj", "out_proj", "c_proj", "dense"), Role.ATTENTION_O),
}
FUSED_ATTENTION = {
    ("Phi3Attention", "qkv_proj"): "q k v",
    ("GPT2Attention", "c_attn"): "q k v",
    ("GPTNeoXAttention", "query_key_value"): "heads of q k v",
    ("DeepseekV3Attention", "kv_b_proj"): "heads of k v",
}
FUSED_LEAVES = ("qkv_proj", "query_key_value", "c_attn", "qkv", "Wqkv", "wqkv", "in_proj", "kv_b_proj")
MLP = {
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"), Role.MLP_IN),
    **dict.fromkeys(("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h"), Role.MLP_OUT),
}
EXPERTS = {
    **dict.fromkeys(("gate_up_proj", "gate_proj", "up_proj"), Role.EXPERT_IN),
    "down_proj": Role.EXPERT_OUT,
}
ADAPTERS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")
HEADS = ("lm_head", "output", "embed_out", "output_projection", "unembed", "head", "score", "classifier")


def assign_roles(model: nn.Module, roles: Mapping[str, str] | None = None) -> dict[str, Role]:
    """Return `{parameter name: Role}` for every trainable parameter, tied ones once, under their first name.

    roles: ordered `{pattern: role}`; a pattern is a shell glob over full names, the first match wins.

    Raises: UnplacedParameters, naming each parameter without a role; ValueError for an unknown role or a pattern
    that matches nothing.
    """
    return {site.name: role for site, role in place(model, roles)}


def place(model: nn.Module, roles: Mapping[str, str] | None = None) -> list[tuple[Site, Role]]:
    """Return each trainable parameter's site with its role; `assign_roles` for those who need the site too."""
    patterns = {pattern: _parse_role(role) for pattern, role in (roles or {}).items()}
    sites = list(_sites(model))
    ends = _EndMatrices(model)
    placed: dict[int, tuple[Site, Role]] = {}
    unplaced, used = [], set()
    for site in sites:
        matches = [pattern for pattern in patterns if fnmatchcase(site.name, pattern)]
        used.update(matches)
        role = patterns[matches[0]] if matches else _classify(site, ends)
        if role is None:
            unplaced.append(site)
            continue
        first, before = placed.setdefault(id(site.parameter), (site, role))
        if before is not role:
            raise ValueError(
                f"one tensor has two roles: {first} is {before}, {site} is {role}; untie it, or say with roles= "
                f"what it is, e.g. {{{first.name!r}: 'matrix', {site.name!r}: 'matrix'}}"
            )
    dead = [pattern for pattern in patterns if pattern not in used]
    if dead:
        like = f"; the names are like {sites[0].name!r}" if sites else ", and the model has no trainable one"
        raise ValueError(f"roles {dead} place no parameter{like}")
    if unplaced:
        lines = "\n".join(f"  {site}" for site in unplaced)
        remedy = {site.name: "matrix" if len(site.shape) == 2 else "vector" for site in unplaced[:2]}
        raise UnplacedParameters(
            f"{len(unplaced)} parameters fit no role:\n{lines}\nPlace them by name or pattern, e.g. roles={remedy}, "
            f"'vector' for what is no matrix (elementwise AdamW); roles are {[str(role) for role in Role]}"
        )
    return list(placed.values())


def _parse_role(role: str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise ValueError(f"unknown role {role!r}; choose one of {[str(role) for role in Role]}") from None


def _sites(model: nn.Module) -> Iterator[Site]:
    """Yield every place of every trainable parameter, a tied one more than once."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                name = f"{path}.{own}" if path else own
                yield Site(name, parameter, module, modules.get(path.rpartition(".")[0]) if path else None)


class _EndMatrices:
    """The token matrices at a model's two ends, as the model itself names them or as shapes tell."""

    def __init__(self, model: nn.Module) -> None:
        self.root = model = _unwrapped(model)
        self.input = _weight(model, "get_input_embeddings")
        self.output: Tensor | None = _weight(model, "get_output_embeddings")
        kinds = (nn.Embedding, nn.EmbeddingBag)
        named = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
        if sparse := [path for path, table in named.items() if table.sparse and table.weight.requires_grad]:
            raise ValueError(f"{sparse} give sparse gradients, which no rule takes: build them with sparse=False")
        tables = list(named.values())
        self.tables = {id(table.weight) for table in tables}
        linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        if self.output is None and linears:
            shapes = {whole_shape(table.weight) for table in tables}
            self.output = linears[-1] if whole_shape(linears[-1]) in shapes else None
        task = getattr(getattr(model, "config", None), "problem_type", None)
        self.has_softmax = bool(tables) and task not in ("regression", "multi_label_classification")

    def role(self, site: Site) -> Role | None:
        """Return the role of a token matrix; a linear layer at the root that is called a head is one too.

        Unless the model has no tokens, or its loss is told to be no softmax: only that ignores a shared shift.
        """
        parameter = site.parameter
        is_input = parameter is self.input or id(parameter) in self.tables
        named = site.parent is self.root and site.leaf in HEADS and isinstance(site.module, nn.Linear)
        is_head = named and self.has_softmax and len(site.shape) == 2 and site.shape[0] > 1
        if parameter is self.output or is_head:
            return Role.TIED_EMBEDDING if is_input else Role.LM_HEAD
        return Role.EMBEDDING if is_input else None


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of torch.compile's, DataParallel's and DDP's wrappers."""
    while True:
        wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _weight(model: nn.Module, getter: str) -> nn.Parameter | None:
    try:
        return getattr(getattr(model, getter)(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None


def _classify(site: Site, ends: _EndMatrices) -> Role | None:
    """Place one parameter, or return None; the order of the questions is the order of trust."""
    shape, owner = site.shape, type(site.module).__name__
    if role := ends.role(site):
        return role
    if len(shape) == 3 and owner.endswith("Experts"):
        return EXPERTS.get(site.leaf)
    if len(shape) <= 1 or site.name.endswith("bias") or (len(shape) == 2 and 1 in shape):
        return Role.VECTOR
    if any(name in site.name for name in ADAPTERS):
        return Role.LORA
    if len(shape) == 2 and _is_router(site, owner):
        return Role.ROUTER
    if len(shape) != 2 or not (isinstance(site.module, nn.Linear) or owner == "Conv1D"):
        return None
    return _classify_linear(site)


def _classify_linear(site: Site) -> Role | None:
    """Place a dense projection by its block: attention, MLP, or neither."""
    if site.fused:
        return Role.ATTENTION_QKV
    if site.leaf in FUSED_LEAVES:
        return None
    if "attention" in type(site.parent).__name__.lower() and site.leaf in ATTENTION:
        return ATTENTION[site.leaf]
    children = {name for name, _ in site.parent.named_children()} if site.parent else set()
    if site.leaf in MLP and {MLP.get(name) for name in children} >= {Role.MLP_IN, Role.MLP_OUT}:
        return MLP[site.leaf]
    return None if site.leaf == "gate_up_proj" else Role.MATRIX


def _is_router(site: Site, owner: str) -> bool:
    if owner.lower().endswith("router") or type(site.parent).__name__.lower().endswith("router"):
        return True
    return isinstance(site.module, nn.Linear) and hasattr(site.parent, "experts") and site.leaf in ("gate", "router")
