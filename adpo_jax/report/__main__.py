"""The command line of the report."""

import sys

from adpo_jax.log.printable import guard, say, say_error
from adpo_jax.run.command_line import Parser, unless_interrupted
from adpo_jax.run.config_files import user_path
from adpo_jax.run.exit_codes import USER_ERROR


def main() -> int:
    """Writes the report that the command line asks for; returns the exit code."""
    parser = Parser(prog="adpo-jax report", description="One HTML page about one or several runs.")
    parser.add_argument("runs", nargs="+", type=user_path, help="folders of runs; seeds are joined")
    parser.add_argument("--out", type=user_path, default="report.html", help="the page")
    parser.add_argument(
        "--metrics",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="further metrics to draw, such as update/lr or 'time/*'; '*' for all",
    )
    parser.add_argument("--png", type=user_path, help="a folder for the pictures as PNG files")
    a = parser.parse_args()
    try:
        from adpo_jax.report import page  # after the arguments, since this imports matplotlib

        problems = page.write(a.runs, a.out, png=a.png, metrics=a.metrics)
    except (OSError, ValueError) as error:
        say_error(error)
        return USER_ERROR
    for problem in problems:
        say(f"WARNING: {problem}")
    say(f"the report is in {a.out}", sys.stdout)
    return 0


def run() -> int:
    """Runs `python -m adpo_jax.report`; returns the exit code."""
    guard()
    return main()


if __name__ == "__main__":
    sys.exit(unless_interrupted(run))
