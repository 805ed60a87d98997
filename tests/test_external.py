"""An environment in processes of its own, which drives the run's engine over HTTP."""

import asyncio
import contextlib
import importlib.util
import io
import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as parquet
import pytest
import rich.console
import tiny
from parsing import parse
from test_environments import TINY, on_one_device, shortened
from test_serve import wait_until

import adpo_jax
from adpo_jax.data import calculator
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.requests import NewTokens, Request
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.environments import external
from adpo_jax.environments.external import External, parse_record
from adpo_jax.environments.pool import EnvironmentFailed
from adpo_jax.log.metrics import read_jsonl
from adpo_jax.log.progress import Progress
from adpo_jax.rollouts.externally import Externally
from adpo_jax.run.environments import make_environments
from adpo_jax.serve.ledger import Ledger, NeverSampled

APPENDED = [7, 8, 9]


@contextlib.contextmanager
def answering(answer):
    """The address of a server that answers every POST with (status, object) = answer(body)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self._send(200, {})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._send(*answer(json.loads(body)))

        def _send(self, status, content):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/rollouts"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class TwoTurns:
    """An environment of two turns, which appends the same tokens after the first."""

    def __init__(self):
        self.tokenizer = calculator.make_tokenizer()
        self.asked = []

    def __call__(self, body):
        self.asked.append(body)
        with ThreadPoolExecutor(body["num_rollouts"]) as pool:
            return 200, {"rollouts": list(pool.map(lambda s: self.rollout(body, s), body["seeds"]))}

    def rollout(self, body, seed):
        prompt = self.tokenizer(body["row"]["prompt"])["input_ids"]
        ids, mask, reason = [], [], "stop"
        for turn in range(2):
            sampled, reason = self.generate(body, prompt + ids, seed + turn)
            ids, mask = ids + sampled, mask + [1] * len(sampled)
            if turn == 0:
                ids, mask = ids + APPENDED, mask + [0] * len(APPENDED)
        return {
            "prompt_token_ids": prompt,
            "token_ids": ids,
            "mask": mask,
            "finish_reason": reason,
            "reward": len(ids) / 32,
            "metrics": {"turns asked for": 2},
        }

    def generate(self, body, token_ids, seed):
        model = body["model"]
        answer = httpx.post(
            model["base_url"] + "/inference/v1/generate",
            headers={"Authorization": f"Bearer {model['api_key']}"},
            json={
                "token_ids": token_ids,
                "sampling_params": body["sampling_params"] | {"max_tokens": 9, "seed": seed},
            },
            timeout=300,
        )
        (choice,) = answer.json()["choices"]
        return choice["token_ids"], choice["finish_reason"]


def test_a_run_trains_on_what_an_environment_elsewhere_had_sampled(tmp_path):
    environment = TwoTurns()
    graded = tmp_path / "reward.py"
    graded.write_text(
        "def turns(completions, environments, transcripts, **kwargs):\n"
        "    assert [t[-1]['content'] for t in transcripts] == list(completions)\n"
        "    return [getattr(e, 'turns asked for') for e in environments]\n"
    )
    with answering(environment) as url:
        config = parse(
            *TINY,
            "--config.environment.path=",
            "--config.environment.name=",
            "--config.environment.max_turns=8",
            f"--config.environment.url={url}",
            f"--config.custom_reward_function.path={graded}",
            "--config.custom_reward_function.name=turns",
            "--config.actor_rollout_ref.rollout.top_k=50",
            "--config.eval.graded_by=reward",
            name="calculator",
        )
        build = lambda config: shortened(on_one_device(config), tuple(range(6, 200)))  # noqa: E731
        adpo_jax.train(config, tmp_path / "run", build=build)
    rows = {row["step"]: row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")}
    assert rows[2]["rollout/turns"] == 2
    assert rows[2]["reward/environment/turns_asked_for"] == 2
    assert rows[2]["reward/mean"] == pytest.approx(2 + rows[2]["rollout/length_mean"] / 32, 1e-5)
    assert rows[2]["update/skipped"] == 0
    # The log-probs are those that the engine drew with; over the whole vocabulary they are the
    # trainer's.
    assert abs(rows[2]["rollout/mismatch_kl"]) < 1e-9
    assert rows[2]["eval/accuracy"] == 1

    table = parquet.read_table(tmp_path / "run" / "rollouts" / "000002.parquet").to_pydict()
    for tokens, trained, turns, versions, log_probs in zip(
        table["tokens"], table["trained"], table["turns"], table["versions"], table["log_probs"]
    ):
        first = trained.index(False)
        assert trained == [True] * first + [False] * 3 + [True] * (len(tokens) - first - 3)
        assert tokens[first : first + 3] == APPENDED
        assert turns == [0] * (first + 3) + [1] * (len(tokens) - first - 3)
        assert [v for v, t in zip(versions, trained) if t] == [1] * sum(trained)
        assert all((p < 0) == t for p, t in zip(log_probs, trained))

    (first, *_) = environment.asked
    assert first["row"]["prompt"] == first["row"]["question"]
    assert first["row"]["answer"].startswith("#### ")
    assert len(set(first["seeds"])) == first["num_rollouts"] == 2
    assert first["model"]["max_model_length"] == first["model"]["max_prompt_length"] + 32
    # An evaluation's greedy answers are asked for with the iterations done, too.
    greedy = [body for body in environment.asked if body["sampling_params"]["temperature"] == 0]
    assert {body["step"] for body in greedy} == {2}
    # The addresses of two iterations have nothing to do with each other.
    keys = {body["step"]: body["model"]["api_key"] for body in environment.asked}
    assert len(set(keys.values())) == len(keys)
    with pytest.raises(httpx.HTTPError):
        httpx.get(first["model"]["base_url"] + "/health")


# --- what was sampled


def ledger_of(*sampled, sampling=None):
    """A ledger with samples: (prompt, tokens, version) each, in two parts where there are more."""
    ledger = Ledger()
    for prompt, tokens, version in sampled:
        used = sampling or SamplingParams()
        (sample,) = Request(np.array(prompt), used, keys=lambda: None).samples
        cut = max(len(tokens) - 1, 1)
        for start, part in ((0, tokens[:cut]), (cut, tokens[cut:])):
            log_probs = -np.arange(start + 1, start + 1 + len(part), dtype=np.float32)
            ids = np.array(part, np.int32)
            ledger.note([NewTokens(sample, ids, log_probs, None, None, version=version)])
            if start == 0:
                ledger.begin(prompt, used, [sample])
    return ledger


def test_a_completion_is_rebuilt_from_what_was_sampled():
    ledger = ledger_of(
        ([1, 2], [3, 4, 5], 6), ([1, 2], [3, 9], 6), ([1, 2, 3, 4, 5, 7, 7], [8, 8], 7)
    )
    mask = [True] * 3 + [False] * 2 + [True] * 2
    found = ledger.completion([1, 2], [3, 4, 5, 7, 7, 8, 8], mask, SamplingParams(), "stop")
    assert found.log_probs.tolist() == [-1, -2, -3, 0, 0, -1, -2]
    assert found.turns.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert found.versions[found.trained].tolist() == [6, 6, 6, 7, 7]
    assert found.full_log_probs is None
    # A client may cut an answer short, and may go on without anything between.
    assert (
        ledger.completion([1, 2], [3, 4], [True] * 2, SamplingParams(), "length").turns.max() == 0
    )
    joined = ledger_of(([1], [2, 3], 0), ([1, 2, 3], [4], 0), ([1, 2], [5], 1))
    found = joined.completion([1], [2, 3, 4], [True] * 3, SamplingParams(), "stop")
    assert found.turns.tolist() == [0, 0, 1]
    found = joined.completion([1], [2, 5], [True] * 2, SamplingParams(), "stop")  # both
    assert (found.turns.tolist(), found.versions.tolist()) == ([0, 1], [0, 1])


def test_tokens_that_were_never_sampled_are_no_completion():
    ledger = ledger_of(([1, 2], [3, 4, 5], 0))
    for prompt, tokens, mask in (
        ([1], [3, 4], [1, 1]),  # after another prompt
        ([1, 2], [3, 5], [1, 1]),  # other tokens
        ([1, 2], [3, 4, 5, 6], [1, 1, 1, 1]),  # and more than there were
        ([1, 2], [3, 4, 5], [0, 1, 1]),  # from their middle
    ):
        with pytest.raises(NeverSampled, match="did not sample it after what stands before it"):
            ledger.completion(prompt, tokens, np.array(mask, bool), SamplingParams(), "stop")
    hot = SamplingParams(temperature=0.5)
    with pytest.raises(NeverSampled, match=r"temperature 1\.0, where the run samples with 0\.5"):
        ledger.completion([1, 2], [3], [True], hot, "stop")


# --- records


RECORD = {"prompt_token_ids": [1, 2], "token_ids": [3, 4, 5], "reward": 1}
LIMITS = {"vocab_size": 10, "max_prompt_length": 2, "max_response_length": 3}


def test_a_record_says_no_more_than_it_must():
    found = parse_record(RECORD, **LIMITS)
    assert (found.trained, found.finish_reason, found.metrics) == ([True] * 3, "stop", {})
    cut = parse_record(RECORD | {"mask": [1, False, 1]}, **LIMITS | {"max_response_length": 2})
    assert (cut.tokens, cut.trained, cut.finish_reason) == ([3, 4], [True, False], "length")
    assert parse_record(RECORD | {"reward": None}, **LIMITS).reward is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prompt_token_ids": [1, 2, 3]}, "raise data.max_prompt_length, which is 2"),
        ({"prompt_token_ids": []}, "prompt_token_ids of a rollout is a list of token ids"),
        ({"token_ids": [1, 10]}, r"ids outside \[0, 10\)"),
        ({"token_ids": [1, -1]}, r"ids outside \[0, 10\)"),
        ({"token_ids": [True]}, "token_ids of a rollout is a list of token ids"),
        ({"token_ids": "text"}, "token_ids of a rollout is a list of token ids"),
        ({"mask": [1, 0]}, "mask of a rollout is a list of 0 and 1"),
        ({"mask": [1, 0, 2]}, "mask of a rollout is a list of 0 and 1"),
        ({"mask": [[], 0, 1]}, "mask of a rollout is a list of 0 and 1"),
        ({"reward": float("nan")}, "reward of a rollout is a finite number"),
        ({"reward": "1"}, "reward of a rollout is a finite number"),
        ({"reward": 10**400}, "reward of a rollout is a finite number"),
        ({"finish_reason": ["x"]}, "finish_reason is"),
        ({"messages": "hello"}, "messages of a rollout are a list"),
        ({"messages": [{"content": "hello"}]}, 'each with a text "role"'),
        ({"messages": [{"role": None, "content": "hello"}]}, 'each with a text "role"'),
        ({"metrics": {"a": "b"}}, "metrics of a rollout are finite numbers"),
    ],
)
def test_what_is_no_record_is_refused_naming_the_field(changes, why):
    with pytest.raises(ValueError, match=why):
        parse_record(RECORD | changes, **LIMITS)


def test_every_content_that_openai_allows_can_be_read_and_shown():
    function = {"name": "add", "arguments": '{"a": 1}'}
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    deep = []
    for _ in range(900):
        deep = [deep]
    told = [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "add", "content": [{"type": "text", "text": "42"}]},
        {"role": "assistant", "content": None, "tool_calls": deep},
        {"role": "user", "content": [{"type": "text", "text": "see"}, picture]},
        {"role": "assistant", "content": "#### 42"},
    ]
    messages = parse_record(RECORD | {"messages": told}, **LIMITS).messages
    assert [m["content"] for m in messages] == ["", "42", "", told[3]["content"], "#### 42"]
    json.dumps(messages), pickle.dumps(messages)
    sample = {"prompt": "q", "completion": "x", "reward": 1.0, "components": {}}
    for turns, terminal in ((messages, True), (messages, False), (told, False)):  # recorded before
        screen = io.StringIO()
        console = rich.console.Console(file=screen, force_terminal=terminal, width=200)
        with Progress("iteration", 2, console=console) as progress:
            progress.print_samples([sample | {"turns": turns}])
        shown = screen.getvalue()
        for line in ("""assistant: '[add({"a": 1})]'""", "add: '42'", "user: 'see[image_url]'"):
            assert line in shown
        assert "assistant: ''" in shown


def asked_of(url, **options):
    made = External(url, "127.0.0.1", **{"timeout_s": 20.0, "max_prompt_length": 2} | options)

    async def ask():
        async with made.client() as client:
            body = {"row": {}, "num_rollouts": 1}
            return await made.rollouts(client, body, vocab_size=10, max_response_length=3)

    return asyncio.run(ask())


def test_an_environment_that_fails_is_asked_again_and_then_stops_the_run(monkeypatch):
    monkeypatch.setattr(external, "PAUSES_S", (0.0, 0.0))
    replies = [
        (500, {"detail": "\x1b[2Jbroken"}),
        (200, b"{not json"),
        (200, {"rollouts": [RECORD]}),
    ]
    with answering(lambda _: replies.pop(0)) as url:
        (record,) = asked_of(url)
        assert record.tokens == [3, 4, 5]
    failing = {"rollouts": [{"error": "the sandbox is gone"}]}
    with (
        answering(lambda _: (200, failing)) as url,
        pytest.raises(EnvironmentFailed, match="failed 3 times .* 'the sandbox is gone'"),
    ):
        asked_of(url)
    release = threading.Event()
    with answering(lambda _: release.wait(20) and (200, {})) as url:
        with pytest.raises(EnvironmentFailed, match="took longer than environment.rollout_timeout"):
            asked_of(url, timeout_s=0.2)
        release.set()
    # What is no record is not asked for again.
    replies = [(200, {"rollouts": [RECORD, RECORD]})]
    with (
        answering(lambda _: replies.pop(0)) as url,
        pytest.raises(EnvironmentFailed, match="1 for the num_rollouts it was asked for; given 2"),
    ):
        asked_of(url)
    monkeypatch.setattr(external, "MAX_ANSWER_BYTES", 1000)
    with (
        answering(lambda _: (200, b" " * 5000)) as url,
        pytest.raises(EnvironmentFailed, match="more than 1000 bytes"),
    ):
        asked_of(url)


def test_an_address_that_cannot_work_is_refused_before_anything_is_sampled(tmp_path):
    with answering(lambda _: (200, {})) as there:
        pass
    for url, why in (
        ("9000", "environment.url is an address such as"),
        ("ftp://127.0.0.1/x", "environment.url is an address such as"),
        (there, "nobody answers at .*; start the environment before the run"),
    ):
        with pytest.raises(ValueError, match=why):
            make_environments(parse(f"--config.environment.url={url}"), None, ())
    both = parse(f"--config.environment.url={there}", name="calculator")
    with pytest.raises(ValueError, match="environment.path and environment.url are both set"):
        make_environments(both, None, ())
    with pytest.raises(ValueError, match="does not go with environment.url"):
        parse(
            f"--config.environment.url={there}",
            "--config.actor_rollout_ref.rollout.max_staleness=1",
        )
    for key in ("serve_host=0.0.0.0", "rollout_timeout_s=3"):
        with pytest.raises(ValueError, match="has no effect without environment.url"):
            parse(f"--config.environment.{key}")
    secret = External("http://me:secret@127.0.0.1:9/x", "127.0.0.1", 1.0, max_prompt_length=2)
    assert "secret" not in secret.shown


@pytest.mark.parametrize(
    ("host", "why"),
    [
        *((host, "stands for all addresses of this machine") for host in ("0.0.0.0", "::", "0")),
        *((host, "this machine cannot listen") for host in ("", "192.0.2.1", "a:80", 70 * "a")),
    ],
)
def test_an_address_of_this_machine_that_cannot_work_is_refused_likewise(host, why):
    with answering(lambda _: (200, {})) as url:
        config = parse(f"--config.environment.url={url}", f"--config.environment.serve_host={host}")
        with pytest.raises(ValueError, match=f"environment.serve_host is .*{why}"):
            make_environments(config, None, ())


def test_an_address_of_this_machine_that_is_lost_in_a_run_is_a_failure_of_the_environment():
    lost = External("http://127.0.0.1:9/x", "192.0.2.1", 1.0, max_prompt_length=2)
    policy, params = tiny.policy_and_params()
    engine = Engine(policy, max_prompt_length=4, max_response_length=12, num_slots=2)
    reading = types.SimpleNamespace(stop_token_ids=(), prompt_key="prompt")
    complete = Externally(engine, calculator.make_tokenizer(), reading, lost)
    with pytest.raises(EnvironmentFailed, match="environment.serve_host is .* cannot listen"):
        complete(params, [], SamplingParams(), None)


# --- verifiers


@pytest.fixture
def bridge(monkeypatch):
    """What scripts/verifiers_bridge.py defines, with verifiers' own names left empty."""
    settings = {
        "clients": ["ModelContext"],
        "configs.client": ["TrainClientConfig"],
        "types": ["SamplingConfig"],
        "utils.loaders": ["load_environment", "resolve_env_config"],
    }
    for name, names in settings.items():
        module = types.SimpleNamespace(**dict.fromkeys(names))
        monkeypatch.setitem(sys.modules, f"verifiers.v1.{name}", module)
    return runpy.run_path(
        str(Path(__file__).parents[1] / "scripts" / "verifiers_bridge.py"), run_name="bridge"
    )


