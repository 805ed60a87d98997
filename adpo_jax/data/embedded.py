"""The embedded tasks: data, tokenizers and small models that come with the package.

A name such as "embedded:calculator" stands for the data and for the model of a task. Each task is a
module with `NAME`, `rows`, `MODEL_CONFIG` and `make_tokenizer`. `SOURCES` has beside them the data
that any model is trained on.
"""

from types import ModuleType

from adpo_jax.data import arithmetic, calculator, guess_number, word_problems

TASKS: dict[str, ModuleType] = {task.NAME: task for task in (arithmetic, calculator, guess_number)}
SOURCES: dict[str, ModuleType] = TASKS | {word_problems.NAME: word_problems}
