"""Which statements of a lesson only prepare or print what it shows: the player dims them."""

from __future__ import annotations

import ast
from collections.abc import Iterator

_PRINTS = {"table", "show"}
_ASKS = {"predict", "check", "break_it"}


def harness_lines(tree: ast.Module) -> set[int]:
    """The lines of such statements.

    They are the calls of the lesson's own functions (a claim is none of them: it says what is shown), and what is used
    by these alone and does not run the package.
    """
    subject, statements = _subject(tree), tree.body[1:]
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "spec"]
    specs = {_root(keyword.value) for keyword in keywords}  # functions that an answer is compared with
    printers = set(_PRINTS)
    for statement in statements:  # a function of the lesson that draws something with these
        if isinstance(statement, ast.FunctionDef) and _calls(statement) & printers and not _calls(statement) & subject:
            printers.add(statement.name)
    found = {s for s in statements if _is_printed(s, printers) or _prepares(s, subject)}
    found |= {s for s in statements if isinstance(s, ast.FunctionDef) and s.name in printers | specs}
    while leave := {s for s in found if _bound(s) & _read(set(statements) - found) and not _is_printed(s, printers)}:
        found -= leave
    return {line for s in found for line in range(s.lineno, (s.end_lineno or s.lineno) + 1)}


def _subject(tree: ast.Module) -> set[str]:
    """Names of what the lesson is about: imported from the package, or made by calling such names."""
    subject = set[str]()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("paged_ref."):
            subject |= {alias.asname or alias.name for alias in node.names}
    subject -= _PRINTS | _ASKS | {"claim", "build", "plug_in", "plant", "todo"}
    while any(not _bound(s) <= subject and _calls(s) & subject for s in tree.body):
        subject |= {name for s in tree.body if _calls(s) & subject for name in _bound(s)}
    return subject


def _is_printed(statement: ast.stmt, printers: set[str]) -> bool:
    """The statement is a call of the lesson's functions, perhaps with a name for the result."""
    call = getattr(statement, "value", None) if isinstance(statement, (ast.Expr, ast.Assign)) else None
    if not isinstance(call, ast.Call):
        return False
    if isinstance(call.func, ast.Attribute):
        return call.func.attr == "grade"
    return isinstance(call.func, ast.Name) and call.func.id in printers | _ASKS


def _prepares(statement: ast.stmt, subject: set[str]) -> bool:
    """The statement binds names without running the package. Settings, in capitals, are for the reader to see."""
    kinds = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For)
    settings = any(name.isupper() for name in _bound(statement))
    return isinstance(statement, kinds) and not settings and not _calls(statement) & subject


def _calls(statement: ast.stmt) -> set[str]:
    """The names whose values are called, or whose methods are."""
    return {_root(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)}


def _root(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _bound(statement: ast.stmt) -> set[str]:
    """The names that the statement binds, or fills with .append() and the like."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    return set(_bound_inside(statement))


def _bound_inside(statement: ast.stmt) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and _fills(node):
            yield _root(node)


def _fills(node: ast.Attribute | ast.Subscript) -> bool:
    return isinstance(node.ctx, ast.Store) or getattr(node, "attr", "") in ("append", "extend", "update")


def _read(statements: set[ast.stmt]) -> set[str]:
    nodes = [node for statement in statements for node in ast.walk(statement)]
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
