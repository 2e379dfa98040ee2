"""The roles, and the site of a parameter in its model."""

from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from symlm.roles.storage import AXES, inputs_first, whole_shape


class Role(StrEnum):
    """Name a class of parameters with a symmetry of its own.

    `capped_lm_head` and `sigmoid_router` are those whose loss feels a shift of all rows. `attention_qkv` is a
    projection that fuses several of q, k and v. `mlp_in` and `mlp_out` read the residual stream into channels that
    nothing mixes, and out of them: an MLP, a state space, a gate, a low rank with a norm inside. `lora` is a factor of
    a low-rank adapter, `matrix` is any other dense matrix, and `vector` is what is not a matrix.
    """

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    CAPPED_LM_HEAD = "capped_lm_head"
    TIED_EMBEDDING = "tied_embedding"
    ROUTER = "router"
    SIGMOID_ROUTER = "sigmoid_router"
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


@dataclass(frozen=True)
class Site:
    """Locate a parameter in its model.

    Args:
        name: The full name.
        parameter: The parameter.
        module: The module that holds it.
        ancestors: The modules around that module, the nearest first, wrappers left out.
        path: The parts of the module's path, wrappers left out.
    """

    name: str
    parameter: nn.Parameter
    module: nn.Module
    ancestors: tuple[nn.Module, ...] = ()
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} in {type(self.module).__name__}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The full shape of the parameter, see `whole_shape`."""
        return whole_shape(self.parameter)

    @property
    def leaf(self) -> str:
        """The name of the projection: `q_proj` for `...q_proj.weight`, `down_proj` for `...down_proj`."""
        last = AXES.sub("", self.name.rpartition(".")[2])
        return self.path[-1] if self.path and (last in TENSORS or ".parametrizations." in self.name) else last

    @property
    def transposed(self) -> bool:
        """Whether the module stores [..., inputs, outputs], as Conv1D and some experts do."""
        return bool(self.inputs_first)

    @property
    def inputs_first(self) -> bool | None:
        """Whether the module stores [..., inputs, outputs]; None where nothing shows it, see `storage.inputs_first`."""
        return inputs_first(self.module, self.parent)

    @property
    def parent(self) -> nn.Module | None:
        """The module that holds the parameter's module; None at the root."""
        return self.ancestors[0] if self.ancestors else None


TENSORS = ("weight", "bias", "weight_v", "weight_g", "weight_orig")  # of the old weight_norm and spectral_norm
