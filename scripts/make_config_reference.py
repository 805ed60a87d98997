"""Writes docs/config.md, the reference of all config keys, from adpo_jax/config.py.

    python scripts/make_config_reference.py

Defaults are those of `default_config()`; the meaning of a key is the comment beside or above it.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

from adpo_jax import config as config_module
from adpo_jax.config import default_config, keys

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "config.md"

HEAD = """\
# Every config key

A config of `configs/` starts from these defaults and changes what it needs; the command line does
the rest: `--config.algorithm.tau=0.5`. A misspelt key stops the run and names the nearest one. A
test sets every key and sees what it governs change.

*Written by `scripts/make_config_reference.py` from `adpo_jax/config.py`; do not edit it here.*
"""


class Entry(NamedTuple):
    """One key: its dotted name, its default as Python writes it, what it means."""

    key: str
    default: str
    meaning: str


def entries() -> list[Entry]:
    """All keys in the order of the config.

    Raises:
      ValueError: naming the keys that config.py says nothing about.
    """
    config, meanings = default_config(), comments_of_keys(Path(config_module.__file__).read_text())
    in_order = sorted(keys(config), key=list(meanings).index)
    found = [Entry(key, _default(config, key), meanings[key]) for key in in_order]
    silent = [entry.key for entry in found if not entry.meaning]
    if silent:
        raise ValueError(
            f"adpo_jax/config.py has no comment beside or right above {', '.join(silent)}: "
            "say what each means and in which unit, or which choices there are"
        )
    return found


def comments_of_keys(source: str) -> dict[str, str]:
    """The comments of each key in the dictionaries of config.py, by its dotted name."""
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    found = {}

    def dictionary(node) -> ast.Dict | None:
        """The literal that a value is or that the function it calls holds."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            node = functions.get(node.func.id)
        if isinstance(node, ast.FunctionDef):
            return next((n for n in ast.walk(node) if isinstance(n, ast.Dict)), None)
        return node if isinstance(node, ast.Dict) else None

    def walk(node: ast.Dict, prefix: str):
        for key, value in zip(node.keys, node.values):
            name, inner = prefix + key.value, dictionary(value)
            found[name] = _comment(comments, key.lineno, value.end_lineno)
            if inner is not None:
                walk(inner, name + ".")

    walk(dictionary(functions["default_config"]), "")
    return found


def _comment(comments: dict, first: int, last: int) -> str:
    """The comment lines above an entry, and those beside it."""
    above = []
    while (token := comments.get(first - 1)) and token.line.lstrip().startswith("#"):
        above.insert(0, token)
        first -= 1
    beside = [comments[line] for line in range(first + len(above), last + 1) if line in comments]
    return " ".join(token.string.lstrip("# ") for token in above + beside)


def _default(config, key: str) -> str:
    value = config
    for part in key.split("."):
        value = value[part]
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    return "unset" if value is None else repr(value)


def reference() -> str:
    """The text of docs/config.md."""
    lines, section = [HEAD], None
    for entry in entries():
        parent, _, name = entry.key.rpartition(".")
        if parent != section:
            section = parent
            title = f"`{section}`" if section else "At the top"
            lines += [f"\n## {title}\n", "| key | default | meaning |", "| --- | --- | --- |"]
        cells = (f"`{name}`", f"`{entry.default}`", entry.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    try:
        REFERENCE.write_text(reference(), encoding="utf-8")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{REFERENCE}: {len(entries())} keys")
    return 0


if __name__ == "__main__":
    sys.exit(main())
