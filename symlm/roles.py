"""What each parameter of a model is: every trainable one gets exactly one role, from structure first, names last."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from torch import Tensor, nn


class Role(StrEnum):
    """The classes of parameters that differ in symmetry; `vector` is all that is no matrix."""

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    TIED_EMBEDDING = "tied_embedding"
    ROUTER = "router"
    ATTENTION_Q = "attention_q"
    ATTENTION_K = "attention_k"
    ATTENTION_V = "attention_v"
    ATTENTION_O = "attention_o"
    MLP_IN = "mlp_in"
    MLP_OUT = "mlp_out"
    EXPERT_IN = "expert_in"
    EXPERT_OUT = "expert_out"
    MATRIX = "matrix"
    VECTOR = "vector"


@dataclass(frozen=True)
class Site:
    """A parameter where it stands: its first name, the module that holds it and that module's parent."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    parent: nn.Module | None

    def __str__(self) -> str:
        return f"{self.name} {list(self.parameter.shape)} in {type(self.module).__name__}"

    @property
    def leaf(self) -> str:
        """The name that tells the projection: `q_proj` of `...q_proj.weight`, `down_proj` of `...down_proj`."""
        *path, own = self.name.split(".")
        return path[-1] if own in ("weight", "bias") and path else own


class UnplacedParameters(ValueError):
    """Some trainable parameters fit no role; the message names each, and the way to place it."""


ATTENTION = {
    "q_proj": Role.ATTENTION_Q,
    "k_proj": Role.ATTENTION_K,
    "v_proj": Role.ATTENTION_V,
    "o_proj": Role.ATTENTION_O,
}
MLP = {"gate_proj": Role.MLP_IN, "up_proj": Role.MLP_IN, "down_proj": Role.MLP_OUT}
EXPERTS = {
    "gate_up_proj": Role.EXPERT_IN,
    "gate_proj": Role.EXPERT_IN,
    "up_proj": Role.EXPERT_IN,
    "down_proj": Role.EXPERT_OUT,
}
FUSED = ("qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "qkv")


def assign_roles(model: nn.Module, overrides: Mapping[str, str] | None = None) -> dict[str, Role]:
    """Return `{parameter name: Role}` for every trainable parameter, tied ones once, under their first name.

    overrides: ordered `{pattern: role}`; a pattern is a shell glob over full names, the first match wins.

    Raises: UnplacedParameters, naming each parameter without a role; ValueError for an unknown role or a pattern
    that matches nothing.
    """
    return {site.name: role for site, role in place(model, overrides)}


def place(model: nn.Module, overrides: Mapping[str, str] | None = None) -> list[tuple[Site, Role]]:
    """Return each trainable parameter's site with its role; `assign_roles` for those who need the site too."""
    patterns = {pattern: _parse_role(role) for pattern, role in (overrides or {}).items()}
    sites = list(_sites(model))
    heads = _EndMatrices(model)
    placed, unplaced, used = [], [], set()
    for site in sites:
        matches = [pattern for pattern in patterns if fnmatchcase(site.name, pattern)]
        used.update(matches[:1])
        role = patterns[matches[0]] if matches else _classify(site, heads)
        if role is None:
            unplaced.append(site)
        else:
            placed.append((site, role))
    dead = [pattern for pattern in patterns if pattern not in used]
    if dead:
        raise ValueError(f"overrides {dead} place no parameter; the names are like {sites[0].name!r}")
    if unplaced:
        lines = "\n".join(f"  {site}" for site in unplaced)
        raise UnplacedParameters(
            f"{len(unplaced)} parameters fit no role:\n{lines}\nPlace them by name, e.g. "
            f"overrides={{{unplaced[0].name!r}: 'matrix'}}; roles are {[str(role) for role in Role]}"
        )
    return placed


def _parse_role(role: str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise ValueError(f"unknown role {role!r}; choose one of {[str(role) for role in Role]}") from None


def _sites(model: nn.Module) -> Iterator[Site]:
    modules = dict(model.named_modules())
    seen = set()
    for path, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{path}.{own}" if path else own
                yield Site(name, parameter, module, modules.get(path.rpartition(".")[0]) if path else None)


class _EndMatrices:
    """The token matrices at a model's two ends, as the model itself names them or as shapes tell."""

    def __init__(self, model: nn.Module) -> None:
        self.input = _weight(model, "get_input_embeddings")
        self.output: Tensor | None = _weight(model, "get_output_embeddings")
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        if self.output is None and tables:
            shape = max((table.weight.shape for table in tables), key=lambda shape: shape[0])
            linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
            fitting = [linear.weight for linear in linears if linear.weight.shape == shape]
            self.output = fitting[-1] if fitting else None
        self.tables = {id(table.weight) for table in tables}

    def role(self, parameter: nn.Parameter) -> Role | None:
        is_input = parameter is self.input or id(parameter) in self.tables
        if parameter is self.output:
            return Role.TIED_EMBEDDING if is_input else Role.LM_HEAD
        return Role.EMBEDDING if is_input else None


def _weight(model: nn.Module, getter: str) -> nn.Parameter | None:
    try:
        return getattr(getattr(model, getter)(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None


def _classify(site: Site, ends: _EndMatrices) -> Role | None:
    """Place one parameter, or return None; the order of the questions is the order of trust."""
    dims, owner = site.parameter.ndim, type(site.module).__name__
    parent = type(site.parent).__name__
    if role := ends.role(site.parameter):
        return role
    if dims <= 1 or site.name.endswith("bias"):
        return Role.VECTOR
    if dims == 2 and _is_router(site, owner):
        return Role.ROUTER
    if dims == 3:
        return EXPERTS.get(site.leaf) if owner.endswith("Experts") else None
    if dims != 2 or not isinstance(site.module, nn.Linear) or site.leaf in FUSED:
        return None
    if "Attention" in parent and site.leaf in ATTENTION:
        return ATTENTION[site.leaf]
    if all(hasattr(site.parent, projection) for projection in ("up_proj", "down_proj")) and site.leaf in MLP:
        return MLP[site.leaf]
    return Role.MATRIX


def _is_router(site: Site, owner: str) -> bool:
    if owner.lower().endswith("router"):
        return True
    return isinstance(site.module, nn.Linear) and hasattr(site.parent, "experts") and site.leaf in ("gate", "router")
