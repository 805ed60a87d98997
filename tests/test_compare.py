"""What scripts/compare.py makes of runs that are there."""

import runpy
from pathlib import Path

import numpy as np
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


@pytest.mark.long
def test_methods_start_from_the_same_weights_and_see_the_same_prompts(compare, tmp_path):
    tiny = {
        "sft.steps": 2,
        "sft.batch_size": 8,
        "sft.lr_warmup_steps": 0,
        "data.train_batch_size": 8,
        "data.max_response_length": 6,
        "data.max_val_samples": 8,
        "algorithm.num_generations": 2,
        "trainer.total_training_steps": 2,
        "trainer.log_samples_freq": 1,
    }
    start = compare["common_start"]("configs/arithmetic.py", tmp_path / "start", tiny, 3)
    first = {}
    for method in ("adpo", "rloo"):
        folder = tmp_path / method
        changes = tiny | compare["METHODS"][method]
        compare["run"]("configs/arithmetic.py", folder, start, changes, 3)
        found = Run.read(folder)
        assert found.series(compare["START_KL"])[1] == pytest.approx(0.0, abs=1e-4)
        assert np.isfinite(found.series(compare["START_KL"])[2])
        first[method] = (folder / "samples" / "train_000001.jsonl").read_text()
    assert first["adpo"] == first["rloo"]
