"""Bugs for real functions: small changes of the syntax tree, each with a stable name.

Invariant: the n-th mutation of a source is the same on every machine, because sites are numbered in the
order of the tree walk.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

_COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_COMPUTED: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.FloorDiv: (ast.Mod,),
    ast.Mod: (ast.FloorDiv,),
}
_CALLED = {"max": "min", "min": "max", "append": "extend", "any": "all", "all": "any"}

Change = tuple[str, Callable[[], None]]
"""What a mutation is called, and the deed."""


def mutation_names(source: str) -> list[str]:
    """The names of all mutations of a function's source, such as `compare/3/LtE`."""
    return [name for name, _ in _changes(ast.parse(source))]


def mutate(source: str, names: list[str]) -> str:
    """The source with the named mutations; raises `KeyError` for a name that it does not have."""
    tree = ast.parse(source)
    changes = dict(_changes(tree))
    for name in names:
        changes[name]()
    return ast.unparse(tree) + "\n"


def _changes(tree: ast.Module) -> Iterator[Change]:
    for site, node in enumerate(list(ast.walk(tree))):
        for kind, deed in _changes_of(node):
            yield f"{type(node).__name__.lower()}/{site}/{kind}", deed


def _changes_of(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Compare(ops=[op]):
            for comparison in _COMPARED.get(type(op), ()):
                yield comparison.__name__, _setter(node, "ops", [comparison()])
        case ast.BinOp(op=op) | ast.AugAssign(op=op):
            for operator in _COMPUTED.get(type(op), ()):
                yield operator.__name__, _setter(node, "op", operator())
            if isinstance(node, ast.BinOp) and isinstance(op, ast.Sub | ast.FloorDiv | ast.Mod):
                yield "swap", _swapper(node, "left", "right")
        case ast.BoolOp(op=ast.And()):
            yield "Or", _setter(node, "op", ast.Or())
        case ast.BoolOp(op=ast.Or()):
            yield "And", _setter(node, "op", ast.And())
        case ast.If(test=ast.UnaryOp(op=ast.Not(), operand=operand)):
            yield "drop_not", _setter(node, "test", operand)
        case ast.While(test=ast.UnaryOp(op=ast.Not(), operand=operand)):
            yield "drop_not", _setter(node, "test", operand)
        case ast.Return(value=ast.UnaryOp(op=ast.Not(), operand=operand)):
            yield "drop_not", _setter(node, "value", operand)
        case ast.Constant(value=bool(value)):
            yield "flip", _setter(node, "value", not value)
        case ast.Constant(value=int(value)):
            yield "more", _setter(node, "value", value + 1)
            yield "less", _setter(node, "value", value - 1)
        case ast.Call(func=ast.Name(id=name)) if name in _CALLED:
            yield _CALLED[name], _setter(node.func, "id", _CALLED[name])
        case ast.Call(func=ast.Attribute(attr=name)) if name in _CALLED:
            yield _CALLED[name], _setter(node.func, "attr", _CALLED[name])


def _setter(node: ast.AST, field: str, value: object) -> Callable[[], None]:
    return lambda: setattr(node, field, value)


def _swapper(node: ast.AST, one: str, two: str) -> Callable[[], None]:
    def swap() -> None:
        first, second = getattr(node, one), getattr(node, two)
        setattr(node, one, second)
        setattr(node, two, first)

    return swap


def rename_variables(source: str, names: dict[str, str]) -> str:
    """The source with variables renamed wherever they are read or set."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    return ast.unparse(tree) + "\n"
