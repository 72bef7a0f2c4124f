"""What an exported graph demands of its inputs, as data: sizes that are fixed, bounded, equal or divisible.

torch.export keeps its guards as compiled code. They are read from the messages of its assertions into nested
lists, such as ["==", ["size", 0, 1], 4], and checked by walking these: a file brings no code.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from splitquant_plugins.errors import InputError

NAME = "_guards_fn"  # as torch.export calls the submodule
_PREFIX = "Guard failed: "
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "/": operator.truediv,
    "%": operator.mod,
    "max": lambda a, b: torch.sym_max(a, b),  # type: ignore[no-untyped-call]
    "min": lambda a, b: torch.sym_min(a, b),  # type: ignore[no-untyped-call]
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
}
_UNARY: dict[str, Callable[[Any], Any]] = {"not": operator.not_, "neg": operator.neg, "isnan": math.isnan}
_OPERATORS: dict[type[ast.AST], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
    ast.Div: "/",
    ast.Mod: "%",
    ast.And: "and",
    ast.Or: "or",
}
DEEPEST = 32


class Guards(nn.Module):
    """Check inputs, given flat and in order, against conditions; AssertionError names the first that fails."""

    _is_impure = True  # its result is unused, and it is no dead code

    def __init__(self, conditions: Sequence[Any], names: Sequence[str]) -> None:
        super().__init__()
        self.conditions = [list(condition) for condition in conditions]
        self.names = list(names)

    def forward(self, *inputs: Any) -> None:
        """Raise where a condition does not hold."""
        for condition in self.conditions:
            holds, message = _evaluate(condition, inputs), _PREFIX + _text(condition, self.names)
            torch._assert(holds, message)  # type: ignore[no-untyped-call]


def guards_of(model: GraphModule, names: Sequence[str], in_spec: pytree.TreeSpec) -> list[Any]:
    """Return the conditions of an exported graph, or of a loaded one; none where it has none.

    `names` are the names of the arguments that `in_spec` nests. Raises InputError for a guard that says more
    than arithmetic on sizes, strides and numbers can.
    """
    guards = getattr(model, NAME, None)
    if guards is None:
        return []
    if isinstance(guards, Guards):
        return guards.conditions
    messages = _messages(guards.forward)
    sources = {_normal(path): number for number, path in enumerate(leaf_names(names, in_spec))}
    return [_read(message.removeprefix(_PREFIX), sources) for message in messages]


def _messages(guards: Any) -> list[str]:
    """Return what the assertions of torch.export's function say, which is wrapped without a trace of the wrapping."""
    found = [guards, *(cell.cell_contents for cell in guards.__closure__ or ())]
    codes = [each.__code__ for each in found if inspect.isfunction(each) and each.__name__ == "_"]
    if not codes:
        raise InputError("the graph's guards cannot be read, and without them it cannot be saved")
    return [text for text in codes[0].co_consts if isinstance(text, str) and text.startswith(_PREFIX)]


def leaf_names(names: Sequence[str], in_spec: pytree.TreeSpec) -> list[str]:
    """Return how each flat input is reached from the arguments, such as x or y['mask'][0]."""
    args, kwargs = pytree.tree_unflatten(range(in_spec.num_leaves), in_spec)
    found = []
    for name, nest in zip(names, [*args, *kwargs.values()], strict=True):
        found += [name + pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(nest)[0]]
    return found


def _normal(text: str) -> str:
    return ast.unparse(ast.parse(text, mode="eval"))


def _read(text: str, sources: dict[str, int]) -> Any:
    try:
        return _condition(ast.parse(text, mode="eval").body, sources)
    except (ValueError, SyntaxError):
        raise InputError(f"the graph demands of its inputs that {text}, which cannot be saved") from None


