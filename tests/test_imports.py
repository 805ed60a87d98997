"""The rooms of the house: what may import what, and where a config may be read."""

import ast
import subprocess
import sys
import types
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "adpo_jax"

# A room, and the rooms that it may import. Data flows from the top down to `run`; no room imports
# one that stands below it.
ROOMS = {
    "devices": "",
    "log": "devices",
    "data": "",
    "rewards": "log",
    "environments": "data rewards",
    "losses": "",
    "records": "rewards",
    "model": "devices",
    "hf": "model devices",
    "policy": "hf model devices",
    "engine": "policy model records devices",
    "update": "policy model losses records devices",
    "serve": "engine environments policy hf records data",
    "rollouts": "serve engine environments rewards records data devices",
    "config": "losses",
    "run": "config rollouts update engine policy hf model records losses environments rewards data "
    "log devices",
}
# What people start, made of all rooms, and of each other as said here. A room that can be started
# by its name has what that needs in its `__main__` alone.
TOP = {
    "train": "",
    "main": "train dry_run",
    "evaluate": "pretrained",
    "pretrained": "",
    "dry_run": "",
    "serve.__main__": "pretrained",
    "report": "",
    "generate": "pretrained",
    "export": "pretrained",
    "__main__": "",
}


def files_of(name: str) -> list[Path]:
    folder = PACKAGE / name
    if not folder.is_dir():
        return [(PACKAGE / name.replace(".", "/")).with_suffix(".py")]
    apart = folder / "__main__.py" if f"{name}.__main__" in TOP else None
    return sorted(file for file in folder.rglob("*.py") if file != apart)


def imports_of(file: Path) -> set[str]:
    """The modules of the package that a file imports, as in "engine.verbs"."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        assert not getattr(node, "level", 0), f"{file} has a relative import, which no rule sees"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adpo_jax"):
            inside = node.module.split(".")[1:]
            found |= {".".join([*inside, alias.name]) for alias in node.names}
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".") for alias in node.names]
            found |= {rest for first, _, rest in names if first == "adpo_jax" and rest}
    return found


def rooms_imported(name: str) -> set[str]:
    found = {module.split(".")[0] for file in files_of(name) for module in imports_of(file)}
    return found - {name.split(".")[0]}


def test_every_file_is_in_a_room():
    there = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if list(path.glob("*.py"))
    }
    assert there - {"__init__"} == ROOMS.keys() | {n for n in TOP if "." not in n}


def test_a_room_imports_none_but_those_it_may():
    wrong = [
        f"{room} imports {other}"
        for room, allowed in ROOMS.items()
        for other in sorted(rooms_imported(room) - set(allowed.split()))
    ]
    assert not wrong


def test_what_people_start_imports_rooms_and_what_is_said():
    wrong = [
        f"{name} imports {other}"
        for name, allowed in TOP.items()
        for other in sorted(rooms_imported(name) - ROOMS.keys() - set(allowed.split()))
    ]
    assert not wrong


def test_the_rules_know_no_way_round():
    """A room may import those that stand before it: else their order means nothing."""
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        for other in allowed.split():
            assert order.index(other) < order.index(room), f"{room} may import {other}"
    assert "update" not in ROOMS["engine"].split()
    assert "engine" not in ROOMS["update"].split()


def test_grading_imports_nothing_of_ours():
    folder = PACKAGE / "rewards" / "grading"
    for file in folder.glob("*.py"):
        others = {m for m in imports_of(file) if not m.startswith("rewards.grading")}
        assert not others, file


def test_the_configuration_is_read_in_run_and_at_the_top_alone():
    readers = {
        name for name in ROOMS for file in files_of(name) if "ml_collections" in file.read_text()
    }
    assert readers == {"config", "run"}


def test_a_grading_process_imports_neither_jax_nor_sympy():
    code = "import sys, adpo_jax.rewards; print([m for m in ('jax', 'sympy') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_public_names_are_there_for_people_type_checkers_and_the_documentation():
    import adpo_jax

    assert dir(adpo_jax) == adpo_jax.__all__
    for name in adpo_jax.__all__:
        value = getattr(adpo_jax, name)
        assert callable(value) or isinstance(value, str | types.ModuleType), name
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adpo_jax")
        for alias in node.names
    }
    assert typed | {"__version__"} == set(adpo_jax.__all__)
    assert (PACKAGE / "py.typed").exists()
    documented = (PACKAGE.parent / "docs" / "api.md").read_text()
    assert [name for name in adpo_jax.__all__ if f"`{name}`" not in documented] == []
