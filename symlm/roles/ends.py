"""The token matrices at the ends of every model inside a module: embeddings and heads."""

from collections.abc import Collection, Iterator
from itertools import takewhile
from typing import Any

from torch import nn

from symlm.roles.role import Role, Site, whole_shape
from symlm.roles.wrappers import unwrapped_path

HEADS = ("lm_head", "output", "embed_out", "output_projection", "unembed", "head", "score", "classifier")


class EndMatrices:
    """Find the token matrices of a module and of all models in it, by getters, classes, names and shapes.

    Args:
        model: The module: a model, or anything with models inside (a policy beside a value head, a LightningModule).

    Raises:
        ValueError: A trainable embedding has sparse gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        kinds = (nn.Embedding, nn.EmbeddingBag)
        self.tables = {path: module for path, module in self.modules.items() if isinstance(module, kinds)}
        if sparse := [path for path, table in self.tables.items() if table.sparse and table.weight.requires_grad]:
            raise ValueError(f"{sparse} give sparse gradients, which no rule accepts: build them with sparse=False")
        self.inputs = set(self._weights("get_input_embeddings")) | {id(t.weight) for t in self.tables.values()}
        self.outputs = set(self._weights("get_output_embeddings"))
        self.outputs |= {id(module.weight) for _, module in self._heads_by_shape()}

    def role(self, site: Site) -> Role | None:
        """Return the role of a parameter if it is a token matrix.

        A linear layer with a name of `HEADS` beside an embedding is one too, unless the `config.problem_type` above it
        names a loss without a softmax: only a softmax ignores a shared shift.

        Args:
            site: The parameter's site.

        Returns:
            The role, or None for any other parameter.
        """
        is_input = id(site.parameter) in self.inputs
        if id(site.parameter) in self.outputs or self._is_named_head(site):
            return Role.TIED_EMBEDDING if is_input else Role.LM_HEAD
        return Role.EMBEDDING if is_input else None

    def is_unclear(self, site: Site) -> bool:
        """Tell whether a parameter may be a head whose tokens are elsewhere, as in a pipeline's last stage.

        Args:
            site: The parameter's site.
        """
        blocks = any("attention" in type(module).__name__.lower() for module in self.modules.values())
        return not self.tables and blocks and site.leaf in HEADS and len(site.shape) == 2 and site.shape[0] > 1

    def _weights(self, getter: str) -> Iterator[int]:
        """Yield the ids of the weights that any module's getter returns, those of wrapped modules too."""
        for module in self.modules.values():
            try:
                end: Any = getattr(module, getter)()
            except (AttributeError, NotImplementedError, TypeError):
                continue
            if isinstance(end, nn.Module):
                yield from (id(p) for name, p in end.named_parameters() if _is_weight(name) and min(p.shape) > 1)

    def _is_named_head(self, site: Site) -> bool:
        if site.leaf not in HEADS or len(site.shape) != 2 or min(site.shape) < 2:
            return False
        if not isinstance(self.modules.get(".".join(site.path)), nn.Linear) and not isinstance(site.module, nn.Linear):
            return False
        above = ".".join(site.path[:-1])
        has_tokens = any(_is_inside(path, above) for path in self.tables)
        return has_tokens and self._has_softmax(site.path)

    def _has_softmax(self, path: tuple[str, ...]) -> bool:
        """Ask the nearest config above a module."""
        for k in range(len(path), -1, -1):
            config: Any = getattr(self.modules.get(".".join(path[:k])), "config", None)
            if hasattr(config, "problem_type"):
                return config.problem_type not in ("regression", "multi_label_classification")
        return True

    def _heads_by_shape(self) -> Iterator[tuple[str, nn.Linear]]:
        """Yield the linear layers over a table's tokens in the smallest module with both, hidden layers left out."""
        linears = {
            path: module
            for path, module in self.modules.items()
            if isinstance(module, nn.Linear) and module.weight.requires_grad and module.out_features > 1
        }
        for table_path, table in self.tables.items():
            if self._has_getter(table_path):
                continue
            shape = whole_shape(table.weight)
            alike = {path: linear for path, linear in linears.items() if whole_shape(linear.weight) == shape}
            scope = table_path
            while scope and not any(_is_inside(path, scope) for path in alike):
                scope = scope.rpartition(".")[0]
            heads = [
                (path, linear)
                for path, linear in alike.items()
                if _is_inside(path, scope) and not self._is_hidden(path, linear, alike)
            ]
            yield from heads[-1:] if shape[0] == shape[1] else heads

    def _has_getter(self, path: str) -> bool:
        """Tell whether a model around a table has named its head already."""
        parts = path.split(".")
        for k in range(len(parts) - 1, -1, -1):
            module = self.modules.get(".".join(parts[:k]))
            try:
                if isinstance(getattr(module, "get_output_embeddings")(), nn.Module):  # noqa: B009
                    return True
            except (AttributeError, NotImplementedError, TypeError):
                continue
        return False

    def _is_hidden(self, path: str, linear: nn.Linear, alike: Collection[str]) -> bool:
        """Tell whether a layer is in a block that is repeated, or feeds another layer beside it."""
        parts = unwrapped_path(path.split("."))
        if parts[-1] not in HEADS and len({other for other in alike if _block(other) == _block(path)}) > 1:
            return True
        above = self.modules.get(".".join(parts[:-1]))
        siblings = list(above.children()) if above is not None else []
        later = siblings[len(list(takewhile(lambda child: child is not linear, siblings))) + 1 :]
        return any(isinstance(child, nn.Linear) and child.in_features == linear.out_features for child in later)


def _block(path: str) -> str:
    """Return a path with the numbers of its blocks left out; a number at the end counts the heads of a list."""
    *above, last = path.split(".")
    return (
        ".".join(["*" if part.isdigit() else part for part in above] + [last]) if any(map(str.isdigit, above)) else path
    )


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] in ("weight", "weight_v") or "parametrizations." in name


def _is_inside(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")
