"""What scripts/compare.py makes of runs that are there."""

import runpy
from pathlib import Path

import pytest
from test_report import make_run

from adpo_jax.report.runs import Run

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "compare.py"


@pytest.fixture(scope="module")
def compare():
    return runpy.run_path(str(SCRIPT))


def test_overrides_are_read_as_python_where_they_are(compare):
    found = compare["overrides"](["algorithm.tau=0.2", "a.b=(1, 2)", "data.val_files=x.jsonl"])
    assert found == {"algorithm.tau": 0.2, "a.b": (1, 2), "data.val_files": "x.jsonl"}
    with pytest.raises(SystemExit, match="wanted KEY=VALUE"):
        compare["overrides"](["tau"])


@pytest.mark.parametrize("method", ["adpo", "adpo-fixed", "grpo", "rloo"])
def test_every_method_is_a_config_that_works(compare, method):
    from adpo_jax.config_checks import finalized

    config = compare["read_config"]("configs/arithmetic.py", compare["METHODS"][method])
    assert finalized(config).algorithm.adv_estimator == method.split("-")[0]


def test_methods_are_compared_seed_by_seed(compare, tmp_path):
    runs = {
        name: [Run.read(make_run(tmp_path / f"{name}/seed{s}", seed=s, steps=n)) for s in (0, 1)]
        for name, n in (("a", 9), ("b", 12))
    }
    measured = compare["measures"](runs["b"][0])
    assert measured["final accuracy"] == 0.75
    assert measured["iterations to reward 0.8"] == 10  # the mean of 0.6 to 1.0
    lines = compare["table"](runs).splitlines()
    assert lines[2].startswith("| a | 2 | 0.755 ± 0.0635 |")
    assert "never |" in lines[2]
    assert lines[4].startswith("| b less a | 2 | 0 ± 0 | 0.25 ± ")
    assert lines[4].endswith(" 150 ± 0 |")