def error_of(message):
    return types.SimpleNamespace(message=message)


def trace_of(**fields):
    """A trace of verifiers with one branch."""
    branch = types.SimpleNamespace(
        trainable=True, token_ids=[1, 2], sampled_mask=[False, True], calls=[], messages=[]
    )
    fields = {"ok": True, "errors": [], "branches": [branch], "metrics": {}, "score": 1.0} | fields
    reward = types.SimpleNamespace(value=fields.pop("score"))
    rewards = {"exact": reward, "format": types.SimpleNamespace(value=0.0), "judge": None}
    fields |= {"rewards": rewards, "reward": reward.value, "stop_condition": "setup_timeout"}
    return types.SimpleNamespace(agent=types.SimpleNamespace(trainable=True), **fields)


def episode_of(*traces, errors=()):
    ok = bool(traces) and all(trace.ok for trace in traces)
    return types.SimpleNamespace(ok=ok, errors=list(errors), traces=list(traces))


@pytest.mark.parametrize(
    ("episode", "why"),
    [
        (
            episode_of(trace_of(ok=False, errors=[error_of("no container")], branches=[])),
            "no container",
        ),
        (episode_of(errors=[error_of("setup() failed")]), "setup() failed"),
        (episode_of(), "no trace"),
        (episode_of(trace_of(branches=[])), "sampled nothing in it; it ended with setup_timeout"),
        (episode_of(trace_of(score=float("nan"))), "a run takes finite ones: exact is nan"),
        (episode_of(trace_of(score=float("inf"))), "a run takes finite ones: exact is inf"),
    ],
)
def test_a_failed_episode_of_verifiers_is_an_error_and_may_be_asked_for_again(bridge, episode, why):
    record = bridge["record_of"](episode)
    assert record.keys() == {"error"}
    assert why in record["error"]


