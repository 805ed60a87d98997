"""The documentation: its code runs, its site builds, what it speaks of is there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adpo_jax.config import default_config, keys
from adpo_jax.log.metrics import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def code_of(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_training_loop_of_the_api_page_learns_in_60_lines():
    loop, bigger, _, _, requests = code_of("api.md")
    assert len(loop.splitlines()) <= 65
    assert sum(bool(line.strip()) for line in loop.splitlines()) <= 60
    names = {}
    exec(compile(loop, "api.md", "exec"), names)
    assert np.mean(names["history"][-3:]) > 2 * np.mean(names["history"][:3])
    exec(compile(bigger, "api.md", "exec"), names)
    assert np.isfinite(names["metrics"]["adpo/loss"])
    exec(compile(requests, "api.md", "exec"), names)
    assert [sample.ended for sample in names["first"]] == [True, True]


def test_the_run_from_a_script_of_the_api_page_logs_what_its_callback_returns(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (script,) = (block for block in code_of("api.md") if "callbacks=" in block)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    shorter = f"config.actor_rollout_ref.model.hf_config = {small}\nlast_evaluation ="
    exec(compile(script.replace("last_evaluation =", shorter), "api.md", "exec"), {})
    rows = read_jsonl(tmp_path / "runs" / "from-a-script" / "metrics.jsonl")
    assert [row["mine/longest"] > 0 for row in rows if "mine/longest" in row] == [True, True]


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "index.html").read_text()
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)', page)
    assert [address for address in fetched if address.endswith(("js", "css", "png"))] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    """Files of the repository, and config keys in full or with their section."""
    text = page.read_text()
    files = re.findall(r"`((?:scripts|configs|tests|adpo_jax|notebooks|docs)/[\w/.]+\w)`", text)
    files += re.findall(r"\b(?:python |=)((?:scripts|configs)/\w+\.py)", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    known = set(keys(default_config()))
    sections = {key.split(".")[0] for key in known} - {"data"}
    named = set(re.findall(r"--config\.([\w.]+\w)", text))
    if page.name != "coming_from.md":  # speaks of others' keys too
        pattern = rf"`((?:{'|'.join(sections)})\.[\w.]+\w)(?:=[^`]*)?`"
        named |= set(re.findall(pattern, text))
    whole = {key for key in named if key not in known}
    assert {k for k in whole if not any(key.startswith(k + ".") for key in known)} == set()
