"""What verl, TRL and Tunix call things, so that what their users bring is taken as it is.

docs/coming_from.md has the same names, and a test holds the two in step.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

# Names in verl's trainer.logger of what every run writes anyway.
_WRITTEN_ANYWAY = ("console", "tensorboard")


class Cure(NamedTuple):
    """What stands here for a name of another trainer.

    Attributes:
      trainers: whose name it is.
      keys: the keys of our config.
      text: what else to do; where there are keys, how to set them.
    """

    trainers: str
    keys: tuple[str, ...]
    text: str = ""

    def __str__(self) -> str:
        parts = [" and ".join(self.keys)] if self.keys else []
        return ": ".join(parts + ([self.text] if self.text else []))


def taken_as_given(config: ConfigDict) -> None:
    """Brings what verl's users write into this config's form, in place.

    That is a list of files, as "['a.parquet','b.parquet']", and loggers that need no naming.
    """
    for section, key in (("data", "train_files"), ("data", "val_files"), ("sft", "train_files")):
        config[section][key] = ",".join(_listed(config[section][key], f"{section}.{key}"))
    names = [n for given in config.trainer.logger for n in _listed(given, "trainer.logger")]
    config.trainer.logger = tuple(name for name in names if name not in _WRITTEN_ANYWAY)


def _listed(text: str, key: str) -> list[str]:
    """The texts of a list, with quotation marks or, as Hydra takes it, without; else the text."""
    text = str(text)
    if not text.strip().startswith("[") or Path(text).exists():
        return [text]
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        if not text.strip().endswith("]"):
            raise ValueError(f"{key}: the list {text!r} has no end; write ['a','b']") from None
        found = [part.strip() for part in text.strip()[1:-1].split(",")]
    if not isinstance(found, list) or not all(isinstance(x, str) and x for x in found):
        raise ValueError(f"{key} is a list of texts, as ['a','b']; given {text!r}")
    if odd := [name for name in found if "," in name and key != "trainer.logger"]:
        raise ValueError(f"{key}: a comma ends a file's name, and {odd[0]!r} has one; rename it")
    return found
