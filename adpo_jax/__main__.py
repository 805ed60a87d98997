"""The console command `adpo-jax`, also `python -m adpo_jax`.

    adpo-jax train --config=arithmetic
    adpo-jax evaluate --model=runs/adpo_jax/arithmetic
    adpo-jax generate --model runs/adpo_jax/arithmetic --prompt "What is 12 x 13?"

It hands its arguments to the module of the command.
"""

import importlib
import sys

from adpo_jax.log.printable import guard
from adpo_jax.run.command_line import unless_interrupted
from adpo_jax.run.exit_codes import USER_ERROR

# Command -> its module, the function there that does it and returns the exit code, its meaning.
COMMANDS = {
    "train": ("adpo_jax.main", "run", "trains a policy, or goes on with a run"),
    "evaluate": ("adpo_jax.evaluate", "run", "scores a model on held-out prompts"),
    "generate": ("adpo_jax.generate", "run", "samples completions from a model"),
    "serve": ("adpo_jax.serve.__main__", "run", "serves a model over HTTP, as OpenAI's API"),
    "report": ("adpo_jax.report.__main__", "main", "draws one HTML page about runs"),
    "export": ("adpo_jax.export", "run", "writes a model as a Hugging Face folder"),
    "keys": ("adpo_jax.run.keys", "main", "lists the keys of the config: adpo-jax keys [WORD]"),
}


def main() -> int:
    """Runs the command that the command line names; returns the exit code."""
    return unless_interrupted(_main)


def _main() -> int:
    guard()
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if command not in COMMANDS:
        what = f"there is no command {command!r}" if command else "a command is missing"
        print(f"error: {what}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    module, function, _ = COMMANDS[command]
    sys.argv = [f"adpo-jax {command}", *arguments]
    return getattr(importlib.import_module(module), function)()


def _usage() -> str:
    lines = [f"  {name:<10}{meaning}" for name, (_, _, meaning) in COMMANDS.items()]
    head = "usage: adpo-jax COMMAND [ARGUMENTS]; `adpo-jax COMMAND --help` tells more\n\ncommands:"
    return "\n".join([head, *lines])


if __name__ == "__main__":
    sys.exit(main())
