"""Numbers as people type them, and numbers as people read them."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def parse_number(text: str) -> float:
    """The value of a number, or of a term with + - * / // and brackets. Raises ValueError for any other text."""
    plain = text.replace(",", "").replace("_", "").replace("×", "*").strip()
    share = plain.endswith("%")
    try:
        value = _value(ast.parse(plain.rstrip("% "), mode="eval").body)
        if not math.isfinite(value):
            raise ValueError
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        raise ValueError(f"{text[:40]!r} is not a number; 27, 2*3*8, 1,000 and 50% are") from None
    return value / 100 if share else value


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError


def number_text(value: Any) -> str:
    """The number as people read it: 131,072 and 0.25."""
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        value = value.item()
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:,.4g}"
    return f"{value:,}" if type(value) is int else str(value)