def test_an_episode_of_verifiers_that_its_retries_mended_is_a_rollout(bridge):
    mended = [error_of("broken pipe")]
    metrics = {"turns": 1.0, "late": None, "ratio": float("nan"), "cost": float("-inf")}
    trace = trace_of(errors=mended, metrics=metrics)
    record = bridge["record_of"](episode_of(trace, errors=mended))
    assert (record["token_ids"], record["mask"], record["reward"]) == ([2], [1], 1.0)
    assert record["metrics"] == {"turns": 1.0}
    json.dumps(record, allow_nan=False)
    assert bridge["record_of"](episode_of(trace, trace)).keys() == {"lasting"}


def test_rows_of_verifiers_are_there_when_they_are_all_there(bridge, tmp_path):
    def tasks(count, broken):
        for number in range(count):
            data = types.SimpleNamespace(model_dump=lambda mode, n=number: {"prompt": f"task {n}"})
            yield types.SimpleNamespace(key=number, data=data)
        if broken:
            raise KeyboardInterrupt

    class Tasks:
        bounded, broken = True, True

        def __iter__(self):
            return tasks(3, self.broken)

    env, path = types.SimpleNamespace(taskset=Tasks()), tmp_path / "tasks.jsonl"
    with pytest.raises(KeyboardInterrupt):
        bridge["write_rows"](env, path, None)
    assert not path.exists()
    env.taskset.broken = False
    assert bridge["write_rows"](env, path, None) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["tasks.jsonl"]
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == [
        f"task {n}" for n in range(3)
    ]


