"""How a reward function is called: by name as TRL does, or once a sample as verl does.

A function is given what its parameters name, or everything where it has `**kwargs`: the data's
columns, and what `OFFERED` lists. A function with a parameter `solution_str` is verl's
`compute_score(data_source, solution_str, ground_truth, extra_info)`.

Sources: the `GRPOTrainer` of TRL 1.16 (reward functions) and the `NaiveRewardManager` of verl.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# What the training loop offers beside the data's columns; no column may have such a name.
OFFERED = (
    "prompts",
    "completions",
    "completion_ids",
    "completion_tokens",
    "log_metric",
    "log_extra",
    "trainer_state",
)
# What it offers beside these where completions have several turns: the environments as they are
# after the rollout, and the messages of each completion, tool answers among them.
OFFERED_IN_TURNS = ("environments", "transcripts")

# What verl's functions are given, and where it comes from, see `_verl_values`.
_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """How far the run has come, for rewards that change with it; named as transformers does.

    Attributes:
      global_step: iterations done.
      max_steps: iterations of the whole run; 0 where there is no run.
    """

    global_step: int = 0
    max_steps: int = 0


NO_RUN = TrainerState()


class Text(str):
    """A completion of a plain prompt: text, which can also be read like a chat.

    TRL gives text for plain prompts and a list of messages for conversational ones. So that a
    function that was written for the latter grades the former too, `text[0]["content"]` and
    `text[-1]["content"]` are the whole text.
    """

    def __getitem__(self, index):
        if isinstance(index, int) and index in (0, -1):
            return _Message(self, index)
        return super().__getitem__(index)


class _Message(str):
    """The first or last character of a text, with the text as a message's content."""

    def __new__(cls, text: str, index: int):
        made = super().__new__(cls, str.__getitem__(text, index) if text else "")
        made._message = {"role": "assistant", "content": str(text)}
        return made

    def __getitem__(self, key):
        return self._message[key] if isinstance(key, str) else super().__getitem__(key)

    def get(self, key: str, default=None):
        return self._message.get(key, default)


class Signature(NamedTuple):
    """What a function takes.

    Attributes:
      required: the parameters without a default.
      optional: those with one.
      takes_any: whether it takes any other keyword.
      a_sample: whether it is called once a sample, as verl does.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_any: bool
    a_sample: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters."""
        return self.required + self.optional

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns that it can use; None for all there are."""
        if self.a_sample:
            return (*self.names, *_VERL, "solution", "reward_model")
        return None if self.takes_any else self.names

    def missing(self, kwargs: Iterable[str], columns: Iterable[str]) -> list[str]:
        """The parameters that nothing would be given for."""
        given = {*kwargs, *columns, *OFFERED, *(_VERL if self.a_sample else ())}
        return [name for name in self.required if name not in given]


def signature_of(found: Callable) -> Signature:
    """What a function takes.

    Raises:
      ValueError: it cannot be called by name.
    """
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        raise ValueError("its parameters are not known; write a function around it") from None
    unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if unnamed:
        raise ValueError(
            f"it is called by name, and {', '.join(unnamed)} can only be given by position; remove "
            "the slash from its parameters"
        )
    kinds = {p.kind for p in parameters}
    if kinds == {inspect.Parameter.VAR_POSITIONAL}:
        raise ValueError("it is called by name, and *args gets nothing; name what it needs")
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    names = [p.name for p in named]
    return Signature(
        required=tuple(p.name for p in named if p.default is p.empty),
        optional=tuple(p.name for p in named if p.default is not p.empty),
        takes_any=any(p.kind is p.VAR_KEYWORD for p in parameters),
        a_sample="solution_str" in names and "completions" not in names,
    )


class Log:
    """What a function logs in one call for N completions: numbers, and columns of the samples."""

    def __init__(self, count: int):
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list] = {}
        self._count = count

    def metric(self, name: str, value: float) -> None:
        """`log_metric` of TRL: a number, whose mean over the iteration's calls is logged."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def extra(self, column: str, values: list) -> None:
        """`log_extra` of TRL: one value a completion, kept beside it in the samples."""
        values = [_plain(value) for value in values]
        if len(values) != self._count:
            raise ValueError(
                f"log_extra({column!r}): wanted one value for each of {self._count} completions, "
                f"got {len(values)}"
            )
        self.extras[str(column)] = values


