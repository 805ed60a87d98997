"""Tries the lowest versions of all dependencies that pyproject.toml allows.

    python3.11 scripts/check_lowest.py

makes the virtual environment `.venv-lowest`, installs each direct dependency in its lowest version
(what those depend on comes in the version that pip picks), imports every module of the package and
runs a short selection of tests. What fails here shows a bound that has to rise.

Python is the lowest too: some of these versions have no wheels for a newer one.

Extras of one accelerator and those that pin a version are left out. Warnings are no errors here:
an old version may well be deprecated by a newer one of something else.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOWEST_PYTHON = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
EXTRAS = ("hub", "serve", "report")
# The tests' own tools are not the package's, so they come in the version that pip picks.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "chex", "openai")
TESTS = (
    "tests/test_losses_vectors.py",
    "tests/test_checkpoints.py",
    "tests/test_prompts.py",
    "tests/test_report.py",
    "tests/test_update.py::test_the_state_keeps_its_layout_on_a_mesh",
    "tests/test_train.py::test_a_run_leaves_metrics_samples_checkpoints_events_and_a_loadable_export",
    "tests/test_serve.py::test_a_chat_goes_through_the_template_and_streams_what_it_gives_whole",
)
IMPORT_ALL = """
import importlib, pkgutil, adpo_jax
for module in pkgutil.walk_packages(adpo_jax.__path__, "adpo_jax."):
    # `__main__` would run; the adapter for JetStream needs what no extra here brings.
    if not module.name.endswith(("__main__", ".jetstream")):
        importlib.import_module(module.name)
"""


def lowest(requirement: str) -> str:
    """`name>=version` as `name==version`.

    Raises:
      ValueError: for a requirement of another form, which has no lowest version.
    """
    found = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement.replace(" ", ""))
    if not found:
        raise ValueError(f"{requirement!r} is not of the form name>=version: it has no lower bound")
    return "{}=={}".format(*found.groups())


def requirements() -> list[str]:
    """The direct dependencies of the package and of `EXTRAS`, each in its lowest version."""
    extras = PROJECT["optional-dependencies"]
    listed = PROJECT["dependencies"] + [name for extra in EXTRAS for name in extras[extra]]
    return [lowest(requirement) for requirement in listed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-lowest")
    folder = parser.parse_args().venv
    if folder.exists():
        sys.exit(f"there is a {folder} already, and this wants a fresh one: remove it first")
    if sys.version_info[:2] != LOWEST_PYTHON:
        wanted = ".".join(map(str, LOWEST_PYTHON))
        sys.exit(f"run this with Python {wanted}, given {sys.version.split()[0]}")
    wanted = requirements()
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"

    def run(*arguments):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([python, *arguments], check=True, cwd=ROOT, env=environment)

    run("-m", "pip", "install", *wanted, *TOOLS)
    run("-c", IMPORT_ALL)
    run("-m", "pytest", "-o", "filterwarnings=default", *TESTS)


if __name__ == "__main__":
    main()
