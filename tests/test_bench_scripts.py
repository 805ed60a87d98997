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


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """Scripts find those beside them, as when they are started."""
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def bench_compiled(tmp_path, capsys):
    """Runs scripts/bench_compiled.py on a small model; returns its lines."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    main = runpy.run_path(str(SCRIPTS / "bench_compiled.py"))["main"]

    def run(*options):
        assert main(["--model", str(tmp_path), *options]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


WITH_REPEATS = [p.stem for p in sorted(SCRIPTS.glob("bench_*.py")) if "--repeats" in p.read_text()]


@pytest.mark.parametrize(
    ("script", "options", "why"),
    [
        *(
            (name, "--repeats 0", "--repeats: wanted a whole number from 1")
            for name in WITH_REPEATS
        ),
        (
            "bench_rollout",
            "--cases fixed,none",
            "--cases: there are fixed, eos, long; given 'none'",
        ),
        ("bench_rollout", "--shapes XL", "--shapes: there are XS, S, M, L; given 'XL'"),
        ("bench_rollout", "--peers verl", "--peers: there are tunix, trl; given 'verl'"),
        ("bench_rollout", "--compile-time 4,x", "--compile-time: wanted a whole number from 1"),
        ("bench_update", "--cases eos", "--cases: there are equal, long, ragged; given 'eos'"),
        ("bench_update", "--layout columns", "--layout: invalid choice"),
        ("bench_iteration", "--cases long", "--cases: there are fixed, ragged; given 'long'"),
        ("bench_cold_start", "--cases none", "--cases: there are arithmetic, tail"),
        ("bench_compiled", "--programs none", "--programs: there are decode, update, exchange"),
        ("bench_device", "--parts none", "--parts: there are "),
        ("bench_long", "--ways none", "--ways: there are "),
        ("bench_compiles", "--mean 3", "--mean is the first and the last mean; given 1"),
        ("bench_reading", "--sizes ,", "--sizes: wanted a whole number from 0; given ''"),
        ("scale_table", "--machines none", "--machines: there are "),
        ("simulate_rollouts", "--staleness x", "--staleness: wanted a whole number from 0"),
        ("simulate_rollouts", "--staleness -1", "--staleness: wanted a whole number from 0"),
        ("simulate_rollouts", "--staleness=", "--staleness: wanted 1 or more, with commas"),
        ("simulate_rollouts", "--ahead -3", "--ahead: wanted a whole number from 0; given '-3'"),
        ("simulate_rollouts", "--sigma -1", "--sigma: wanted a finite number of at least 0"),
        ("simulate_rollouts", "--mean 0", "--mean: wanted a finite number above 0; given '0'"),
        ("simulate_rollouts", "--step-ms 0 --token-ns 0", "--step-ms and --token-ns are both 0"),
        ("simulate_rollouts", "--prefill-call-ms nan", "--prefill-call-ms: wanted a finite number"),
        ("kernel_times", "folder --most 0", "--most: wanted a whole number from 1"),
    ],
)
def test_an_option_that_cannot_be_is_refused_in_one_sentence(
    script, options, why, monkeypatch, capsys
):
    found = runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name=script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options.split(" ")])
    with pytest.raises(SystemExit) as ended:
        found["main"]()
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_a_run_whose_rows_have_no_lengths_is_refused_by_the_simulation(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "rollout/length_mean": 2.0}\n')
    monkeypatch.setattr(sys, "argv", ["simulate_rollouts.py", f"--metrics={path}"])
    with pytest.raises(SystemExit, match="no row with rollout/length_max and rollout/length_mean"):
        runpy.run_path(str(SCRIPTS / "simulate_rollouts.py"))["main"]()


def test_the_names_of_the_shapes_are_those_of_the_peers_scripts():
    ours = runpy.run_path(str(SCRIPTS / "bench_rollout.py"))["SHAPES"]
    theirs = runpy.run_path(str(SCRIPTS / "peers" / "common.py"))["SHAPES"]
    assert set(ours) == theirs.keys()


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
    assert line["launches"] < 24 + 3 * 12  # eleven a layer


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
