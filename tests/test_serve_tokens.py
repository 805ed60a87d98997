"""The server as environments drive it: tokens in, tokens out, and new weights in between."""

import asyncio
import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jax
import numpy as np
import openai
import pytest
from test_serve import (  # noqa: F401
    CONFIG,
    error_of,
    folder,
    post,
    running,
    wait_until,
    writes,
)

from adpo_jax import Engine, SamplingParams, pretrained
from adpo_jax.engine import scoring
from adpo_jax.engine.continuous import ContinuousBatch
from adpo_jax.engine.verbs import Verbs
from adpo_jax.policy import Policy
from adpo_jax.serve.decoding import Decoding
from adpo_jax.serve.service import Service
from adpo_jax.serve.weights import WeightsRoot

PATH = "/inference/v1/generate"
PROMPT = [70, 71, 72, 73, 74]


@pytest.fixture(scope="module")
def versions(folder):  # noqa: F811
    """The policy, and its parameters by version: those served first, and others."""
    policy, others = Policy.from_config(CONFIG, jax.random.key(1))
    return policy, [pretrained.load(folder).params, others]


@pytest.fixture(scope="module")
def root(tmp_path_factory, versions):
    """A folder with the weights of each version in it."""
    root = tmp_path_factory.mktemp("weights")
    policy, params = versions
    for number, each in enumerate(params):
        policy.save_pretrained(root / f"v{number}", each)
    return root


@pytest.fixture(scope="module")
def server(folder, root):  # noqa: F811
    """The address of a server that takes new weights."""
    options = [f"--weights-root={root}", "--slots=4", "--max-requests-per-client=256"]
    with running(folder, *options) as (_, address):
        yield address


@pytest.fixture
def address(server):
    """The same, with the first weights in place and numbered anew."""
    yield server
    assert post(server, "/resume").status_code == 200


def update(address, folder, **more):  # noqa: F811
    return post(address, "/update_weights", json={"weight_dir": str(folder)} | more)


def with_weights(address, number: int) -> int:
    """Puts weights in place; returns the version that they have."""
    return update(address, f"v{number}").json()["weight_version"]


def generate(address, prompt=PROMPT, **sampling):
    answer = post(address, PATH, json={"token_ids": prompt, "sampling_params": sampling})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def sampled(versions, folder):  # noqa: F811
    """(version, seed, n) -> the completions that the engine samples."""
    policy, params = versions
    stop = pretrained.load(folder).stop_token_ids
    engine = Engine(policy, max_prompt_length=64, max_response_length=32, num_slots=2)

    @functools.cache
    def sample(number, seed):
        settings = SamplingParams(n=6, max_tokens=24, stop_token_ids=stop, ignore_eos=True)
        return engine.generate(params[number], [PROMPT], settings, jax.random.key(seed))[0]

    return sample


FREE = {"max_tokens": 24, "ignore_eos": True}


# --- tokens in, tokens out


def test_tokens_come_back_as_the_engine_samples_them_each_with_its_log_prob(address, sampled):
    version = with_weights(address, 0)
    answer = generate(address, n=2, seed=5, logprobs=2, **FREE)
    assert len(answer["choices"]) == 2
    for choice, expected in zip(answer["choices"], sampled(0, 5)):
        assert choice["token_ids"] == expected.tokens.tolist()
        assert choice["finish_reason"] == "length"
        assert choice["weight_versions"] == [[version, 0]]
        content = choice["logprobs"]["content"]
        assert [entry["token"] for entry in content] == [f"token_id:{t}" for t in expected.tokens]
        found = [entry["logprob"] for entry in content]
        assert found == pytest.approx(expected.log_probs.tolist(), abs=1e-4)
        assert {len(entry["top_logprobs"]) for entry in content} == {2}
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 48, "total_tokens": 53}
    assert generate(address, **FREE)["choices"][0]["logprobs"] is None