def keywords(
    signature: Signature,
    kwargs: dict[str, Any],
    completions: list[str],
    columns: dict[str, list],
    log: Log,
    state: TrainerState,
) -> dict[str, Any]:
    """What a function of TRL's kind is called with.

    Args:
      kwargs: the keywords of the config.
      completions: N strings.
      columns: N values under each name, those that the loop offers among them.

    Raises:
      ValueError: a parameter that nothing is given for, or a keyword that is also a column.
    """
    _refuse(signature, kwargs, columns)
    prompts = columns.get("prompts") or [""] * len(completions)
    offered = columns | {
        "completions": [
            _as_asked(text, prompt, messages)
            for text, prompt, messages in zip(
                completions, prompts, columns.get("transcripts") or [None] * len(completions)
            )
        ],
        "log_metric": log.metric,
        "log_extra": log.extra,
        "trainer_state": state,
    }
    taken = {k: v for k, v in offered.items() if signature.takes_any or k in signature.names}
    return taken | kwargs


def keywords_of_each(
    signature: Signature,
    kwargs: dict[str, Any],
    completions: list[str],
    columns: dict[str, list],
    log: Log,
    state: TrainerState,
) -> list[dict[str, Any]]:
    """What a function of verl's kind is called with for each completion; see `keywords`."""
    _refuse(signature, kwargs, columns)
    shared = {"log_metric": log.metric, "trainer_state": state}
    calls = []
    for i, text in enumerate(completions):
        row = {name: values[i] for name, values in columns.items()}
        offered = row | shared | {"completions": text} | _verl_values(row, text)
        taken = {*signature.names, *(_VERL if signature.takes_any else ())}
        calls.append({k: v for k, v in offered.items() if k in taken} | kwargs)
    return calls


def scores_of_each(results: list, log: Log) -> list:
    """What verl's functions returned, numbers or dicts with "score", as a list of rewards.

    What else such a dict holds is logged: numbers as metrics, and everything beside its completion.

    Raises:
      ValueError: a dict without "score".
    """
    for i, result in enumerate(results):
        if isinstance(result, dict) and "score" not in result:
            raise ValueError(
                f'the dict for sample {i} has no "score", but {", ".join(map(str, result))}'
            )
    more = [
        {k: v for k, v in r.items() if k != "score"} if isinstance(r, dict) else {} for r in results
    ]
    for name in dict.fromkeys(name for found in more for name in found):
        values = [found.get(name) for found in more]
        log.extra(name, values)
        for value in map(_plain, values):
            if isinstance(value, int | float) and is_finite(value):
                log.metric(name, value)
    return [r["score"] if isinstance(r, dict) else r for r in results]


def is_finite(number: int | float) -> bool:
    """Whether a float can hold a number; an integer may be too large."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def refuse_columns(columns: Iterable[str]) -> None:
    """Refuses data with a column of the name of what the loop offers.

    Raises:
      ValueError: naming the columns.
    """
    taken = [name for name in columns if name in OFFERED]
    if taken:
        raise ValueError(
            f"the data has the column {', '.join(map(repr, taken))}, but reward functions are "
            f"given {', '.join(OFFERED)} under these names by the training loop: rename the column"
        )


def _refuse(signature: Signature, kwargs: dict, columns: dict) -> None:
    both = sorted(columns.keys() & kwargs.keys())
    if both:
        raise ValueError(f"{', '.join(both)} is a data column and a reward keyword: rename one")
    if missing := signature.missing(kwargs, columns):
        raise ValueError(missing_text(missing, columns))


def missing_text(missing: list[str], columns: Iterable[str]) -> str:
    """What is said of parameters that nothing is given for."""
    return (
        f"it needs {', '.join(map(repr, missing))}, which is no column of the data; there are "
        f"{', '.join(sorted(set(columns) - {*OFFERED})) or 'none'}, and the training loop offers "
        f"{', '.join(OFFERED)}. Rename the parameter, give it a default, or set it in kwargs"
    )


def _as_asked(text: str, prompt, messages: list[dict] | None) -> Any:
    """A completion in the form of its prompt: messages for messages, text for text."""
    if isinstance(prompt, str):
        return Text(text)
    return [{"role": "assistant", "content": text}] if messages is None else messages


def _verl_values(row: dict[str, Any], text: str) -> dict[str, Any]:
    """What verl gives its functions, from a row of its data or of any other."""
    of_verl = row.get("reward_model")
    truth = row.get("ground_truth")
    if truth is None and isinstance(of_verl, dict):
        truth = of_verl.get("ground_truth")
    return {
        "solution_str": text,
        "ground_truth": row.get("solution") if truth is None else truth,
        "data_source": row.get("data_source") or "",
        "extra_info": row.get("extra_info") or {},
    }


def _plain(value) -> Any:
    """A value that JSON can hold: itself, or its text."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if isinstance(value, int) and value.bit_length() > 63:
        value = hex(value)  # in decimals Python refuses to write the longest ones
    return value if value is None or isinstance(value, str | int | float) else str(value)[:10_000]
