"""The reward of generated tasks: the own scorers of the package reasoning-gym.

Some of these scorers evaluate what they are given as Python, by `eval` or by SymPy's parser. What a
model wrote must not run, so the modules of the package get evaluators of ours in place of those:
they read literals, arithmetic and the usual functions, and know no other name or attribute.

A scorer may take for ever over some answers. It runs in workers alone, where it can be stopped.
"""

import ast
import functools
import importlib
import json
import math
import operator
import sys
import types
from collections.abc import Mapping
from typing import Any

from adpo_jax.rewards.builtin import Completions, texts

PACKAGE = "reasoning_gym"
LONGEST_EXPRESSION = 20_000  # characters


def reasoning_gym(
    completions: Completions, reasoning_gym: list[str], log_metric=None, **columns
) -> list[float]:
    """What the task's own scorer gives for the answer, mostly 0.0 to 1.0.

    The answer is what the last <answer> and </answer> have between them, or else what follows the
    last "####", or else the whole completion. An answer at which the scorer fails gets 0.0, and is
    counted as `scorer_failed`.

    Args:
      completions: N strings, or N chats of which the last message counts.
      reasoning_gym: N tasks as JSON, from a data source `reasoning_gym:...`.
      **columns: ignored.

    Raises:
      ValueError: the package is missing, or a column that holds no such task.
    """
    try:
        importlib.import_module(PACKAGE)
    except ImportError as error:
        raise ValueError(
            f"reward function reasoning_gym: {error.name} is missing: "
            "pip install 'adpo-jax[reasoning-gym]', or reasoning-gym"
        ) from None
    rewards = []
    for text, column in zip(texts(completions), reasoning_gym, strict=True):
        dataset, entry = _task(column)
        reward = _reward(dataset, answer_of(text), entry)
        if log_metric is not None:
            log_metric("scorer_failed", float(reward is None))
        rewards.append(reward or 0.0)
    return rewards


def answer_of(text: str) -> str:
    """The part of a completion that is the answer."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    return text.rpartition("####")[2].strip()


def _reward(dataset, answer: str, entry: dict[str, Any]) -> float | None:
    """The scorer's reward; None where it fails or gives none."""
    try:
        reward = float(dataset.score_answer(answer, entry))
    except MemoryError:
        raise
    except Exception:
        return None
    return reward if math.isfinite(reward) else None


def _task(column: str) -> tuple[Any, dict[str, Any]]:
    """The data set of a task, and the task."""
    try:
        task = json.loads(column)
        dataset = _dataset(task["task"], json.dumps(task["options"]))
        entry = decoded(task["entry"])
        entry["answer"], entry["metadata"]
    except (TypeError, KeyError, ValueError, AssertionError, RecursionError) as error:
        raise ValueError(
            f"the column {PACKAGE} holds no task of this package, as a data source "
            f"reasoning_gym:... gives it: {type(error).__name__}: {error}"[:400]
        ) from None
    return dataset, entry


@functools.lru_cache(maxsize=64)
def _dataset(name: str, options: str):
    package = importlib.import_module(PACKAGE)
    dataset = package.create_dataset(name, **decoded(json.loads(options)))
    _guard()  # after the import of all modules
    return dataset


def decoded(value: Any) -> Any:
    """The value that `data.generated.encoded` wrote as JSON."""
    if isinstance(value, list):
        return [decoded(x) for x in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(decoded(x) for x in content)
    if kind == "dict":
        return {decoded(key): decoded(x) for key, x in content}
    raise ValueError(f"a value of the kind {kind!r:.40}")


# --- evaluators in place of those that run what they are given


def _guard() -> None:
    """Puts the evaluators in place in the modules of the package."""
    import sympy

    guarded_sympy = _GuardedSympy("sympy")
    for name, module in list(sys.modules.items()):
        if not name.startswith(PACKAGE + ".") or module is None:
            continue
        names = vars(module)
        # A name of the module comes before the built-in one.
        names["eval"], names["exec"] = evaluated, _refused
        for key, value in list(names.items()):
            if value is sympy:
                names[key] = guarded_sympy
            elif value in (sympy.parse_expr, sympy.sympify) and callable(value):
                names[key] = parsed


def _refused(*_):
    raise ValueError("nothing is executed here")


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}


def _tree(text: str) -> ast.expr:
    if len(text) > LONGEST_EXPRESSION:
        raise ValueError(f"an expression of {len(text)} characters")
    return ast.parse(text.strip(), mode="eval").body


def evaluated(text: str, *_) -> Any:
    """The value of a literal or of arithmetic with numbers, in place of `eval`.

    Raises:
      ValueError: for anything else, names, calls and attributes among it.
      SyntaxError: for what is no expression.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.List(elts=parts):
                return [value(part) for part in parts]
            case ast.Tuple(elts=parts):
                return tuple(value(part) for part in parts)
            case ast.Set(elts=parts):
                return {value(part) for part in parts}
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {value(k): value(v) for k, v in zip(keys, values)}
            case ast.BinOp(left=left, op=op, right=right):
                return _OPERATORS[type(op)](_number(value(left)), _number(value(right)))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](_number(value(operand)))
        raise ValueError(f"{type(node).__name__} is not evaluated")

    return value(_tree(text))


def _number(value: Any) -> Any:
    if not isinstance(value, int | float | complex):
        raise ValueError("arithmetic is with numbers")
    return value


_CONSTANTS = frozenset(("pi", "E", "I", "oo"))
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "sinh", "cosh")
    + ("tanh", "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs", "erf")
)
_SYMBOLIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd)


def parsed(text: Any, local_dict: Mapping[str, Any] | None = None, **_) -> Any:
    """A SymPy expression of numbers, letters and the usual functions, in place of its parser.

    Raises:
      ValueError: for anything else.
      SyntaxError: for what is no expression.
    """
    import sympy

    if not isinstance(text, str):
        return sympy.sympify(text)  # which evaluates texts alone
    symbols = dict(local_dict or {})

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | str() | bytes() | complex() | None):
                pass
            case ast.Constant(value=int(number)):
                return sympy.Integer(number)
            case ast.Constant(value=float(number)):
                return sympy.Float(number)
            case ast.Name(id=name) if name in symbols:
                return symbols[name]
            case ast.Name(id=name) if name in _CONSTANTS:
                return getattr(sympy, name)
            case ast.Name(id=name) if len(name) == 1:
                return sympy.Symbol(name)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if (
                name in _FUNCTIONS and name not in symbols
            ):
                return getattr(sympy, name)(*map(value, arguments))
            case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _SYMBOLIC):
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand) if isinstance(op, _SYMBOLIC):
                return _OPERATORS[type(op)](value(operand))
        raise ValueError(f"{type(node).__name__} is not parsed")

    return value(_tree(text))


class _GuardedSympy(types.ModuleType):
    """SymPy, whose parsers are `parsed`."""

    parse_expr = sympify = S = staticmethod(parsed)

    def __getattr__(self, name: str):
        import sympy

        return getattr(sympy, name)
