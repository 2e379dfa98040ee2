"""The token matrices at the ends of every model inside a module: embeddings and heads."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from symlm.roles.heads import HeadsByShape, is_inside, weights_of
from symlm.roles.recognizers.attention import is_attention
from symlm.roles.recognizers.layers import heads_of, is_dense
from symlm.roles.recognizers.logits import (
    HEADS,
    caps_logits,
    has_other_loss,
    is_adaptive,
    normalizes,
    scales_rows,
)
from symlm.roles.role import Role, Site
from symlm.roles.source.calls import is_of_places, looks_up, makes_logits
from symlm.roles.storage import whole_shape
from symlm.roles.wrappers import by_unwrapped_path, unwrapped_path

FEWEST = 16  # tokens of a vocabulary; a table of fewer is of classes, types or steps


class EndMatrices:
    """Find the token matrices of a module and of all models in it, by getters, classes, names and shapes.

    Args:
        model: The module: a model, or anything with models inside (a policy beside a value head, a LightningModule).

    Raises:
        ValueError: A trainable embedding has sparse gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.by_path = by_unwrapped_path(self.modules)
        self.heads = HeadsByShape(self.modules, self.by_path)
        self.tables = {path: module for path, module in self.modules.items() if _looks_up(module)}
        tables = self.tables.items()
        if sparse := [path for path, t in tables if getattr(t, "sparse", False) and t.weight.requires_grad]:
            raise ValueError(f"{sparse} give sparse gradients, which no rule accepts: build them with sparse=False")
        self.inputs = {id(p) for table in self.tables.values() for p in weights_of(table)}
        self.inputs |= {id(p) for end in self._ends("get_input_embeddings") if _is_table(end) for p in weights_of(end)}
        self.outputs = {id(p) for end in self._ends("get_output_embeddings") for p in weights_of(end)}
        self.vocabulary = max((whole_shape(table.weight)[0] for table in self.tables.values()), default=0)
        for path, table in self.tables.items():
            shape = whole_shape(table.weight)
            few = shape[0] < max(2, min(FEWEST, self.vocabulary))
            heads = [] if few or is_of_places(path) or self._has_getter(path) else self.heads.over(path, shape)
            self.outputs |= {id(p) for head in heads for p in weights_of(head)}
            self.outputs |= {id(table.weight)} if not heads and self._makes_logits(path) else set()

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
        heads = heads_of(site.parent) if is_input else 0
        if is_input and (any("bias" in part for part in site.path[-2:]) or site.shape[1] == heads):
            return Role.VECTOR  # a number for each bucket and head: no rotation mixes heads
        if isinstance(site.module, nn.Linear) and is_adaptive(site):
            return Role.LM_HEAD
        if id(site.parameter) in self.outputs or self._is_named_head(site):
            return Role.TIED_EMBEDDING if is_input else Role.LM_HEAD
        return Role.EMBEDDING if is_input else None

    def is_unclear(self, site: Site) -> bool:
        """Tell whether a layer that no structure around it explains may be a head.

        It has as many rows as there are tokens, or a few more or less, as a padded vocabulary or one with tokens that
        are never predicted has; or it is named like a head
        in a module with attention and without tokens, as a pipeline's last stage.

        Args:
            site: The parameter's site.
        """
        path = ".".join(site.path)
        if len(site.shape) != 2 or min(site.shape) < 2 or self._has_getter(path):
            return False
        if self.tables:
            rows, columns = site.shape[::-1] if site.transposed else site.shape
            widths = {whole_shape(table.weight)[1] for table in self.tables.values()}
            more = rows - self.vocabulary
            padded = columns in widths and more != 0 and -8 <= more <= max(self.vocabulary // 8, 8)
            over_tokens = (rows == self.vocabulary or padded) and rows not in widths and self.vocabulary >= FEWEST
            return over_tokens and not self.heads.feed_another(path, rows)
        blocks = any("attention" in type(module).__name__.lower() for module in self.modules.values())
        sizes = self._sizes_of_heads(site.path)
        return blocks and site.leaf in HEADS and (not sizes or site.shape[0] > site.shape[1])

    def is_capped(self, site: Site) -> bool:
        """Tell whether the logits of a head are capped, by the nearest module around it that shows it.

        Args:
            site: The head's site.
        """
        parts = site.name.split(".")  # with the wrappers, which may scale
        owners = [self.modules.get(".".join(parts[:k])) for k in range(len(parts))]
        if any(scales_rows(owner, site.shape[0]) or has_other_loss(owner) for owner in owners if owner is not None):
            return True
        if ".parametrizations." in site.name or site.name.endswith(("weight_v", "weight_orig")):
            return True  # by its norms
        if site.parent is not None and normalizes(site.parent):
            return True
        places = range(len(site.path) - 1, -1, -1)
        around = [(site.module, "weight"), *((self.by_path.get(".".join(site.path[:k])), site.path[k]) for k in places)]
        said = (caps_logits(module, name) for module, name in around if module is not None)
        return next((capped for capped in said if capped is not None), False)

    def _ends(self, getter: str) -> Iterator[nn.Module]:
        """Yield the modules that any module's getter returns."""
        for module in self.modules.values():
            try:
                end: Any = getattr(module, getter)()
            except (AttributeError, NotImplementedError, TypeError):
                continue
            if isinstance(end, nn.Module):
                yield end

    def _makes_logits(self, path: str) -> bool:
        """Tell whether the code of a module around a table, or of one that holds it, makes logits with its weight."""
        table, parts = self.tables[path], path.split(".")
        reads = [(self.modules[".".join(parts[:k])], *unwrapped_path(parts[k:]), "weight") for k in range(len(parts))]
        reads.append((table, "weight"))
        plain = (
            value for owner in self.modules.values() for value in vars(owner).values() if hasattr(value, "__dict__")
        )
        held = [(value, vars(value)) for value in plain if not isinstance(value, type)]  # by what is no module itself
        held += [(owner, owner._modules) for owner in self.modules.values()]
        reads += [(owner, key, "weight") for owner, values in held for key, value in values.items() if value is table]
        weights = [(owner, owner._parameters.items()) for owner in self.modules.values() if owner is not table]
        reads += [(owner, key) for owner, values in weights for key, value in values if value is table.weight]
        return any(makes_logits(owner, *names) for owner, *names in reads)

    def _is_named_head(self, site: Site) -> bool:
        in_a_list = len(site.path) > 1 and site.path[-1].isdigit() and site.path[-2].rstrip("s") in HEADS
        if in_a_list and isinstance(site.parent, nn.Sequential):  # a head with layers in front of it
            in_a_list = [*filter(is_dense, site.parent.children())][-1:] == [site.module]
        if (site.leaf not in HEADS and not in_a_list) or len(site.shape) != 2 or min(site.shape) < 2:
            return False
        dense = isinstance(self.by_path.get(".".join(site.path)), nn.Linear) or is_dense(site.module)
        if not dense or is_attention(site.parent):
            return False
        above = ".".join(site.path[: -2 if in_a_list else -1])
        has_tokens = any(is_inside(path, above) and not is_of_places(path) for path in self.tables)
        counted = site.shape[0] in self._sizes_of_heads(site.path)  # of a model of sounds or images
        return (has_tokens or counted) and self._has_softmax(site.path)

    def _has_softmax(self, path: tuple[str, ...]) -> bool:
        """Ask the nearest config above a module, then the code around it."""
        kinds = [config.problem_type for config in self._configs(path) if hasattr(config, "problem_type")]
        if kinds and kinds[0]:
            return kinds[0] not in ("regression", "multi_label_classification")
        around = filter(None, (self.by_path.get(".".join(path[:k])) for k in range(len(path))))
        return bool(kinds) or not any(map(has_other_loss, around))

    def _sizes_of_heads(self, path: tuple[str, ...]) -> set[int]:
        """Return how many classes or tokens the nearest config above a module counts, or a model of classes itself."""
        above = (self.by_path.get(".".join(path[:k])) for k in range(len(path), -1, -1))
        owners = (next(self._configs(path), None), *above)
        sizes = [getattr(owner, name, None) for owner in owners for name in ("num_labels", "vocab_size", "num_classes")]
        return {size for size in sizes if isinstance(size, int)}

    def _configs(self, path: tuple[str, ...]) -> Iterator[Any]:
        """Yield the configs above a module, the nearest first."""
        found = (getattr(self.by_path.get(".".join(path[:k])), "config", None) for k in range(len(path), -1, -1))
        yield from (config for config in found if config is not None)

    def _has_getter(self, path: str) -> bool:
        """Tell whether a model around a table has named its head already."""
        parts = path.split(".")
        for k in range(len(parts) - 1, -1, -1):
            module = self.by_path.get(".".join(parts[:k]))
            try:
                if isinstance(getattr(module, "get_output_embeddings")(), nn.Module):  # noqa: B009
                    return True
            except (AttributeError, NotImplementedError, TypeError):
                continue
        return False


def _looks_up(module: nn.Module) -> bool:
    """Tell whether a module is a table whose rows are looked up: torch's, or one of another class with that name."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    named = type(module).__name__.endswith("Embedding") and weight is not None and len(whole_shape(weight)) == 2
    return named and looks_up(type(module), "weight")


def _is_table(end: nn.Module) -> bool:
    """Tell whether an input embedding is over tokens: patches go through a linear layer or a convolution."""
    return any("embedding" in type(module).__name__.lower() for module in end.modules())
