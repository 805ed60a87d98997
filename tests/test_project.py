"""What pyproject.toml promises: lower bounds that can be tried, warnings that are errors."""

import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_dependency_of_a_user_has_a_lower_bound_that_can_be_tried():
    script = runpy.run_path(str(ROOT / "scripts" / "check_lowest.py"))
    wanted = script["requirements"]()
    assert any(requirement.startswith("jax==") for requirement in wanted)
    assert any(requirement.startswith("starlette==") for requirement in wanted)
    with pytest.raises(ValueError, match="no lower bound"):
        script["lowest"]("flax<1")


def test_warnings_are_errors_but_for_those_that_message_and_module_name():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    first, *exceptions = settings["tool"]["pytest"]["ini_options"]["filterwarnings"]
    assert first == "error"
    for exception in exceptions:
        action, message, category, module = exception.split(":")
        assert action == "ignore", exception
        assert all((message, category, module)), exception