def test_a_taskset_of_verifiers_is_trained_on_through_the_bridge(tmp_path):
    if importlib.util.find_spec("verifiers") is None:
        pytest.skip("the environments are not installed: pip install verifiers==0.4.0")
    model = tmp_path / "model"
    tokenizer = calculator.make_tokenizer()
    tokenizer.save_pretrained(model)
    settings = {"agent": {"harness": {"id": "verifiers_sums"}, "runtime": {"type": "subprocess"}}}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "scripts" / "verifiers_bridge.py"
    command = [sys.executable, "-W", "ignore", str(script), "verifiers_sums"]
    command += [f"--model={model}", f"--rows={tmp_path / 'tasks.jsonl'}", f"--port={port}"]
    command += [f"--config={json.dumps(settings)}", '--renderer={"name": "default"}']
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    bridge = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    try:
        wait_until(lambda: answers(port), seconds=120)
        config = parse(
            *TINY,
            "--config.environment.path=",
            "--config.environment.name=",
            "--config.environment.max_turns=8",
            f"--config.environment.url=http://127.0.0.1:{port}/",
            f"--config.data.train_files={tmp_path / 'tasks.jsonl'}",
            "--config.data.prompt_key=prompt",
            "--config.data.val_files=",
            "--config.data.max_val_samples=0",
            "--config.trainer.test_freq=-1",
            "--config.trainer.val_before_train=True",
            "--config.data.max_prompt_length=40",
            "--config.data.max_response_length=120",
            "--config.custom_reward_function.name=",
            "--config.trainer.total_training_steps=1",
            name="calculator",
        )
        build = lambda config: shortened(on_one_device(config), tuple(range(6, 200)))  # noqa: E731
        adpo_jax.train(config, tmp_path / "run", build=build)
    finally:
        bridge.terminate()
        bridge.wait(30)
    (row,) = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["step"] == 1]
    assert row["reward/environment/turns"] == 1
    assert 0 < row["reward/environment"] <= 1 / 2
    assert abs(row["rollout/mismatch_kl"]) < 1e-9


def answers(port) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    except httpx.HTTPError:
        return False
