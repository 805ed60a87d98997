"""Writes docs/config.md, the reference of all config keys, from their declarations.

    python scripts/make_config_reference.py

The keys are declared in adpo_jax/config.py, the parameters of algorithms in adpo_jax/losses/.
"""

import sys
from pathlib import Path

from adpo_jax.config import Key, declarations

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "config.md"

HEAD = """\
# Every config key

A config of `configs/` starts from these defaults and changes what it needs; the command line does
the rest: `--config.algorithm.tau=0.5`. A misspelt key stops the run and names what was meant, and
so does a value that is not allowed or has no effect. A test sets every key and sees what it governs
change.

*Written by `scripts/make_config_reference.py` from the declarations in `adpo_jax/config.py` and
`adpo_jax/losses`; do not edit it here.*
"""


def reference() -> str:
    """The text of docs/config.md."""
    lines, section = [HEAD], None
    for name, key in declarations().items():
        parent, _, short = name.rpartition(".")
        if parent != section:
            section = parent
            title = f"`{section}`" if section else "At the top"
            lines += [
                f"\n## {title}\n",
                "| key | default | allowed | meaning |",
                "| --- " * 4 + "|",
            ]
        default = "unset" if key.default is None else repr(key.default)
        cells = (f"`{short}`", f"`{default}`", key.allows, _meaning(key))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _meaning(key: Key) -> str:
    needs = " and ".join(need.text for need in key.needs)
    return f"{key.meaning}; no effect without {needs}" if needs else key.meaning


def main() -> int:
    REFERENCE.write_text(reference(), encoding="utf-8")
    print(f"{REFERENCE}: {len(declarations())} keys")
    return 0


if __name__ == "__main__":
    sys.exit(main())
