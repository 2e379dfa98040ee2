"""What the code of a module does to the outputs of a layer in it, one step after the other."""

import ast
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from symlm.roles.source.calls import FORM, MULTIPLY, sources_of
from symlm.roles.source.options import outcome, own_name
from symlm.roles.storage import whole_shape

ENDS = {  # calls whose results are no longer the outputs, changed
    *("softmax", "log_softmax", "sigmoid", "logsigmoid", "argmax", "cross_entropy", "loss_function", "size", "detach"),
    *("scaled_dot_product_attention", "flash_attn_func", "bmm", "baddbmm"),
    *MULTIPLY,
}
SCALES = (ast.Mult, ast.Div)
DEEPEST = 4  # calls of methods inside methods


class Step(NamedTuple):
    """Describe one thing that is done to a layer's outputs.

    Args:
        name: The function that is called; "*" for a product with a parameter of the module.
        call: The call, None for a product.
        by: The module that is called, or the name of the parameter.
        is_method: Whether the function is called as `x.f(...)`.
    """

    name: str
    call: ast.Call | None = None
    by: nn.Module | str | None = None
    is_method: bool = False

    def argument(self, place: int, keyword: str) -> ast.expr | None:
        """Return an argument of the call; None without it.

        Args:
            place: Its place among those of the function `f(x, ...)`, x at 0, also where it is called as `x.f(...)`.
            keyword: Its name.
        """
        if self.call is None:
            return None
        named = next((word.value for word in self.call.keywords if word.arg == keyword), None)
        place -= self.is_method
        return named or (self.call.args[place] if 0 <= place < len(self.call.args) else None)


class Flow(NamedTuple):
    """Describe what is done to a layer's outputs.

    Args:
        steps: What is done, in the order of the code.
        names: The names that the outputs, or their parts, are unpacked to, one tuple for each such line; empty names
            where the line picks the parts in an order of its own.
    """

    steps: tuple[Step, ...]
    names: tuple[tuple[str, ...], ...]


def flow_of(owner: nn.Module, leaf: str) -> Flow | None:
    """Read what a module's code does to the outputs of a layer, or of a product with a weight, that it holds.

    Args:
        owner: The module around the layer.
        leaf: The name of the layer, or of the weight.

    Returns:
        None where the source is not there, or nothing in it calls the layer.
    """
    reader = _Reader(owner, leaf)
    for method in reader.methods:
        if method != "__init__":
            reader.run(method)
    return Flow(tuple(dict.fromkeys(reader.steps)), tuple(dict.fromkeys(reader.names))) if reader.found else None


