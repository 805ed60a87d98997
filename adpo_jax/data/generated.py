"""Generated tasks: `reasoning_gym:chain_sum?max_terms=3`, of the package reasoning-gym.

The tasks are drawn by a process of its own, whose hashes are always the same, since some tasks
depend on the order of sets. So the same source gives the same rows everywhere, and whatever the
package prints or leaves behind is not here.

A row has `question`, `answer` and `reasoning_gym`: the task as JSON, by which the reward of that
name asks the task's own scorer (`rewards.generated`). JSON has neither tuples nor keys that are no
text, and some scorers need both: `encoded` writes them as {"tuple": [...]} and {"dict": [[key,
value], ...]}.
"""

import dataclasses
import difflib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from absl import logging

PREFIX = "reasoning_gym:"
COLUMN = "reasoning_gym"
# Tasks of a split, and the seed of its first one; the n-th task has the n-th seed from there on.
SIZES = {"train": 1024, "held out": 128}
SEEDS = {"train": 0, "held out": 1_000_000_000}
LARGEST_SIZE = 1_000_000
REFUSED = {
    "codeio": "it runs the programs of its data",
    "composite": "name several tasks instead, with commas between them",
}


def rows(source: str, split: str) -> list[dict[str, str]]:
    """The rows of a source.

    Args:
      source: `reasoning_gym:` and the name of a task, then its options after a question mark,
        `?max_terms=3&max_digits=2`. A list has its option several times. `size` is the number of
        rows and `seed` that of the first one.
      split: "train", or any other word for tasks apart from those.

    Raises:
      ValueError: for a task or option that there is not, or options that do not go together; or
        where the package is missing.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    chosen = "train" if split == "train" else "held out"
    asked = {"name": name, "options": options_of(source, query)}
    asked["options"].setdefault("size", [str(SIZES[chosen])])
    asked["options"].setdefault("seed", [str(SEEDS[chosen])])
    began = time.perf_counter()
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"}
    process = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(asked),
        env=environment | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        said = process.stderr.strip().splitlines() or ["it said nothing"]
        raise ValueError(f"{source}: the tasks were not generated: {said[-1][:300]}")
    last = json.loads(lines.pop())
    if "error" in last:
        raise ValueError(f"{source}: {last['error']}")
    seconds = time.perf_counter() - began
    logging.info("%s: %d tasks, generated in %.1f s", source, len(lines), seconds)
    return [json.loads(line) for line in lines]


def options_of(source: str, query: str) -> dict[str, list[str]]:
    """The options behind the question mark of a source, each with all its values."""
    options: dict[str, list[str]] = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{source}: options are name=value; given {pair!r}")
        options.setdefault(key, []).append(unquote(value))
    return options


def encoded(value: Any) -> Any:
    """A value as JSON holds it, of which `rewards.generated.decoded` makes the same value."""
    if isinstance(value, tuple):
        return {"tuple": [encoded(x) for x in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encoded(key), encoded(x)] for key, x in value.items()]}
    if isinstance(value, list):
        return [encoded(x) for x in value]
    return value


# --- in the process that generates


def _generate(name: str, texts: Mapping[str, list[str]]):
    """Yields the rows of a task.

    Args:
      texts: the options as they were written.

    Raises:
      ValueError: as `rows`, without the source.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"{error.name} is missing: pip install 'adpo-jax[reasoning-gym]', or reasoning-gym"
        ) from None
    if name in REFUSED:
        raise ValueError(f"the task {name!r} is not supported: {REFUSED[name]}")
    if name not in DATASETS:
        known = sorted(DATASETS.keys() - REFUSED.keys())
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise ValueError(f"there is no task {name!r}; there are, among others, {', '.join(near)}")
    options = _typed(DATASETS[name][1](), texts)
    if not 1 <= options["size"] <= LARGEST_SIZE:
        raise ValueError(f"size is 1 to {LARGEST_SIZE}; given {options['size']}")
    try:
        dataset = reasoning_gym.create_dataset(name, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"the task refuses these options: {error}") from None
    for index in range(options["size"]):
        entry = dataset[index]
        task = {"task": name, "options": encoded(options), "entry": encoded(entry)}
        yield {
            "question": entry["question"],
            # Of some tasks any answer that keeps the rules is right, and none is given.
            "answer": entry["answer"] or "",
            COLUMN: json.dumps(task),
        }


def _typed(config, texts: Mapping[str, list[str]]) -> dict[str, Any]:
    """The options in the types that the task's config has for them."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    unknown = [key for key in texts if key not in fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"the task has no option {unknown[0]!r} (the nearest is {near!r}); it has "
            f"{', '.join(sorted(fields))}"
        )
    options = {}
    for key, values in texts.items():
        default = fields[key]
        try:
            if isinstance(default, list | tuple):
                made = [_scalar(value, default[0] if default else None) for value in values]
                options[key] = type(default)(made)
            else:
                (value,) = values
                options[key] = _scalar(value, default)
        except (ValueError, KeyError):
            given = ", ".join(values)
            raise ValueError(f"{key} is like {default!r}; given {given!r:.80}") from None
    return options


def _scalar(text: str, like: Any) -> Any:
    """A value of the type of `like`; where that is None, a number if it reads as one."""
    if isinstance(like, bool):
        return {"true": True, "false": False}[text.lower()]
    if type(like) in (int, float, str):
        return type(like)(text)
    if like is not None:
        raise ValueError(text)
    try:
        return int(text)
    except ValueError:
        return text


def main() -> None:
    """Answers the request on the standard input with rows, one a line, and a last line."""
    asked = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr  # what the package prints is no row
    try:
        for row in _generate(asked["name"], asked["options"]):
            print(json.dumps(row), file=out)
        print(json.dumps({"done": True}), file=out)
    except ValueError as error:
        print(json.dumps({"error": str(error)[:2000]}), file=out)