def test_a_stream_of_tokens_is_the_answer_in_pieces(address):
    sampling = FREE | {"seed": 3, "logprobs": 0, "prompt_logprobs": 0}
    whole = generate(address, **sampling)
    body = {"token_ids": PROMPT, "sampling_params": sampling, "stream": True, "request_id": "me"}
    body["stream_options"] = {"include_usage": True}
    lines = post(address, PATH, json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert {chunk["request_id"] for chunk in chunks} == {"me"}
    assert chunks[0]["prompt_logprobs"] == whole["prompt_logprobs"]
    assert chunks[-1]["usage"] == whole["usage"]
    pieces = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(pieces) > 3
    (choice,) = whole["choices"]
    assert [token for piece in pieces for token in piece["token_ids"]] == choice["token_ids"]
    content = [entry for piece in pieces for entry in piece["logprobs"]["content"]]
    assert content == choice["logprobs"]["content"]
    assert pieces[-1]["finish_reason"] == "length"


def test_a_stop_token_ends_the_tokens_and_is_one_of_them(address, folder):  # noqa: F811
    free = generate(address, seed=1, logprobs=0, **FREE)["choices"][0]["token_ids"]
    stop = free[6]
    first = free.index(stop)
    (choice,) = generate(address, seed=1, stop_token_ids=[stop], logprobs=0, **FREE)["choices"]
    assert choice["token_ids"] == free[: first + 1]
    assert len(choice["logprobs"]["content"]) == first + 1
    assert choice["finish_reason"] == "stop"
    decode = pretrained.load(folder).tokenizer.decode
    text = decode(free[8:10])
    (choice,) = generate(address, seed=1, stop=[text], **FREE)["choices"]
    assert text in decode(choice["token_ids"])
    assert text not in decode(choice["token_ids"][:-1])
    assert choice["token_ids"] == free[: len(choice["token_ids"])]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("asked", "found"), [({}, "3 7"), ({"skip_special_tokens": False}, "all>")]
)
def test_a_stop_string_is_found_in_the_text_as_it_is_shown(
    address,
    folder,  # noqa: F811
    monkeypatch,
    asked,
    found,
):
    writes(monkeypatch, "3<tool_call> 7 and 5", pretrained.load(folder).tokenizer)
    counts = {}
    for stop in ("3 7", "all>"):
        (choice,) = generate(address, stop=[stop], **asked)["choices"]
        counts[stop] = len(choice["token_ids"])
    assert min(counts, key=counts.get) == found
    assert len(set(counts.values())) == 2


