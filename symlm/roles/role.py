"""What a parameter is: the roles, and the place in a model where a parameter stands."""

from dataclasses import dataclass
from enum import StrEnum

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


FUSED_ATTENTION = {
    ("Phi3Attention", "qkv_proj"): "q k v",
    ("GPT2Attention", "c_attn"): "q k v",
    ("GPTNeoXAttention", "query_key_value"): "heads of q k v",
    ("DeepseekV3Attention", "kv_b_proj"): "heads of k v",
}