def _condition(node: ast.expr, sources: dict[str, int]) -> Any:
    if (number := sources.get(ast.unparse(node))) is not None:
        return ["input", number]
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
        return node.value
    if isinstance(node, ast.Compare):
        values = [_condition(value, sources) for value in (node.left, *node.comparators)]
        links = [[_OPERATORS[type(o)], a, b] for o, a, b in zip(node.ops, values[:-1], values[1:], strict=True)]
        return _chain("and", links)
    if isinstance(node, ast.BoolOp):
        return _chain(_OPERATORS[type(node.op)], [_condition(value, sources) for value in node.values])
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return [_OPERATORS[type(node.op)], _condition(node.left, sources), _condition(node.right, sources)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        return ["not" if isinstance(node.op, ast.Not) else "neg", _condition(node.operand, sources)]
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Call) and isinstance(node.slice, ast.Constant):
        called = node.value.func
        if isinstance(called, ast.Attribute) and called.attr in ("size", "stride") and not node.value.args:
            return [called.attr, sources.get(ast.unparse(called.value), -1), node.slice.value]
    if isinstance(node, ast.Call) and not node.keywords:
        name = ast.unparse(node.func).removeprefix("math.").lower()
        if name in ("max", "min", "isnan"):
            return _chain(name, [_condition(value, sources) for value in node.args])
    raise ValueError(ast.unparse(node))


def _chain(name: str, values: Sequence[Any]) -> Any:
    if name in _UNARY:
        return [name, *values]
    total = values[0]
    for value in values[1:]:
        total = [name, total, value]
    return total


def check_conditions(conditions: Any, inputs: int) -> list[Any]:
    """Return the conditions of a file; ValueError for what `guards_of` does not write."""
    if not isinstance(conditions, list):
        raise ValueError("its guards are no list")
    for condition in conditions:
        if not isinstance(condition, list):
            raise ValueError("a guard is no condition")
        _check(condition, inputs, 0)
    return conditions


def _check(condition: Any, inputs: int, depth: int) -> None:
    if not isinstance(condition, list):
        if condition is None or type(condition) in (bool, int, float, str):
            return
        raise ValueError("a guard holds what is no number")
    if depth > DEEPEST or not condition or not isinstance(condition[0], str):
        raise ValueError("a guard is no condition")
    name, *values = condition
    if name in ("input", "size", "stride"):
        whole = all(type(value) is int for value in values) and len(values) == (1 if name == "input" else 2)
        if not whole or not 0 <= values[0] < inputs or (len(values) == 2 and not 0 <= values[1] < 64):
            raise ValueError(f"a guard reads {name} {values}")
        return
    if len(values) != {**dict.fromkeys(_BINARY, 2), **dict.fromkeys(_UNARY, 1)}.get(name, -1):
        raise ValueError(f"a guard has {len(values)} values for {name!r}")
    for value in values:
        _check(value, inputs, depth + 1)


def _evaluate(condition: Any, inputs: Sequence[Any]) -> Any:
    if not isinstance(condition, list):
        return condition
    name = condition[0]
    if name == "input":
        return inputs[condition[1]]
    if name == "size":
        return inputs[condition[1]].size()[condition[2]]
    if name == "stride":
        return inputs[condition[1]].stride()[condition[2]]
    if name in _UNARY:
        return _UNARY[name](_evaluate(condition[1], inputs))
    return _BINARY[name](_evaluate(condition[1], inputs), _evaluate(condition[2], inputs))


def _text(condition: Any, names: Sequence[str]) -> str:
    if not isinstance(condition, list):
        return repr(condition)
    name, *values = condition
    if name == "input":
        return names[values[0]]
    if name in ("size", "stride"):
        return f"{names[values[0]]}.{name}()[{values[1]}]"
    shown = [_text(value, names) for value in values]
    if name in _UNARY or name in ("max", "min"):
        return f"{name}({', '.join(shown)})"
    sides = [
        f"({text})" if isinstance(value, list) and value[0] in _BINARY else text
        for text, value in zip(shown, values, strict=True)
    ]
    return f" {name} ".join(sides)


def is_guard(node: Node) -> bool:
    """Whether a node calls the guards."""
    return node.op == "call_module" and node.target == NAME
