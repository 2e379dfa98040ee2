"""What the code of a class calls: the functions, attributes and products that its methods name."""

import ast
import dis
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

LIBRARIES = re.compile(r"(torch|builtins|lightning|pytorch_lightning)(\.|$)|transformers\.(?!models\.)")
FROM_ROWS = {"linear", "T", "mT", "t", "transpose", "swapaxes", "permute"}  # of a weight stored [outputs, inputs]
CALLED: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()
LAYERS: WeakKeyDictionary[type, bool] = WeakKeyDictionary()
SOURCES: WeakKeyDictionary[type, dict[str, list[ast.FunctionDef]]] = WeakKeyDictionary()
# Methods in which a weight only gets its values.
CONSTRUCTS = re.compile(r"(^|_)(init|initiali[sz]e|reset|tie|resize|load|save)(_|$)")
FORM = ("dtype", "device", "shape", "size", "data")
OF_PLACES = re.compile(r"pos|rel|dist|bias|type|segment")  # in names of tables whose products are an attention's scores
MULTIPLY = {"linear", "einsum", "matmul", "mm", "bmm", "addmm"}
PRODUCTS = {"@", "_grouped_mm", "grouped_mm"} | MULTIPLY - {"linear", "einsum"}


def functions_called(kind: type) -> frozenset[str]:
    """Return the names that the methods of a class call or read, those that it inherits too, constructors left out.

    Args:
        kind: A class.
    """
    if kind not in CALLED:
        CALLED[kind] = frozenset(name for code in _codes(kind) if not _constructs(code) for name in code.co_names)
    return CALLED[kind]


def multiplies_from_rows(kind: type) -> bool | None:
    """Tell whether the code of a class multiplies by a weight's transpose, `x Wᵀ`, or by the weight, `x W`.

    Args:
        kind: A class that multiplies by matrices of its own.

    Returns:
        None where the code shows neither.
    """
    return _from_rows(_codes(kind))


def methods_of(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """Yield the methods of a class by name, the nearest first, then what they override, but not the libraries'.

    Args:
        kind: A class.
    """
    for base in (base for base in kind.__mro__ if not LIBRARIES.match(base.__module__)):
        for name, value in vars(base).items():
            if isinstance(method := getattr(value, "__wrapped__", value), FunctionType):
                yield name, method


def sources_of(kind: type) -> dict[str, list[ast.FunctionDef]]:
    """Return the sources of the methods of a class, the nearest first, then what they override, but not the libraries'.

    Args:
        kind: A class.

    Returns:
        By the method's name; one whose source is not there is left out.
    """
    if kind not in SOURCES:
        found: dict[str, list[ast.FunctionDef]] = {}
        for name, method in methods_of(kind):
            if source := _source(method):
                found.setdefault(name, []).append(source)
        SOURCES[kind] = found
    return SOURCES[kind]


def makes_logits(module: object, *table: str) -> bool:
    """Tell whether code of a module multiplies by the transpose of a table: `F.linear(x, self.table.weight)`.

    It is code of a method, or of a function that the module holds; not what a constructor only may do.

    Args:
        module: A module, or an object that holds one.
        table: The attributes that lead to the matrix: ("table", "weight"), or ("table",) of a parameter that other code
            of the class reads by rows.
    """
    held = [value.__code__ for value in vars(module).values() if isinstance(value, FunctionType)]
    codes = [code for code in _codes(type(module)) if not _constructs(code)]
    products = (code for code in codes + held if {*code.co_names} & MULTIPLY or _multiplies(code))
    names = [part for part in table if part != "weight"][-2:]
    return not any(map(is_of_places, names)) and any(_reads(code, table) and _from_rows([code]) for code in products)


def multiplies_by_weight(kind: type) -> bool:
    """Tell whether a class multiplies by its own `weight`, as a layer of any name does, and looks nothing up in it.

    Args:
        kind: A class.
    """
    if kind not in LAYERS:
        codes = [code for code in _codes(kind) if not _constructs(code) and "weight" in code.co_names]
        LAYERS[kind] = any({*code.co_names} & MULTIPLY or _multiplies(code) for code in codes)
    return LAYERS[kind]


def is_of_places(path: str) -> bool:
    """Tell whether a table is of positions, distances or types, by its name.

    Args:
        path: The table's path.
    """
    return bool(OF_PLACES.search(path.rpartition(".")[2]))


def looks_up(kind: type, name: str) -> bool:
    """Tell whether a method of a class reads rows of a matrix: `self.name[ids]` or `F.embedding(ids, self.name)`.

    Args:
        kind: A class.
        name: The attribute that is the matrix.
    """
    codes = [code for code in _codes(kind) if name in code.co_names]
    return any(
        "embedding" in code.co_names
        or any("SUBSCR" in step.opname or step.argrepr == "[]" for step in dis.get_instructions(code))
        for code in codes
    )


def _constructs(code: CodeType) -> bool:
    """Tell whether code is that of a method in which weights only get their values, or of a function in it."""
    return bool(CONSTRUCTS.search(code.co_qualname.partition(".<")[0].rpartition(".")[2]))


def _from_rows(codes: list[CodeType]) -> bool | None:
    """Tell whether code multiplies by the transpose of a weight, by the weight, or by neither of them (None)."""
    called = {name for code in codes for name in code.co_names}
    if "einsum" in called:
        texts = (text for code in codes for text in code.co_consts if isinstance(text, str) and "->" in text)
        found = {_sums_over_columns(*text.split("->")) for text in texts}
        return found.pop() if len(found) == 1 else None
    called |= {"@" for code in codes if _multiplies(code)}
    return bool(called & FROM_ROWS) if called & (FROM_ROWS | PRODUCTS) else None


def _multiplies(code: CodeType) -> bool:
    """Tell whether code has a product of matrices, `a @ b`."""
    return any(step.argrepr == "@" for step in dis.get_instructions(code))


def _reads(code: CodeType, path: tuple[str, ...]) -> bool:
    """Tell whether code reads attributes in a row, as `table.weight` or `["table"].weight`, and not just its form."""
    steps = [step.argval for step in dis.get_instructions(code) if "SUBSCR" not in step.opname and step.argrepr != "[]"]
    places = range(len(steps) - len(path))
    return any((*steps[k : k + len(path)],) == path and steps[k + len(path)] not in FORM for k in places)


def _sums_over_columns(operands: str, result: str) -> bool | None:
    """Tell whether an einsum's last operand, of a layer or of stacked ones, is summed over its last axis."""
    axes, left = (parts.split() if " " in parts.strip() else [*parts] for parts in (operands.split(",")[-1], result))
    of_rows, of_columns = (axis in left for axis in axes[-2:]) if len(axes) > 1 else (False, False)
    return None if of_rows == of_columns else of_rows


def _codes(kind: type) -> list[CodeType]:
    """Return the code of every method that a class has, but from the libraries' base classes.

    What a method overrides counts only where it calls `super`.
    """
    codes: dict[str, list[CodeType]] = {}
    for name, method in methods_of(kind):
        above = codes.get(name)
        if above is None or any("super" in code.co_names for code in above):
            codes[name] = [*(above or ()), *_with_inner(method.__code__)]
    return [code for method in codes.values() for code in method]


def _source(method: FunctionType) -> ast.FunctionDef | None:
    """Return the source of a method; None where it is not there."""
    try:
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(method))).body
    except (OSError, SyntaxError, ValueError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """Yield code and that of the functions and comprehensions in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _with_inner(inner)
