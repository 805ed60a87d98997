"""Lists the keys of the config with their defaults and meanings: `adpo-jax keys [WORD]`."""

import sys

from adpo_jax.run.command_line import Parser
from adpo_jax.run.exit_codes import USER_ERROR


def main() -> int:
    """Prints the keys whose name or meaning holds a word; returns the exit code."""
    parser = Parser(prog="adpo-jax keys", description="Keys of the config, set by --config.KEY=V.")
    parser.add_argument("word", nargs="?", default="", help="part of a name or a meaning")
    word = parser.parse_args().word.lower()
    # After the arguments, since this imports JAX.
    from adpo_jax.config import declarations
    from adpo_jax.run.other_trainers import NAMES

    found = {
        name: key
        for name, key in declarations().items()
        if word in name.lower() or word in key.meaning.lower()
    }
    for name, key in found.items():
        allowed = f" ({key.allows})" if key.allows else ""
        print(f"{name} = {key.default!r}\n    {key.meaning}{allowed}")
    others = {name: cure for name, cure in NAMES.items() if word and word in name.lower()}
    for name, cure in others.items():
        print(f"{name}, a name of {cure.trainers}\n    here: {cure}")
    if not found and not others:
        print(f"error: no key's name or meaning has the word {word!r}", file=sys.stderr)
        return USER_ERROR
    return 0
