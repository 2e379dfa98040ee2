"""The token matrices at a model's two ends: embeddings and the head."""

from torch import Tensor, nn

from symlm.roles.role import Role, Site, whole_shape

HEADS = ("lm_head", "output", "embed_out", "output_projection", "unembed", "head", "score", "classifier")


class EndMatrices:
    """Find the token matrices of a model, by its getters, its modules' classes or their shapes.

    Args:
        model: The model, wrapped or not.

    Raises:
        ValueError: A trainable embedding has sparse gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root = model = unwrapped(model)
        self.input = _weight(model, "get_input_embeddings")
        self.output: Tensor | None = _weight(model, "get_output_embeddings")
        kinds = (nn.Embedding, nn.EmbeddingBag)
        named = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
        if sparse := [path for path, table in named.items() if table.sparse and table.weight.requires_grad]:
            raise ValueError(f"{sparse} give sparse gradients, which no rule accepts: build them with sparse=False")
        tables = list(named.values())
        self.tables = {id(table.weight) for table in tables}
        linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        if self.output is None and linears:
            shapes = {whole_shape(table.weight) for table in tables}
            self.output = linears[-1] if whole_shape(linears[-1]) in shapes else None
        task = getattr(getattr(model, "config", None), "problem_type", None)
        self.has_softmax = bool(tables) and task not in ("regression", "multi_label_classification")

    def role(self, site: Site) -> Role | None:
        """Return the role of a parameter if it is a token matrix.

        A linear layer at the root with a name of `HEADS` is one too, unless the model has no embedding or its
        `config.problem_type` names a loss without a softmax: only a softmax ignores a shared shift.

        Args:
            site: The parameter's site.

        Returns:
            The role, or None for any other parameter.
        """
        parameter = site.parameter
        is_input = parameter is self.input or id(parameter) in self.tables
        named = site.parent is self.root and site.leaf in HEADS and isinstance(site.module, nn.Linear)
        is_head = named and self.has_softmax and len(site.shape) == 2 and site.shape[0] > 1
        if parameter is self.output or is_head:
            return Role.TIED_EMBEDDING if is_input else Role.LM_HEAD
        return Role.EMBEDDING if is_input else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile, DataParallel and DDP.

    Args:
        model: The model, wrapped any number of times or not at all.

    Returns:
        The innermost model.
    """
    while True:
        wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _weight(model: nn.Module, getter: str) -> nn.Parameter | None:
    """Return the weight of the module that a model's getter returns, if there is one."""
    try:
        return getattr(getattr(model, getter)(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
