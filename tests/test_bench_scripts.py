"""The benchmarks: what is missing is a line of the result; figures that must stay."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from adpo_jax.devices import topologies

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
MODEL = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def bench_compiled(tmp_path, capsys):
    """Runs scripts/bench_compiled.py on a small model; returns its lines."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    main = runpy.run_path(str(SCRIPTS / "bench_compiled.py"))["main"]

    def run(*options):
        assert main(["--model", str(tmp_path), *options]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_a_compiler_or_a_card_that_is_missing_is_a_line_of_the_result(bench_compiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(topologies, "has_gpu_compiler", lambda: False)
    tpu, gpu = bench_compiled("--platforms", "v5e:2x2,h100:1")
    assert "pip install 'adpo-jax[tpu-aot]'" in tpu["skipped"]
    assert "pip install 'adpo-jax[gpu-aot]'" in gpu["skipped"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:attention 'pallas_gpu' of prefill")
def test_decoding_on_an_h100_copies_neither_weights_nor_cache(bench_compiled):
    if not topologies.has_gpu_compiler():
        pytest.skip("needs the extra [gpu-aot]")
    options = ("--platforms", "h100:1", "--programs", "decode", "--slots", "64", "--ring", "256")
    (line,) = bench_compiled(*options, "--own", "256", "--prompt", "128")
    assert line["attention"] == "pallas_gpu"
    assert line["kernels"] == {"step_ring": 3, "step_prompts": 3}
    assert line["copies"] == 0
    # The cache is updated in place, and no temporary is as large as a layer of it.
    layer = 2 * 64 * 8 * 256 * 128 * 2
    assert line["aliased_bytes"] > 3 * layer
    assert line["temporary_bytes"] < layer
    assert line["bytes_over_roofline"] < 1.3
    assert line["launches"] < 80 + 3 * 20


@pytest.mark.slow
def test_weights_of_32b_go_to_the_hosts_of_256_chips_in_parts(bench_compiled):
    pytest.importorskip("libtpu", reason='needs pip install "libtpu==0.0.42.*"')
    options = ("--platforms", "v6e:16x16", "--programs", "exchange", "--tensor", "4")
    model = Path(__file__).resolve().parents[1] / "configs" / "models" / "qwen3-32b"
    (line,) = bench_compiled(*options, "--model", str(model), "--prompts", "256")
    assert line["parts"] > 64
    assert line["bytes_beside"] < 2**30


def test_a_peer_that_is_missing_is_named_with_the_cure_and_ours_are_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("PEERS_HOME", str(tmp_path))
    script = runpy.run_path(str(SCRIPTS / "bench_rollout.py"))
    ours = {
        "tokens_per_s": {"median": 9.0, "min": 8.0, "max": 10.0},
        "tokens_per_cpu_s": {"median": 5.0, "min": 4.0, "max": 6.0},
        "other_cpus": {"median": 0.0},
        "peak_rss_mb": 1,
    }

    def run(who, _):
        return ours if who == "adpo_jax" else script["run_peer"](who)

    line, runs = script["compared"](2, ["trl", "verl"], run)
    assert "python scripts/peers/setup.py trl makes it" in line["missing"]["trl"]
    assert "no such peer" in line["missing"]["verl"]
    assert line["tokens_per_s"] == {"adpo_jax": ours["tokens_per_s"]}
    assert len(runs["adpo_jax"]) == 2


def test_a_peer_is_told_from_us_by_its_rate(monkeypatch, tmp_path):
    monkeypatch.setenv("PEERS_HOME", str(tmp_path))
    script = runpy.run_path(str(SCRIPTS / "bench_rollout.py"))

    def run(who, _):
        rate = {"median": 9.0 if who == "adpo_jax" else 3.0, "min": 1.0, "max": 10.0}
        both = {"tokens_per_s": rate, "tokens_per_cpu_s": rate}
        return {**both, "other_cpus": {"median": 0.0}, "peak_rss_mb": 1}

    line, _ = script["compared"](1, ["trl"], run)
    assert line["tokens_per_s_ratio_to_better_peer"] == 3.0
    assert "missing" not in line


@pytest.mark.long
def test_the_benchmark_of_pages_says_the_same_completions_in_fewer_steps(monkeypatch, capsys):
    sizes = ("--run-limit=128", "--run-mean=16", "--run-slots=2", "--run-prompts=2", "--page=8")
    monkeypatch.setattr(sys, "argv", ["bench_pages.py", "--run", *sizes])
    runpy.run_path(str(SCRIPTS / "bench_pages.py"))["main"]()
    *_, ring, pages = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (ring["tokens"], ring["longest"]) == (pages["tokens"], pages["longest"])
    assert pages["slots"] > ring["slots"]
    assert pages["steps"] < ring["steps"]
