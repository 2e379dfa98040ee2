"""What the code of a class calls: the functions, attributes and products that its methods name."""

import dis
import re
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

LIBRARIES = re.compile(r"(torch|builtins|lightning|pytorch_lightning)(\.|$)|transformers\.(?!models\.)")
FROM_ROWS = {"linear", "T", "mT", "t", "transpose", "swapaxes", "permute"}  # of a weight stored [outputs, inputs]
CALLED: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()
PRODUCTS = {"@", "matmul", "mm", "bmm", "addmm", "_grouped_mm", "grouped_mm"}


def functions_called(kind: type) -> frozenset[str]:
    """Return the names that the methods of a class call or read, those that it inherits too.

    Args:
        kind: A class.
    """
    if kind not in CALLED:
        CALLED[kind] = frozenset(name for code in _codes(kind) for name in code.co_names)
    return CALLED[kind]


def multiplies_from_rows(kind: type) -> bool | None:
    """Tell whether the code of a class multiplies by a weight's transpose, `x Wᵀ`, or by the weight, `x W`.

    Args:
        kind: A class that multiplies by matrices of its own.

    Returns:
        None where the code shows neither.
    """
    called = {*functions_called(kind)}
    if "einsum" in called:
        texts = (text for code in _codes(kind) for text in code.co_consts if isinstance(text, str) and "->" in text)
        found = {_sums_over_columns(*text.split("->")) for text in texts}
        return found.pop() if len(found) == 1 else None
    called |= {"@" for code in _codes(kind) for op in dis.get_instructions(code) if op.argrepr == "@"}
    return bool(called & FROM_ROWS) if called & (FROM_ROWS | PRODUCTS) else None


def _sums_over_columns(operands: str, result: str) -> bool | None:
    """Tell whether an einsum's last operand, of a layer or of stacked ones, is summed over its last axis."""
    axes, left = (parts.split() if " " in parts.strip() else [*parts] for parts in (operands.split(",")[-1], result))
    of_rows, of_columns = (axis in left for axis in axes[-2:]) if len(axes) > 1 else (False, False)
    return None if of_rows == of_columns else of_rows


def _codes(kind: type) -> list[CodeType]:
    """Return the code of every method that a class writes or inherits, but from the libraries' base classes."""
    written = [base for base in kind.__mro__ if not LIBRARIES.match(base.__module__)]
    values = (value for base in written for value in vars(base).values())
    methods = (getattr(value, "__wrapped__", value) for value in values)
    return [method.__code__ for method in methods if isinstance(method, FunctionType)]
