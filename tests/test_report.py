"""Reports of runs that were never trained: their folders are written by hand."""

import dataclasses
import json
import re
import shutil
import subprocess
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
        "working_directory": f"/home/ann/{folder.parent.name}{seed}",
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
    assert "/home/ann" not in text
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


def test_a_prompt_is_shown_beside_itself_where_the_evaluations_have_other_prompts(folders):
    samples = folders[0] / "samples"
    rows = [
        {"prompt": f"2+{n}", "solution": str(2 + n), "completion": f"{name} {n}", "correct": True}
        for name, prompts in (("before", (1, 2, 3)), ("after", (3, 4, 2)))
        for n in prompts
    ]
    write_jsonl(samples / "eval_000000.jsonl", rows[:3])
    write_jsonl(samples / "eval_000005.jsonl", rows[3:])
    found = page.samples_of(Group("a", [Run.read(folders[0])]))
    pairs = [[record["completion"] for record in pair] for pair in found["pairs"]]
    assert pairs == [["before 2", "after 2"], ["before 3", "after 3"]]


def test_a_run_that_is_given_twice_is_no_second_seed(folders, tmp_path):
    run = Run.read(folders[0])
    copied = page.overview(Group("a", [run, run]))
    assert copied["95% interval"] == page.overview(Group("a", [run]))["95% interval"]
    once, twice = tmp_path / "once.html", tmp_path / "twice.html"
    page.write(folders[:2], once)
    page.write([folders[0], folders[1], folders[0].parent / "." / "../a/seed0"], twice)
    assert once.read_text() == twice.read_text()


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


