"""Heads that only their shapes show: layers over the tokens of a table that are no hidden layers of a block."""

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from symlm.roles.recognizers.layers import activates, is_alone, is_dense, shape_of
from symlm.roles.recognizers.logits import is_called_head
from symlm.roles.storage import whole_shape
from symlm.roles.wrappers import inner_module, unwrapped_path


class HeadsByShape:
    """Look for layers that have a row for each token of a table.

    Args:
        modules: The modules of the model by path.
        by_path: The same, those in wrappers by the paths without them too.
    """

    def __init__(self, modules: Mapping[str, nn.Module], by_path: Mapping[str, nn.Module]) -> None:
        self.modules, self.by_path = modules, by_path

    def over(self, path: str, shape: tuple[int, ...]) -> list[nn.Module]:
        """Return the layers over a table's tokens in the smallest module with both, hidden layers left out.

        Args:
            path: The table's path.
            shape: Its shape, tokens first.
        """
        linears = {
            place: module
            for place, module in self.modules.items()
            if is_dense(module) and any(p.requires_grad for p in weights_of(module))
        }
        alike = {place: linear for place, linear in linears.items() if _shape_of(linear) == shape}
        heads = {place: linear for place, linear in alike.items() if not self._is_hidden(place, linear, alike)}
        named = {place for place in heads if is_called_head(unwrapped_path(place.split("."))[-1])}
        heads = {place: linear for place, linear in heads.items() if place in named or not named}
        scope = path
        while scope and not any(is_inside(place, scope) for place in heads):
            scope = scope.rpartition(".")[0]
        inside = [linear for place, linear in heads.items() if is_inside(place, scope)]
        return inside[-1:] if shape[0] == shape[1] else inside

    def _is_hidden(self, path: str, linear: nn.Module, alike: Collection[str]) -> bool:
        """Tell whether a layer is in a block that is repeated, or feeds another layer beside it."""
        parts = unwrapped_path(path.split("."))
        if not is_called_head(parts[-1]) and len({other for other in alike if _block(other) == _block(path)}) > 1:
            return True
        return self.feed_another(path, _shape_of(linear)[0])

    def feed_another(self, path: str, rows: int) -> bool:
        """Tell whether a layer beside one, or beside its box, reads its outputs: one after it, or one back.

        Args:
            path: The layer's path.
            rows: Its number of outputs.
        """
        parts = unwrapped_path(path.split("."))
        box = self.by_path.get(".".join(parts[:-1]))
        boxed = isinstance(box, nn.Sequential) and is_alone(box) and activates(box)
        if self._is_read(parts, rows) or (boxed and self._is_read(parts[:-1], rows)):
            return True
        siblings = dict(box.named_children()) if box is not None and not is_called_head(parts[-1]) else {}
        own, others = siblings.get(parts[-1]), (inner_module(child) for child in siblings.values())
        back = _shape_of(own)[::-1] if isinstance(own, nn.Linear) else None
        return any(isinstance(child, nn.Linear) and _shape_of(child) == back for child in others if child is not own)

    def _is_read(self, parts: list[str], rows: int) -> bool:
        """Tell whether a layer behind a module, in the same module around both, has as many inputs."""
        above = self.by_path.get(".".join(parts[:-1])) if parts else None
        beside = dict(above.named_children()) if above is not None else {}
        names = [*beside]
        later = names[names.index(parts[-1]) + 1 :] if parts and parts[-1] in names else []
        children = (inner_module(beside[name]) for name in later)
        return any(isinstance(child, nn.Linear) and child.in_features == rows for child in children)


def weights_of(end: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the matrices of a table or a head, inside wrappers too, and not those of adapters on it.

    Args:
        end: The table or the head.
    """
    for name, p in end.named_parameters():
        path = unwrapped_path(["end", *name.split(".")[:-1]])
        if path == ["end"] and len(whole_shape(p)) == 2 and whole_shape(p)[1] > 1:
            yield p


def is_inside(path: str, above: str) -> bool:
    """Tell whether a path leads to a module or into it.

    Args:
        path: The path.
        above: The module's path.
    """
    return not above or path == above or path.startswith(f"{above}.")


def _block(path: str) -> str:
    """Return a path with the numbers of its blocks left out; a number at the end counts the heads of a list."""
    *above, last = path.split(".")
    return (
        ".".join(["*" if part.isdigit() else part for part in above] + [last]) if any(map(str.isdigit, above)) else path
    )


def _shape_of(layer: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs), also where the weight is computed from others or emptied."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else shape_of(layer)[::-1]  # type: ignore[return-value]