class _Reader:
    """Follow the outputs of one layer through the methods of a module's class."""

    def __init__(self, owner: nn.Module, leaf: str) -> None:
        self.owner, self.leaf, self.methods = owner, leaf, sources_of(type(owner))
        self.found = False
        self.steps: list[Step] = []
        self.names: list[tuple[str, ...]] = []
        self.running: list[tuple[str, int]] = []  # methods inside methods, and how many classes above the nearest one
        self.held: set[str] = set()  # the variables that hold outputs
        self.returned = False

    def run(self, method: str, given: Iterable[str] = (), above: int = 0) -> bool:
        """Read a method whose arguments of these names are outputs; tell whether it returns outputs."""
        before, self.held, self.returned = (self.held, self.returned), set(given), False
        self.running.append((method, above))
        self._lines(self.methods[method][above].body)
        self.running.pop()
        result = self.returned
        self.held, self.returned = before
        return result

    def _lines(self, lines: Iterable[ast.stmt]) -> None:
        for line in lines:
            self._line(line)

    def _line(self, line: ast.stmt) -> None:
        match line:
            case ast.Assign(targets=targets, value=value):
                flows = self._flows(value)
                for target in targets:
                    self._bind(target, flows, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, self._flows(value), value)
            case ast.AugAssign(target=target, value=value):
                if self._flows(value) or self._flows(target):
                    self._bind(target, True, value)
            case ast.Return(value=ast.expr() as value):
                self.returned |= self._flows(value)
            case ast.For(target=target, iter=value, body=body):
                self._bind(target, self._flows(value), value)
                self._lines(body)
            case ast.If(test=test, body=body, orelse=other):
                known, before = outcome(test, self.owner), set(self.held)
                self._lines(() if known is False else body)
                after, self.held = self.held, before
                self._lines(() if known else other)
                self.held |= after
            case ast.FunctionDef() | ast.ClassDef():
                pass
            case _:
                for part in ast.iter_child_nodes(line):
                    if isinstance(part, ast.stmt):
                        self._line(part)
                    elif isinstance(part, ast.expr):
                        self._flows(part)

    def _bind(self, target: ast.expr, flows: bool, value: ast.expr) -> None:
        """Note which variables hold outputs from here on."""
        if isinstance(target, ast.Subscript | ast.Attribute):
            return
        names = tuple(part.id for part in ast.walk(target) if isinstance(part, ast.Name))
        self.held = self.held | {*names} if flows else self.held - {*names}
        if flows and len(names) > 1:
            self.names.append(names if _is_in_order(value) else ("",) * len(names))

    def _flows(self, value: ast.expr) -> bool:
        """Read an expression; tell whether it is outputs."""
        match value:
            case ast.Name(id=name):
                return name in self.held
            case ast.Call():
                return self._call(value)
            case ast.BinOp(left=left, op=ast.MatMult(), right=right):
                if self._reads(left) or self._reads(right):
                    self.found = True
                    return True
                if any([self._flows(left), self._flows(right)]):
                    self.steps.append(Step("@"))
                return False
            case ast.BinOp(left=left, op=op, right=right):
                flows = [self._flows(left), self._flows(right)]
                if any(flows) and isinstance(op, SCALES):
                    factors = {own_name(part) for side in (left, right) for part in ast.walk(side)} - {None, self.leaf}
                    self.steps += [Step("*", by=name) for name in sorted(filter(None, factors))]
                return any(flows)
            case ast.GeneratorExp(elt=element, generators=loops) | ast.ListComp(elt=element, generators=loops):
                for loop in loops:
                    self._bind(loop.target, self._flows(loop.iter), loop.iter)
                return self._flows(element)
            case ast.Lambda():
                return False  # read where it is given to a call, as `map`, together with outputs
            case ast.Subscript(value=whole):
                return self._flows(whole)
            case ast.Attribute(attr=attribute) if attribute in FORM:
                return False
            case ast.IfExp(test=test, body=body, orelse=other) if (known := outcome(test, self.owner)) is not None:
                return self._flows(body if known else other)
        inner = [self._flows(part) for part in ast.iter_child_nodes(value) if isinstance(part, ast.expr)]
        return any(inner) and not isinstance(value, ast.Compare)

    def _call(self, call: ast.Call) -> bool:
        """Read a call; tell whether its result is outputs, changed or not."""
        func, own = call.func, own_name(call.func)
        name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
        given = [*call.args, *(word.value for word in call.keywords)]
        flows = [self._flows(part) for part in given]
        is_method = own is None and isinstance(func, ast.Attribute) and self._flows(func.value)
        if self._is_layer(func) or (name in MULTIPLY and any(map(self._reads, given))):
            self.found = True
            return True
        if method := self._method(func):
            names = [argument.arg for argument in self.methods[method[0]][method[1]].args.args][1 : 1 + len(call.args)]
            names += [""] * (len(call.args) - len(names)) + [word.arg or "" for word in call.keywords]
            return self.run(method[0], [name for name, flow in zip(names, flows, strict=True) if flow], method[1])
        if not (is_method or any(flows)):
            return False
        for part in given:
            if isinstance(part, ast.Lambda):
                before, self.held = self.held, self.held | {argument.arg for argument in part.args.args}
                self._flows(part.body)
                self.held = before
        child = dict(self.owner.named_children()).get(own) if own else None
        if isinstance(child, nn.Module):
            self.steps.append(Step(type(child).__name__.lower(), call, child))
            return all(shape[1:2] in ((), (1,)) for shape in map(whole_shape, child.parameters()))  # by channel
        self.steps.append(Step(name, call, is_method=is_method))
        return name not in ENDS

    def _method(self, called: ast.expr) -> tuple[str, int] | None:
        """Return the method that is called of `self` or of `super()`, and its class's place; None for others."""
        name, above = own_name(called), 0
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Call):
            kind = called.value.func
            if isinstance(kind, ast.Name) and kind.id == "super":
                name = called.attr
                above = next((place + 1 for method, place in self.running[::-1] if method == name), 0)
        exists = name is not None and above < len(self.methods.get(name, ()))
        return (name, above) if name and exists and len(self.running) < DEEPEST else None

    def _is_layer(self, called: ast.expr) -> bool:
        """Tell whether what is called is the layer, one of a list of layers, or its `forward`."""
        while isinstance(called, ast.Subscript) or (isinstance(called, ast.Attribute) and called.attr == "forward"):
            called = called.value
        return own_name(called) == self.leaf

    def _reads(self, value: ast.expr) -> bool:
        """Tell whether an expression is a form of the weight, and no output of the layer."""
        inner = [part for part in ast.walk(value) if isinstance(part, ast.Attribute)]
        return any(own_name(part) == self.leaf for part in inner) and not any(
            isinstance(part, ast.Call) and own_name(part.func) == self.leaf for part in ast.walk(value)
        )


def _is_in_order(value: ast.expr) -> bool:
    """Tell whether what is unpacked is in the order of the outputs: no tuple that picks them in another."""
    if not isinstance(value, ast.Tuple):
        return True
    picks = [[inner.slice for inner in ast.walk(part) if isinstance(inner, ast.Subscript)] for part in value.elts]
    numbers = [pick[0].value for pick in picks if len(pick) == 1 and isinstance(pick[0], ast.Constant)]
    places = [number for number in numbers if isinstance(number, int)]
    return len(places) == len(value.elts) and places == sorted(places)