def test_the_page_is_in_the_home_folder_that_no_shell_expands(folders, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    run = folders[0].rename(home / "run")
    monkeypatch.setattr("sys.argv", ["report", "~/run", "--out=~/page.html", "--png=~/png"])
    assert main() == 0
    assert {path.name for path in home.iterdir()} == {run.name, "page.html", "png"}


def test_a_page_takes_the_place_of_an_older_one_and_of_no_other_file(folders, tmp_path):
    out = tmp_path / "notes.html"
    out.write_text("<p>of a week's work</p>")
    with pytest.raises(ValueError, match=r"notes\.html exists and is no report; give the page"):
        page.write(folders, out)
    assert out.read_text() == "<p>of a week's work</p>"
    out.write_text("")  # as mktemp leaves it
    for group in (folders[:1], folders[2:]):
        page.write(group, out)
    assert "seed0" in out.read_text()


def test_pictures_take_the_place_of_older_ones_and_of_no_other_file(folders, tmp_path):
    out, png = tmp_path / "report.html", tmp_path / "pictures"
    page.write(folders, out, png=png)
    page.write(folders, out, png=png)
    picture = png / "reward_mean.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\na picture of the user's")
    before = {path.name: path.read_bytes() for path in png.iterdir()}
    out.unlink()
    with pytest.raises(ValueError, match=r"reward_mean.png exists and is no picture of a report"):
        page.write(folders, out, png=png)
    assert {path.name: path.read_bytes() for path in png.iterdir()} == before
    assert not out.exists()


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A report, as PNG files too, of a run with an odd name, metrics of its own, and damage."""
    root = tmp_path_factory.mktemp("strange")
    run = make_run(root / "c$\\frac{x$", seed=0)
    rows = read_jsonl(run / "metrics.jsonl")
    for row in rows:
        own = {"reward/$_x": row["step"] / 10, "reward/format_reward": 1.0, "update/lr": 1e-6}
        row |= own | {"eval/pass@4": 0.5, "eval/algebra/accuracy": 0.25, "update/hidden": 7.0}
    write_jsonl(run / "metrics.jsonl", rows)
    damage = [
        b"\x00\xff\x80garbage",
        b'{"step": 6, "time": "late", "reward/mean": NaN, "update/lr": 2e-6}',
        b"[" * 100_000,
        b"3",
        b'{"time": 5.0}',
        b'{"step": 7, "reward/mea',
    ]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join(damage))
    (run / "environment.json").write_text("{")
    completions = {5: "  \n\u200b", 0: ""}
    for step, text in completions.items():
        record = {"completion": text, "solution": "4", "correct": step > 0}
        write_jsonl(run / "samples" / f"eval_{step:06d}.jsonl", [record])
    problems = page.write([run], root / "report.html", png=root / "png", metrics=["update/l*"])
    return root, problems, (root / "report.html").read_text(encoding="utf-8")


def pictures_of(text: str) -> dict[str, str]:
    """The pictures of a page by their titles."""
    found = re.findall(r'<svg role="img" aria-label="(.*?)" .*?</svg>', text, flags=re.DOTALL)
    whole = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    return dict(zip(found, whole, strict=True))


def test_every_metric_of_a_run_can_be_shown_and_one_that_never_changes_too(strange, capsys):
    root, _, text = strange
    drawn = pictures_of(text)
    own = {"reward/$_x", "reward/format_reward", "eval/pass@4", "eval/algebra/accuracy"}
    assert own | {"Accuracy, greedy", "update/lr"} <= drawn.keys()
    assert "update/hidden" not in drawn  # nobody asked for it; the table has it all the same
    assert '<td>update/hidden</td><td class="number">7 to 7</td>' in text
    assert "update_lr.png" in {path.name for path in (root / "png").iterdir()}
    with pytest.raises(ValueError, match=r"metric update/lrr; did you mean update/lr\?"):
        page.write([root / "c$\\frac{x$"], root / "none.html", metrics=["update/lrr"])


def test_iterations_are_counted_in_whole_numbers(strange):
    _, _, text = strange
    drawn = pictures_of(text)
    for title in ("Reward, sampled", "update/lr", "Rewards: c$\\frac{x$"):
        ticks = re.findall(r'id="[^"]*xtick.*?<text[^>]*>(.*?)</text>', drawn[title], re.DOTALL)
        assert ticks, title
        assert [tick for tick in ticks if not tick.isdecimal()] == [], title


def test_a_folder_whose_name_is_mathematics_has_its_name_on_page_and_pictures(strange):
    root, _, text = strange
    assert text.count("c$\\frac{x$") >= 5
    assert "Rewards: c$\\frac{x$" in pictures_of(text)
    assert (root / "png" / "reward_c_frac_x.png").stat().st_size > 1000


def test_a_completion_that_shows_nothing_is_marked(strange):
    _, _, text = strange
    assert '<p class="blank">blank: no text</p>' in text
    assert '<p class="blank">blank: 4 characters, none of them visible</p>' in text


def test_damaged_files_are_named_and_read_around(strange, tmp_path, monkeypatch, capsys):
    root, problems, text = strange
    run = root / "c$\\frac{x$"
    damaged, environment = sorted(problems, key=lambda problem: "environment" in problem)
    assert damaged == (
        f"{run / 'metrics.jsonl'}: line 7 is no JSON, line 9 is no JSON, line 10 is no JSON "
        "object, and 1 more; the rest was read"
    )
    assert environment.startswith(f"{run / 'environment.json'} cannot be read as JSON")
    assert f"<li>{damaged}</li>" in text
    read = Run.read(run)
    assert [row["step"] for row in read.rows] == [0, 1, 2, 3, 4, 5, 6]
    assert 6 not in read.series("reward/mean")
    assert read.series("update/lr")[6] == 2e-6
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_bytes(b"\x00" * 100)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    assert main() == 2
    error = f"error: {tmp_path}: metrics.jsonl has no iterations yet: {tmp_path / 'metrics.jsonl'}"
    assert capsys.readouterr().err.startswith(f"{error}: line 1 is cut short")


FRAME = """<body><iframe id="f" src="report.html" width="360" height="800"></iframe><p id="o"></p>
<script>f.onload = () => { const page = f.contentDocument.documentElement;
o.textContent = `page ${page.scrollWidth}/${page.clientWidth} table ` +
f.contentDocument.querySelector(".wide").scrollWidth; }</script>"""


def test_on_a_narrow_screen_the_tables_scroll_and_the_page_does_not(strange):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs chromium")
    root, _, _ = strange
    (root / "frame.html").write_text(FRAME)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=5000"]
    result = subprocess.run(
        [*command, f"--user-data-dir={root / 'browser'}", f"file://{root / 'frame.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"page (\d+)/(\d+) table (\d+)", result.stdout)
    assert found, result.stderr
    page_width, screen, table = map(int, found.groups())
    assert page_width <= screen < table
