"""Parameters of algorithms: how one is declared, how it is checked, and the union of them all.

A parameter is a field of an algorithm's dataclass, declared by `parameter`. Config keys, their
documentation and the refusals of keys without effect are made from these declarations alone.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from adpo_jax.losses import shared

_BOUNDS = ("above", "least", "most")

# Values that switch off what a parameter is for, and in `needs` the word for every other value.
OFF = (False, 0, None, "none", "auto")
SET = object()


def parameter(
    default: Any,
    meaning: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    choices: tuple[str, ...] = (),
    needs: Mapping[str, Any] | None = None,
) -> Any:
    """A field of an algorithm that users set.

    Args:
      default: the default; None for a parameter that may stay unset, whose annotation then has the
        type of its other values.
      meaning: the meaning for the documentation, without a full stop.
      above, least, most: bounds of a number.
      choices: the texts allowed.
      needs: other parameters of the algorithm, with the values under which this one has an effect;
        `SET` for every value that is not among those of `OFF`.
    """
    bounds = {"above": above, "least": least, "most": most, "choices": choices}
    return dataclasses.field(
        default=default, metadata={"meaning": meaning, "needs": dict(needs or {}), **bounds}
    )


def with_default(algorithm: type, name: str, default: Any) -> Any:
    """The field of another algorithm's parameter, with another default."""
    declared = next(field for field in dataclasses.fields(algorithm) if field.name == name)
    return dataclasses.field(default=default, metadata=declared.metadata)


def scale_rewards_parameter() -> Any:
    """The parameter of algorithms that standardise rewards (`shared.scale_rewards`)."""
    return parameter(
        "group",
        "rewards less their group's mean are divided by the standard deviation (ddof=1) of the "
        "group or the batch, or by nothing",
        choices=("group", "batch", "none"),
        needs={"multi_objective_aggregation": "sum_then_normalize"},
    )


def check(algorithm) -> None:
    """Raises ValueError for the first parameter of an algorithm that is out of its bounds."""
    for field in dataclasses.fields(algorithm):
        value, declared = getattr(algorithm, field.name), field.metadata
        assert "meaning" in declared, f"{field.name} of {algorithm.name} is no `parameter`"
        if declared["choices"]:
            shared.check_choice(field.name, value, declared["choices"])
            continue
        kind = kind_of(type(algorithm), field.name)
        if value is None and field.default is None:
            continue
        if kind is bool and not isinstance(value, bool | np.bool_):
            raise ValueError(f"{field.name} must be True or False, got {value!r}")
        if kind in (int, float):
            shared.check_number(field.name, value, **{name: declared[name] for name in _BOUNDS})
        if kind is int and int(value) != value:
            raise ValueError(f"{field.name} must be a whole number, got {value!r}")


def kind_of(algorithm: type, name: str) -> type:
    """The type of a parameter's values, None aside."""
    hint = _hints(algorithm)[name]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    assert len(kinds) == 1, f"{name} of {algorithm.name} has values of several types: {hint}"
    return kinds[0]


@functools.cache
def _hints(algorithm: type) -> Mapping[str, Any]:
    return typing.get_type_hints(algorithm)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter with its declarations by the algorithms that have it.

    Attributes:
      kind: the type of its values; it may also be None.
      fields: the declarations, by the names of the algorithms.
    """

    name: str
    kind: type
    fields: Mapping[str, dataclasses.Field]

    @property
    def default(self) -> Any:
        """The default that all algorithms share; None where they have different ones."""
        defaults = {field.default for field in self.fields.values()}
        return defaults.pop() if len(defaults) == 1 else None

    @property
    def meaning(self) -> str:
        """Its meaning; where algorithms differ, every meaning, and every default."""
        text = self._told(lambda field: field.metadata["meaning"])
        if len({field.default for field in self.fields.values()}) > 1:
            text += f"; the default is {self._told(lambda field: f'{field.default!r}', ' for {}')}"
        return text

    @property
    def allowed(self) -> str:
        """The choices or bounds in words."""
        return self._told(_allowed)

    @property
    def needs(self) -> Mapping[str, Any]:
        """Other parameters, with the values under which this one has an effect."""
        return {k: v for field in self.fields.values() for k, v in field.metadata["needs"].items()}

    def _told(self, tell, whose: str = " ({})") -> str:
        """What `tell` says of the declarations, once where all algorithms agree."""
        told = {}
        for name, field in self.fields.items():
            told.setdefault(tell(field), []).append(name)
        if len(told) == 1:
            return next(iter(told))
        return ", ".join(text + whose.format(listed(names)) for text, names in told.items())


def union(algorithms: Collection[type]) -> list[Parameter]:
    """The parameters of all algorithms: first those that all have, then those of some."""
    fields, kinds = {}, {}
    for algorithm in algorithms:
        for field in dataclasses.fields(algorithm):
            fields.setdefault(field.name, {})[algorithm.name] = field
            kinds.setdefault(field.name, kind_of(algorithm, field.name))
    found = [Parameter(name, kinds[name], of_each) for name, of_each in fields.items()]
    return sorted(found, key=lambda parameter: len(parameter.fields) < len(algorithms))


def listed(names: Iterable[str]) -> str:
    """a, b and c."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _allowed(field: dataclasses.Field) -> str:
    declared = field.metadata
    if declared["choices"]:
        return ", ".join(declared["choices"])
    texts = {"above": "above", "least": "at least", "most": "at most"}
    bounds = [f"{texts[n]} {declared[n]:g}" for n in _BOUNDS if math.isfinite(declared[n])]
    return " and ".join(bounds)
