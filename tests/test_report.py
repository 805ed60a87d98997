"""Reports of runs that were never trained: their folders are written by hand."""

import dataclasses
import json
import re
import xml.etree.ElementTree

import pytest

from adpo_jax.log.metrics import read_jsonl, write_jsonl
from adpo_jax.report import page
from adpo_jax.report.__main__ import main
from adpo_jax.report.runs import Group, Run, differences, grouped

HOSTILE = "</pre><script>alert(1)</script><img src=//evil.example onerror=alert(2)>&lt;\x00\ud800"


def make_run(folder, *, seed, tau=0.8, steps=5):
    """A run's folder with a few iterations, samples and two evaluations."""
    (folder / "samples").mkdir(parents=True)
    config = {
        "algorithm": {"tau": tau},
        "trainer": {"seed": seed, "experiment_name": folder.name},
        "actor_rollout_ref": {"model": {"path": f"start/seed{seed}/export"}},
        "reward_model": {"reward_kwargs": {"api_key": "hunter2"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.9", "devices": "1 x cpu"}))
    rows = [
        {
            "step": step,
            "time": 1000.0 + step,
            "reward/mean": step / 10 + seed / 100,
            "adpo/loss": None,
            "time/rollout": 1.0,
            "time/update": 3.0,
            "update/tokens": 50.0,
        }
        for step in range(1, steps + 1)
    ]
    rows = [{"step": 0, "time": 1000.0, "eval/accuracy": 0.25}, *rows]
    rows[-1] |= {"eval/accuracy": 0.75 + seed / 100}
    write_jsonl(folder / "metrics.jsonl", rows)
    sample = {"prompt": "2+2", "completion": HOSTILE, "reward": 0.5, "num_tokens": 7}
    write_jsonl(folder / "samples" / "train_000002.jsonl", [sample, sample | {"num_tokens": 9}])
    for step, correct in ((0, False), (steps, True)):
        record = {"prompt": "2+2", "completion": HOSTILE, "solution": "4", "correct": correct}
        write_jsonl(folder / "samples" / f"eval_{step:06d}.jsonl", [record])
    return folder


@pytest.fixture
def folders(tmp_path):
    runs = [("a/seed0", 0, 0.8), ("a/seed1", 1, 0.8), ("b/seed0", 0, 0.2)]
    return [make_run(tmp_path / name, seed=seed, tau=tau) for name, seed, tau in runs]


def test_runs_that_differ_in_their_seed_alone_are_joined_and_named_shortly(folders):
    groups = grouped([Run.read(folder) for folder in folders])
    assert [group.label for group in groups] == ["a", "b"]
    assert [run.seed for run in groups[0].runs] == [0, 1]
    assert differences(groups) == {"algorithm.tau": ["0.8", "0.2"]}
    steps, mean, low, high = groups[0].band("reward/mean")
    assert list(steps) == [1, 2, 3, 4, 5]
    assert mean[0] == pytest.approx(0.105)
    assert (low[0], high[0]) == pytest.approx((0.1, 0.11))


def test_the_page_stands_alone_and_shows_hostile_text_as_text(folders, tmp_path):
    out = tmp_path / "report.html"
    page.write(folders, out, png=tmp_path / "png")
    text = out.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "\x00" not in text
    assert "hunter2" not in text
    # Nothing is fetched: the only addresses are names of XML's vocabularies.
    addresses = set(re.findall(r"(?:https?:)?//[a-z][\w.]+", text)) - {"//evil.example"}
    assert addresses <= {"http://www.w3.org"}
    assert "default-src 'none'" in text
    for shown in ("Reward, sampled", "Where the time goes", "algorithm.tau", "3.11.9", "seed 0:"):
        assert shown in text
    names = {path.name for path in (tmp_path / "png").iterdir()}
    assert {"reward_mean.png", "eval_accuracy.png", "stages.png", "num_tokens_a.png"} <= names


def test_the_pictures_are_well_formed_take_the_pages_colours_and_share_no_identifier(
    folders, tmp_path
):
    out = tmp_path / "report.html"
    page.write(folders, out)
    pictures = re.findall(r"<svg.*?</svg>", out.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(pictures) >= 4
    ids: list[str] = []
    for picture in pictures:
        root = xml.etree.ElementTree.fromstring(picture)
        ids += [e.get("id") for e in root.iter() if e.get("id")]
        assert "var(--ink)" in picture
        assert "#010101" not in picture
    assert len(ids) == len(set(ids))


def test_the_overview_has_the_interval_over_seeds_and_the_stages_their_seconds(folders):
    groups = grouped([Run.read(folder) for folder in folders])
    row = page.overview(groups[0])
    # Mean 0.755, standard deviation 0.00707, t(1) = 12.706: 0.755 +- 0.0635.
    assert row["accuracy after"] == "0.755"
    assert row["95% interval"] == "0.691 to 0.819, seeds"
    assert page.stage_seconds(groups[0]) == {"rollout": 1.0, "update": 3.0}


def test_every_stage_of_any_group_has_its_column(folders, tmp_path):
    metrics = folders[2] / "metrics.jsonl"
    rows = read_jsonl(metrics)
    rows[-1]["time/eval"] = 10.0
    write_jsonl(metrics, rows)
    page.write(folders, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<th>rollout</th><th>update</th><th>eval</th>" in text
    assert '<td>b</td><td class="number">1</td><td class="number">3</td>' in text
    assert '<td class="number">3</td><td class="number">2</td>' in text


def test_hours_leave_out_the_time_that_a_run_was_stopped(folders):
    run = Run.read(folders[0])
    assert run.seconds == 5.0
    rows = [row | {"time": row["time"] + 7200.0 * (row["step"] > 2)} for row in run.rows]
    stopped = dataclasses.replace(run, rows=rows)
    assert stopped.seconds == 4.0 + 4.0 + 60.0  # the stages of the iteration after, and a minute
    assert page.overview(Group("a", [stopped]))["hours"] == "0.019"


def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis").mkdir()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "thesis")])
    assert main() == 2
    assert "thesis is no run's folder" in capsys.readouterr().err
