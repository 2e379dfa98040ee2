"""What the names of layers say: projections of attention, fused ones, gates, and layers into channels and out."""

import re

from symlm.roles.role import Role

TOKENS = {  # parts of the names of projections, as `w_q`, `Wq`, `to_query`, `q_lin` or `query_global` have them
    Role.ATTENTION_Q: {"q", "qs", "query", "queries", "wq", "qw", "qproj", "toqueries"},
    Role.ATTENTION_K: {"k", "ks", "key", "keys", "wk", "kw", "kproj", "tokeys"},
    Role.ATTENTION_V: {"v", "vs", "value", "values", "wv", "vw", "vproj", "tovalues"},
    Role.ATTENTION_O: {"o", "out", "output", "dense", "wo", "ow", "oproj"},
}
FILLERS = {"w", "to", "c", "add", "linear", "lin", "fc", "proj", "project", "net", "attn", "b", "global"}
FILLERS |= {"attention", "w2e", "e2w", "e2e", "projection", "head", "heads", "layer", "mat", "map", "matrix"}
FILLERS |= {"att", "weight", "weights", "transform", "mha", "sa", "in"}
FILLERS |= {"protein", "structure", "msa", "layout", "vision", "text"}  # what a projection reads
OUTPUTS = ("c_proj", "proj")
FUSED_TOKENS = {
    *("qkv", "kqv", "qvk", "vqk", "qk", "kv", "qv", "qkvz", "qkvo", "qkvg", "ba", "zba", "pack"),
    *("wqkv", "wkv", "wqk", "wpack", "qkvw", "toqkv", "toqk", "tokv", "fused"),
}
FUSED_NAMES = ("c_attn", "query_key_value", "key_value", "in_proj", "in_proj_weight")
NOT_FUSED = ("kv_a_proj_with_mqa", "kv_a_proj", "wkv_a", "index_qk_proj")  # low ranks; what only chooses keys
HEAD_COUNTS = (
    *("num_heads", "n_head", "n_heads", "num_attention_heads", "heads", "nhead", "nheads", "num_head"),
    *("n_local_heads", "groups"),
)
GATING = {"gate", "gating", "g", "gk", "wg"}
INTO = ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h")
OUT_OF = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "linear_out")
BY_NAME = {**dict.fromkeys(INTO, Role.MLP_IN), **dict.fromkeys(OUT_OF, Role.MLP_OUT)}
SQUARE = {  # last words that decide only where the shapes do not
    **dict.fromkeys(("gate", "up", "in", "wi", "expand"), Role.MLP_IN),
    **dict.fromkeys(("down", "out", "wo", "contract"), Role.MLP_OUT),
}
IN_AND_OUT = {"in": Role.MLP_IN, "wi": Role.MLP_IN, "out": Role.MLP_OUT, "wo": Role.MLP_OUT}
ALONE = {  # where no layer stands beside that reads the channels
    **dict.fromkeys(("q_a_proj", "wq_a", "kv_a_proj_with_mqa", "kv_a_proj", "wkv_a"), Role.MLP_IN),
    **dict.fromkeys(("per_layer_model_projection", "per_layer_input_gate"), Role.MLP_IN),
    **dict.fromkeys(("per_layer_projection", "conv_kernel_layer"), Role.MLP_OUT),
    **{"modality_router": Role.MLP_IN, "prediction_coefs": Role.MLP_OUT, "correction_coefs": Role.MLP_OUT},
    **dict.fromkeys(("vocab_transform", "weight_proj", "sampling_offsets", "attention_weights"), Role.MLP_IN),
    **{"o_a_proj": Role.MLP_IN, "o_b_proj": Role.MLP_OUT, "head_linear": Role.MLP_IN},
    **dict.fromkeys(("up_proj_for_speech", "up_proj_for_vision_speech", "action_time_mlp_in"), Role.MLP_IN),
    **dict.fromkeys(("down_proj_for_speech", "down_proj_for_vision_speech", "action_time_mlp_out"), Role.MLP_OUT),
    **{"input_mix_weight_down": Role.MLP_IN, "input_mix_weight_up": Role.MLP_OUT, "block_inject_weight": Role.MLP_IN},
}
NUMBERED = re.compile(r"(fc|lin|linear|layer|dense)_?\d")
QKV = {Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V}


def is_gate(leaf: str) -> bool:
    """Tell whether a name is that of a gate, which multiplies what an attention puts out.

    Args:
        leaf: The name of the layer.
    """
    return bool(set(parts_of(leaf)) & GATING) and not is_fused(leaf)


def gated_projection(leaf: str) -> Role | None:
    """Return which projection a name is for together with a gate, as `q_gate_proj`; None for other names.

    Args:
        leaf: The name of the layer.
    """
    words = set(parts_of(leaf))
    known = [role for role, names in TOKENS.items() if words & names and role in QKV]
    return known[0] if len(known) == 1 and words & GATING else None


def projection(leaf: str) -> Role | None:
    """Return which projection of an attention a name is for, if any; it counts where q, k and v stand together.

    Args:
        leaf: The name of the projection.
    """
    words = set(parts_of(leaf)) - FILLERS
    known = [role for role, names in TOKENS.items() if words & names]
    if not known or not words <= set.union(*(TOKENS[role] for role in known)):
        return Role.ATTENTION_O if leaf in OUTPUTS else None
    others = [role for role in known if role is not Role.ATTENTION_O]  # of `query_dense`
    return (others or known)[0] if len(others) < 2 else None


def is_fused(leaf: str) -> bool:
    """Tell whether a projection's name says that it fuses several, in an order that only the module's code shows.

    Args:
        leaf: The name of the projection.
    """
    words = set(parts_of(leaf))
    several = sum(bool(words & TOKENS[role]) for role in QKV) > 1
    return leaf not in NOT_FUSED and (leaf.lower() in FUSED_NAMES or several or bool(FUSED_TOKENS & words))


def parts_of(leaf: str) -> list[str]:
    """Cut a name at underscores, at numbers behind it, and where a capital follows a small letter.

    Args:
        leaf: The name.
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])|\d+$", "_", leaf).lower().strip("_").split("_")


def last_word(name: str) -> str:
    """Return the last word of a name, numbers left out.

    Args:
        name: The name.
    """
    return name.rstrip("_0123456789").rpartition("_")[2]
