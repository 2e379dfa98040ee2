"""How a test of a module's options comes out, which switches off parts of its code."""

import ast
import inspect
from typing import Any

from torch import nn

UNKNOWN = object()


def outcome(test: ast.expr, owner: nn.Module) -> bool | None:
    """Return how a test of plain options of a module comes out; None where it asks for anything else.

    Args:
        test: The test, as `self.flag`, `self.score == "softmax"`, `self.norm is not None` or `exists(self.norm)`.
        owner: The module that `self` is.
    """
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return None if (known := outcome(inner, owner)) is None else not known
        case ast.BoolOp(op=ast.And(), values=parts):
            known_parts = [outcome(part, owner) for part in parts]
            return False if False in known_parts else True if all(known_parts) else None
        case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as op], comparators=[ast.Constant(value=None)]):
            value = _value(left, owner)
            return None if value is UNKNOWN else (value is None) == isinstance(op, ast.Is)
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[ast.Constant(value=str() | int() as other)]):
            own = _value(left, owner)
            return own == other if isinstance(own, str | int) else None
        case ast.Call(func=ast.Name(id="exists"), args=[inner]):
            return None if (value := _value(inner, owner)) is UNKNOWN else value is not None
    value = _value(test, owner)
    return bool(value) if isinstance(value, bool | int | float | str | None) else None


def _value(test: ast.AST, owner: nn.Module) -> Any:
    """Return what an attribute of `self` is, `UNKNOWN` for anything else; no property is asked."""
    name = own_name(test)
    if name is None or name == "training":
        return UNKNOWN
    parts = {**vars(owner), **dict(owner.named_children()), **dict(owner.named_parameters(recurse=False))}
    value = parts.get(name, inspect.getattr_static(type(owner), name, UNKNOWN))
    return UNKNOWN if isinstance(value, property) else value


def own_name(value: ast.AST) -> str | None:
    """Return the name of an attribute of `self`; None for anything else.

    Args:
        value: An expression.
    """
    if not isinstance(value, ast.Attribute) or not isinstance(value.value, ast.Name) or value.value.id != "self":
        return None
    return value.attr
