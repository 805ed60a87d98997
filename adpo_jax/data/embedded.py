"""The embedded tasks: data, tokenizers and small models that come with the package.

A name such as "embedded:calculator" stands for the data and for the model of a task. Each task is a
module with `NAME`, `rows`, `MODEL_CONFIG` and `make_tokenizer`. `SOURCES` has beside them the data
that any model is trained on. Data that have `OPTIONS` take them behind a question mark:
"embedded:word_problems?max_steps=2".
"""

from types import ModuleType

from adpo_jax.data import arithmetic, calculator, guess_number, word_problems
from adpo_jax.data.generated import options_of

TASKS: dict[str, ModuleType] = {task.NAME: task for task in (arithmetic, calculator, guess_number)}
SOURCES: dict[str, ModuleType] = TASKS | {word_problems.NAME: word_problems}


def is_embedded(source: str) -> bool:
    """Whether a source, options included, is data that come with the package."""
    return source.partition("?")[0] in SOURCES


def rows(source: str, split: str) -> dict[str, list]:
    """The columns of a split of embedded data.

    Raises:
      ValueError: for another split, and for options that the data do not have.
    """
    name, _, query = source.partition("?")
    bounds = getattr(SOURCES[name], "OPTIONS", {})
    options = {}
    for option, texts in options_of(source, query).items():
        if option not in bounds:
            known = ", ".join(bounds) or "none"
            raise ValueError(f"{source}: {name} has the options {known}; given {option!r}")
        least, most = bounds[option]
        text = texts[-1]
        if not (text.isdecimal() and text.isascii() and len(text) < 10):
            raise ValueError(f"{source}: {option} is a whole number; given {text!r:.40}")
        options[option] = int(text)
        if not least <= options[option] <= most:
            raise ValueError(f"{source}: {option} is {least} to {most}; given {text}")
    return SOURCES[name].rows(split, **options)