def test_log_probs_of_the_prompt_are_those_of_the_present_weights(address, versions):
    policy, params = versions
    for number in (1, 0):
        version = with_weights(address, number)
        answer = generate(address, prompt_logprobs=2, max_tokens=1)
        assert answer["prompt_weight_version"] == version
        first, *rest = answer["prompt_logprobs"]
        assert first is None
        expected = policy.log_probs(params[number], [PROMPT])[0, 1:]
        found = [entry[str(token)]["logprob"] for token, entry in zip(PROMPT[1:], rest)]
        assert found == pytest.approx(np.asarray(expected).tolist(), abs=1e-4)
        for entry in rest:
            assert sorted(e["rank"] for e in entry.values() if e["rank"]) == [1, 2]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"token_ids": None}, "token_ids"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [1, True]}, "token_ids"),
        ({"token_ids": [1 << 40]}, "token_ids"),
        ({"token_ids": "text"}, "token_ids"),
        ({"token_ids": [5] * 65}, "token_ids"),
        ({"sampling_params": [1]}, "sampling_params"),
        ({"sampling_params": {"logprobs": -1}}, "logprobs"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling_params": {"prompt_logprobs": True}}, "prompt_logprobs"),
        ({"sampling_params": {"repetition_penalty": 2}}, "repetition_penalty"),
        ({"sampling_params": {"allowed_token_ids": [1]}}, "allowed_token_ids"),
        ({"sampling_params": {"tempreature": 1}}, "tempreature"),
        ({"features": {"mm_hashes": {}}}, "features"),
        ({"request_id": ""}, "request_id"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_what_cannot_be_generated_is_refused_naming_the_field(address, fields, param):
    refused = post(address, PATH, json={"token_ids": PROMPT} | fields)
    assert refused.status_code == 400, refused.text
    assert error_of(refused)["param"] == param


def test_fields_of_vllm_that_ask_for_nothing_are_taken(address):
    sampling = {"skip_special_tokens": False, "detokenize": True, "extra_args": None, "n": 1}
    sampling |= {"logit_bias": None, "bad_words": [], "max_tokens": 1, "output_kind": 2}
    body = {"token_ids": PROMPT, "sampling_params": sampling, "priority": 0, "cache_salt": "x"}
    body |= {"model": "tiny", "features": None, "kv_transfer_params": None, "stream": None}
    assert post(address, PATH, json=body).status_code == 200


def test_the_renderers_client_holds_a_conversation(address, folder):  # noqa: F811
    reason = "the client is not installed: pip install renderers==0.1.12"
    renderers = pytest.importorskip("renderers", reason=reason)
    client_of = pytest.importorskip("renderers.client", reason=reason)
    tokenizer = pretrained.load(folder).tokenizer
    renderer = renderers.create_renderer(tokenizer, renderers.DefaultRendererConfig())
    card = httpx.get(f"{address}/v1/models").json()["data"][0]
    assert card["max_model_len"] == 128

    async def converse():
        base = f"{address}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:

            async def turn(messages, **sampling):
                return await client_of.generate(
                    client=client,
                    renderer=renderer,
                    messages=messages,
                    model="tiny",
                    sampling_params={"max_tokens": 6} | sampling,
                )

            messages, turns = [{"role": "user", "content": "2 + 2?"}], []
            for seed in range(2):
                turns.append(await turn(list(messages), seed=seed))
                messages.append({"role": "assistant", "content": "4"})
                messages.append({"role": "user", "content": "and 1?"})
            with pytest.raises(renderers.OverlongPromptError, match=r"context length \(128\)"):
                await turn([{"role": "user", "content": "apples" * 100}])
            return turns

    for seed, turn in enumerate(asyncio.run(converse())):
        same = generate(address, turn["prompt_ids"], max_tokens=6, seed=seed, logprobs=1)
        (choice,) = same["choices"]
        assert turn["completion_ids"] == choice["token_ids"]
        found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        assert turn["completion_logprobs"] == found
        assert turn["finish_reason"] == choice["finish_reason"]


def test_an_environment_of_verifiers_runs_its_rollouts(address, folder):  # noqa: F811
    if importlib.util.find_spec("verifiers") is None:
        pytest.skip("the environments are not installed: pip install verifiers==0.4.0")
    program = Path(__file__).parent / "verifiers_environment.py"
    command = [sys.executable, "-W", "ignore", str(program), address, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    rollouts = json.loads(result.stdout.splitlines()[-1])
    assert len(rollouts) == 6
    for rollout in rollouts:
        assert (rollout["turns"], rollout["reward"], rollout["errors"]) == (2, 2.0, [])
        assert len(rollout["sampled"]) == 2
        for tokens, log_probs in rollout["sampled"]:
            assert 0 < len(tokens) == len(log_probs) <= 6
            assert max(log_probs) <= 0


# --- new weights


@pytest.fixture
def permits(monkeypatch):
    """A semaphore: each dispatch of 4 tokens takes a permit. All are given at the end."""
    step, permits = ContinuousBatch.step, threading.Semaphore(0)

    def permitted(self):
        if self.busy:
            permits.acquire(timeout=60)
        return step(self)

    monkeypatch.setattr(ContinuousBatch, "step", permitted)
    yield permits
    permits.release(1000)


@pytest.fixture
def exchanging(monkeypatch):
    """An event that is set when new weights have been read and wait to be used."""
    exchange, event = Decoding.exchange, threading.Event()

    async def noted(self, params, version):
        event.set()
        await exchange(self, params, version)

    monkeypatch.setattr(Decoding, "exchange", noted)
    return event


def health(address) -> dict:
    return httpx.get(f"{address}/health").json()


def begin(pool, address, permits, **sampling):
    """A request of which 8 tokens were sampled, to be awaited."""
    # What it needs is compiled first, since a request that waits for that uses permits up too.
    permits.release(1000)
    generate(address, **sampling)
    while permits.acquire(blocking=False):
        pass
    future = pool.submit(generate, address, **sampling)
    permits.release(2)
    wait_until(lambda: health(address)["running"] > 0)
    wait_until(lambda: not permits.acquire(blocking=False) or permits.release())
    return future


def test_what_is_under_way_ends_under_the_weights_that_began_it(
    address, sampled, permits, exchanging
):
    old = with_weights(address, 0)
    exchanging.clear()
    with ThreadPoolExecutor(4) as pool:
        began = begin(pool, address, permits, seed=5, n=2, **FREE)
        updating = pool.submit(update, address, "v1")
        wait_until(exchanging.is_set)
        later = pool.submit(generate, address, seed=5, **FREE)
        assert not updating.done()
        permits.release(1000)
        assert updating.result().json() == {"status": "ok", "weight_version": old + 1}
        began, later = began.result(), later.result()
    assert len(began["choices"]) == 2
    for choice, expected in zip(began["choices"], sampled(0, 5)):
        assert choice["token_ids"] == expected.tokens.tolist()
        assert choice["weight_versions"] == [[old, 0]]
    (choice,) = later["choices"]
    assert choice["token_ids"] == sampled(1, 5)[0].tokens.tolist()
    assert choice["weight_versions"] == [[old + 1, 0]]
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", chat)):
        (choice,) = post(address, path, json=body).json()["choices"]
        assert choice["weight_versions"] == [[old + 1, 0]]


@pytest.mark.parametrize("n", [6, 14])
def test_what_a_pause_keeps_goes_on_under_new_weights_and_is_marked(address, sampled, permits, n):
    old = with_weights(address, 0)
    with ThreadPoolExecutor(4) as pool:
        # There are 4 slots, so that the others begin after the exchange: of 6 two, which share the
        # prompt's keys and values with those that began, and of 14 some for which it is read anew.
        began = begin(pool, address, permits, seed=5, n=n, logprobs=0, **FREE)
        pausing = pool.submit(post, address, "/pause?mode=keep")
        wait_until(lambda: health(address)["paused"] == "keep")
        permits.release(1000)
        assert pausing.result().json() == {"status": "paused", "mode": "keep"}
        later = pool.submit(generate, address, seed=5, **FREE)
        assert update(address, "v1", version=old + 7).json()["weight_version"] == old + 7
        assert not began.done()
        assert post(address, "/resume").json() == {"status": "resumed"}
        began, later = began.result(), later.result()
    starts = []
    anew = generate(address, seed=5, n=n, logprobs=0, **FREE)["choices"]
    marks = [choice["weight_versions"] for choice in began["choices"]]
    num_old = sum(len(segments) == 2 for segments in marks)
    assert num_old == 6 if n == 6 else 4 <= num_old < n
    assert marks[num_old:] == [[[old + 7, 0]]] * (n - num_old)
    for choice, other in list(zip(began["choices"], anew))[num_old:]:
        assert choice["token_ids"] == other["token_ids"]
    for choice, expected in zip(began["choices"][:num_old], sampled(0, 5)):
        (first, zero), (second, start) = choice["weight_versions"]
        assert (first, zero, second) == (old, 0, old + 7)
        tokens = choice["token_ids"]
        assert tokens[:start] == expected.tokens[:start].tolist()
        assert tokens[start:] != expected.tokens[start:].tolist()
        starts.append(start)
    assert all(0 < start < 24 for start in starts[:4])
    assert not any(starts[4:])  # their prompt was read by the old weights
    (choice,) = later["choices"]
    assert choice["weight_versions"] == [[old + 7, 0]]
    assert choice["token_ids"] == sampled(1, 5)[0].tokens.tolist()


def test_a_pause_lets_what_is_under_way_end_and_nothing_begin(address, sampled, permits):
    with_weights(address, 0)
    with ThreadPoolExecutor(4) as pool:
        began = begin(pool, address, permits, seed=5, **FREE)
        pausing = pool.submit(post, address, "/pause")
        wait_until(lambda: health(address)["paused"] == "wait")
        later = pool.submit(generate, address, seed=6, **FREE)
        wait_until(lambda: health(address)["waiting"] == 1)
        assert not pausing.done()
        permits.release(1000)
        assert pausing.result().json() == {"status": "paused", "mode": "wait"}
        assert began.result()["choices"][0]["token_ids"] == sampled(0, 5)[0].tokens.tolist()
        with_weights(address, 1)
        assert not later.done()
        assert health(address)["waiting"] == 1
        post(address, "/resume")
        assert later.result()["choices"][0]["token_ids"] == sampled(1, 6)[0].tokens.tolist()
    assert "abort" in error_of(post(address, "/pause?mode=abort"))["message"]


SCORED = {"prompt": [PROMPT, PROMPT[:3]], "echo": True, "logprobs": 0}


def scored_by(choice, versions, number) -> bool:
    """Whether the log-probs of a choice's prompt are those of these weights."""
    policy, params = versions
    count = len(choice["logprobs"]["token_logprobs"])
    wanted = policy.log_probs(params[number], [PROMPT])[0, 1:count]
    found = choice["logprobs"]["token_logprobs"][1:]
    return found == pytest.approx(wanted[: len(found)].tolist(), abs=1e-4)


@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_a_pause_holds_the_scoring_of_prompts(address, versions, mode):
    old = with_weights(address, 0)
    post(address, f"/pause?mode={mode}")
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(post, address, json=SCORED | {"max_tokens": 0})
        time.sleep(0.3)
        with_weights(address, 1)
        assert not later.done()
        post(address, "/resume")
        for choice in later.result().json()["choices"]:
            assert scored_by(choice, versions, 1)
            assert choice["weight_versions"] == [[old + 1, 0]]


@pytest.fixture
def held_scoring(monkeypatch):
    """The first prompt of two is being scored, and may be done: two events, and the calls."""
    score, calls, inside, go = Service._score, [], threading.Event(), threading.Event()

    def slow(self, prompts, *rest):
        made = score(self, prompts, *rest)
        calls.append(prompts)
        if len(calls) == 1:
            inside.set()
            assert go.wait(30)
        return made

    monkeypatch.setattr(Service, "_score", slow)
    monkeypatch.setattr(scoring, "CALL_TOKENS", 4)  # a call for each prompt
    yield inside, go, calls
    go.set()


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_new_weights_wait_until_the_prompts_of_a_request_are_scored(
    address, versions, held_scoring, max_tokens
):
    old = with_weights(address, 0)
    inside, go, calls = held_scoring
    with ThreadPoolExecutor(2) as pool:
        later = pool.submit(post, address, json=SCORED | {"max_tokens": max_tokens})
        assert inside.wait(30)
        exchange = pool.submit(with_weights, address, 1)
        time.sleep(0.5)
        assert not exchange.done()
        go.set()
        choices, new = later.result().json()["choices"], exchange.result()
    assert len(calls) == 2
    for choice in choices:
        assert choice["prompt_weight_version"] == old
        if not max_tokens:
            assert choice["weight_versions"] == [[old, 0]]
            assert scored_by(choice, versions, 0)
    assert new == old + 1


@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_a_pause_waits_until_the_prompts_of_a_request_are_scored(address, held_scoring, mode):
    inside, go, calls = held_scoring
    with ThreadPoolExecutor(2) as pool:
        later = pool.submit(post, address, json=SCORED | {"max_tokens": 0})
        assert inside.wait(30)
        pausing = pool.submit(post, address, f"/pause?mode={mode}")
        time.sleep(0.3)
        assert not pausing.done()
        go.set()
        assert pausing.result().json()["mode"] == mode
        assert len(calls) == 2
        post(address, "/resume")
        assert later.result().status_code == 200


def test_an_exchange_of_weights_compiles_nothing(address):
    sampling = FREE | {"seed": 1, "logprobs": 0, "prompt_logprobs": 0}
    with_weights(address, 1)
    generate(address, **sampling)
    programs = (Verbs.prefill, Verbs.generate, Verbs.assign, Verbs._unstacked, scoring._scores)
    before = [program._cache_size() for program in programs]
    assert all(before)
    with_weights(address, 0)
    generate(address, **sampling)
    assert [program._cache_size() for program in programs] == before


# --- folders that are no good


def _of(tmp, root, versions):
    """Bad folders by name: (what is sent, a word of the refusal)."""
    policy, params = versions
    outside = tmp / "outside"
    policy.save_pretrained(outside, params[1])
    (root / "link").symlink_to(outside)
    (root / "linked").mkdir()
    for name in ("config.json", "model.safetensors"):
        (root / "linked" / name).symlink_to(outside / name)
    wide, wide_params = Policy.from_config(CONFIG | {"hidden_size": 24}, jax.random.key(0))
    wide.save_pretrained(root / "wide", wide_params)
    bad = jax.tree.map(lambda x: x * np.nan, params[1])
    policy.save_pretrained(root / "nan", bad)
    turned, turned_params = Policy.from_config(CONFIG | {"rope_theta": 5e5}, jax.random.key(0))
    turned.save_pretrained(root / "turned", turned_params)
    for name in ("pipe", "cut", "pickled", "deep"):
        policy.save_pretrained(root / name, params[1])
    (root / "pipe" / "model.safetensors").unlink()
    os.mkfifo(root / "pipe" / "model.safetensors")
    whole = (root / "cut" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(whole[:-100])
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    (root / "deep" / "config.json").write_text('{"a":' * 99999)
    (root / "odd").mkdir()
    (root / "odd" / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": ["x"]}))
    index = {"weight_map": {"a": str(outside / "model.safetensors")}}
    policy.save_pretrained(root / "index", params[1])
    (root / "index" / "model.safetensors").unlink()
    (root / "index" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "loop").symlink_to(root / "loop")
    return {
        str(outside): "does not lie in",
        "../outside": "does not lie in",
        "link": "does not lie in",
        "linked": "does not lie in",
        "/etc": "does not lie in",
        "x\0y": "does not lie in",
        "x" * 5000: "does not lie in",
        "loop": "weight_dir",
        "nowhere": "there is no folder",
        "v0/config.json": "there is no folder",
        ".": "no config.json",
        "wide": "another model",
        "turned": "differs in ropes",
        "nan": "NaN",
        "pipe": "no regular file",
        "cut": "cut short",
        "pickled": "pickled",
        "deep": "lists and objects",
        "odd": "",
        "index": "outside its folder",
    }


def test_new_weights_are_read_with_the_overrides_that_are_served(root, versions):
    override = {"rms_norm_eps": 1e-3}
    policy, _ = Policy.from_pretrained(root / "v1", override_config=override)
    with pytest.raises(ValueError, match="differs in norm_eps"):
        WeightsRoot(root, policy).read("v1")
    found = WeightsRoot(root, policy, override).read("v1")
    jax.tree.map(np.testing.assert_array_equal, found, versions[1][1])


def test_a_folder_that_is_no_good_leaves_the_weights_as_they_are(
    address, root, versions, sampled, tmp_path
):
    version = with_weights(address, 0)
    for sent, word in _of(tmp_path, root, versions).items():
        refused = update(address, sent)
        assert refused.status_code == 400, (sent, refused.text)
        error = error_of(refused)
        assert error["param"] == "weight_dir"
        assert word in error["message"]
        assert len(error["message"]) <= 500
    for body in ({}, {"weight_dir": 5}, {"weight_dir": "v1", "version": -1}, {"x": 1}):
        assert post(address, "/update_weights", json=body).status_code == 400
    refused = update(address, "v1", version=version)
    assert "is the present one" in error_of(refused)["message"]
    (choice,) = generate(address, seed=5, **FREE)["choices"]
    assert choice["token_ids"] == sampled(0, 5)[0].tokens.tolist()
    assert choice["weight_versions"] == [[version, 0]]


def test_strangers_and_servers_without_the_flag_exchange_nothing(address, folder, tmp_path):  # noqa: F811
    for origin in ("https://evil.example", "null"):
        for path in ("/pause", "/resume", "/update_weights"):
            refused = post(address, path, headers={"Origin": origin})
            assert (refused.status_code, error_of(refused)["code"]) == (403, "not_allowed")
    assert health(address)["paused"] is None
    assert httpx.get(f"{address}/pause").status_code == 405
    form = post(address, "/update_weights", data={"weight_dir": "v1"})
    assert form.status_code == 415
    assert post(address, "/pause", headers={"Host": "evil.example"}).status_code == 421
    (tmp_path / "key").write_text("secret")
    with running(folder, f"--api-key-file={tmp_path / 'key'}") as (_, other):
        key = {"Authorization": "Bearer secret"}
        for path in ("/pause", "/resume", "/update_weights", PATH):
            assert post(other, path, json={}).status_code == 401
        for path in ("/pause", "/resume", "/update_weights"):
            refused = post(other, path, json={}, headers=key)
            assert refused.status_code == 403
            assert "--weights-root" in error_of(refused)["message"]
    absent = running(folder, f"--weights-root={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="--weights-root"), absent:
        pass


# --- many conversations at once


@pytest.mark.parametrize(
    ("conversations", "turns", "changes"),
    [(12, 3, [1]), pytest.param(100, 6, [1, 0], marks=pytest.mark.long)],
)
def test_conversations_lose_nothing_while_the_weights_change(
    address, versions, conversations, turns, changes
):
    """Each answer's log-probs are those that the weights of its version give to its tokens."""
    policy, params = versions
    of_version = {with_weights(address, 0): 0}
    rng = np.random.default_rng(0)
    answered, heard, changed = [0], [], asyncio.Event()

    async def converse(client, number):
        context = rng.integers(2, 256, 6).tolist()
        for turn in range(turns):
            if turn == turns - 1:  # so that the newest weights have something to say
                await changed.wait()
            sampling = {"max_tokens": 6, "seed": number * turns + turn, "logprobs": 0}
            body = {"token_ids": context, "sampling_params": sampling}
            answer = await client.post(address + PATH, json=body)
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            heard.append((list(context), choice))
            context = context + choice["token_ids"] + rng.integers(2, 256, 2).tolist()
            answered[0] += 1

    async def change(client):
        for count, number in enumerate(changes, start=1):
            while answered[0] < conversations * turns * count // (len(changes) + 1):
                await asyncio.sleep(0.005)
            answer = await client.post(
                f"{address}/update_weights", json={"weight_dir": f"v{number}"}
            )
            of_version[answer.json()["weight_version"]] = number
        changed.set()

    async def all_at_once():
        async with httpx.AsyncClient(
            timeout=300, limits=httpx.Limits(max_connections=128)
        ) as client:
            talks = (converse(client, number) for number in range(conversations))
            await asyncio.gather(change(client), *talks)

    asyncio.run(all_at_once())
    assert len(heard) == conversations * turns
    seen = set()
    for version, number in of_version.items():
        mine = [(c, a) for c, a in heard if a["weight_versions"] == [[version, 0]]]
        seen |= {id(a) for _, a in mine}
        assert mine
        whole = [context + answer["token_ids"] for context, answer in mine]
        longest = max(map(len, whole))
        padded = [ids + [0] * (longest - len(ids)) for ids in whole]
        scores = np.asarray(policy.log_probs(params[number], padded))
        for (context, answer), row in zip(mine, scores):
            found = [entry["logprob"] for entry in answer["logprobs"]["content"]]
            assert len(found) == len(answer["token_ids"]) > 0
            expected = row[len(context) : len(context) + len(found)].tolist()
            assert found == pytest.approx(expected, abs=2e-3)
    assert len(seen) == len(heard)  # each one is of one version
