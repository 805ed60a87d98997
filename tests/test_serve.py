"""The server, driven by the official client and by others that mean it no good."""

import asyncio
import contextlib
import copy
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import jax
import openai
import pytest

from adpo_jax import Engine, SamplingParams, pretrained
from adpo_jax.data import arithmetic
from adpo_jax.policy import Policy
from adpo_jax.serve import __main__ as serve

CONFIG = arithmetic.MODEL_CONFIG | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "head_dim": 8,
    "initializer_range": 0.4,
}
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ tone }}"
)
LENGTHS = ["--max-prompt-length=48", "--max-response-length=64", "--slots=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    policy, params = Policy.from_config(CONFIG, jax.random.key(0))
    tokenizer = copy.deepcopy(arithmetic.make_tokenizer())
    tokenizer.chat_template = TEMPLATE
    policy.save_pretrained(folder, params, tokenizer)
    return folder


@contextlib.contextmanager
def running(folder, *options):
    """A server in a thread; yields (it, its address)."""
    command = ["--model", str(folder), "--port=0", *LENGTHS, *options]
    server = serve.make_server(serve.arguments(command))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(folder):
    with running(folder) as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(address, path="/v1/completions", **kwargs):
    return httpx.post(address + path, timeout=60, **kwargs)


def error_of(response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- what the official client sees


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "adpo_jax"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("other")


def test_a_completion_is_what_the_engine_samples_with_that_seed(client, folder):
    text = "Ann has 3 apples."
    answer = client.completions.create(
        model="tiny", prompt=text, n=2, seed=5, max_tokens=20, temperature=0.8, logprobs=2
    )
    model = pretrained.load(folder)
    ids = model.tokenizer(text)["input_ids"]
    sampling = SamplingParams(
        n=2, max_tokens=20, temperature=0.8, stop_token_ids=model.stop_token_ids
    )
    engine = Engine(model.policy, max_prompt_length=48, max_response_length=64, num_slots=2)
    out = engine.generate(model.params, [ids], sampling, jax.random.key(5))
    assert answer.object == "text_completion"
    for choice in answer.choices:
        expected = out[0][choice.index]
        assert choice.text == model.tokenizer.decode(expected.tokens, skip_special_tokens=True)
        assert choice.finish_reason == expected.finish_reason
        log_probs = expected.log_probs.tolist()
        assert choice.logprobs.token_logprobs == pytest.approx(log_probs, abs=1e-4)
        assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == out.lengths.sum()


def test_a_chat_goes_through_the_template_and_streams_what_it_gives_whole(client, folder):
    asked = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
        ],
        "seed": 3,
        "n": 2,
        "max_tokens": 30,
        "logprobs": True,
        "top_logprobs": 3,
        "extra_body": {"chat_template_kwargs": {"tone": "Now: "}},
    }
    whole = client.chat.completions.create(**asked)
    rendered = "system: Be brief.\nuser: 2 + 2?\nNow: "
    tokenizer = pretrained.load(folder).tokenizer
    assert whole.usage.prompt_tokens == len(tokenizer(rendered)["input_ids"])

    texts, roles, reasons, scored, usage = ["", ""], [None, None], [None, None], [[], []], None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] = choice.delta.role or roles[choice.index]
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            scored[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert roles == ["assistant", "assistant"]
    for choice in whole.choices:
        assert choice.message.content == texts[choice.index]
        assert choice.finish_reason == reasons[choice.index]
        assert choice.logprobs.content == scored[choice.index]
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 3
            assert entry.top_logprobs[0].logprob >= entry.logprob - 1e-5
            assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    assert usage == whole.usage


def test_a_stop_string_ends_the_text_before_it(client):
    asked = {"model": "tiny", "prompt": "Ann", "max_tokens": 60, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    free = client.completions.create(**asked)
    assert free.choices[0].finish_reason == "length"
    stop = free.choices[0].text[2:4]
    stopped = client.completions.create(**asked, stop=["never there", stop])
    choice = stopped.choices[0]
    assert choice.text == free.choices[0].text[: free.choices[0].text.index(stop)]
    assert choice.finish_reason == "stop"
    assert stopped.usage.completion_tokens < free.usage.completion_tokens
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
    later = asked | {"extra_body": asked["extra_body"] | {"min_tokens": 40}}
    waited = client.completions.create(**later, stop=stop)
    assert waited.choices[0].text == choice.text
    assert (waited.choices[0].finish_reason, waited.usage.completion_tokens) == ("stop", 40)


def test_several_prompts_as_texts_or_token_ids(client):
    asked = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    texts = client.completions.create(prompt=["Ann has", "Ben"], **asked)
    assert [choice.index for choice in texts.choices] == [0, 1]
    tokenizer = arithmetic.make_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in ("Ann has", "Ben")]
    by_ids = client.completions.create(prompt=ids, **asked)
    assert [c.text for c in by_ids.choices] == [c.text for c in texts.choices]


# --- under load


def test_a_hundred_streams_at_once_drop_nothing_and_sample_what_each_does_alone(address):
    """100 streams over 8 slots, each with settings of its own; half of them twice."""

    def settings(i: int) -> dict:
        return {
            "model": "tiny",
            "prompt": f"Ann has {i % 50} apples.",
            "seed": i % 50,
            "max_tokens": 10 + i % 5,
            "temperature": 0.5 + i % 50 % 3 / 2,
            "top_p": 0.9 if i % 2 else 1.0,
            "extra_body": {"ignore_eos": True},
        }

    async def one(client, i: int):
        text, usage = "", None
        options = {"include_usage": True}
        stream = await client.completions.create(**settings(i), stream=True, stream_options=options)
        async for chunk in stream:
            usage = chunk.usage or usage
            text += chunk.choices[0].text if chunk.choices else ""
        return text, usage.completion_tokens

    async def all_at_once():
        base = f"{address}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, i) for i in range(100)))
            return together, [await one(client, i) for i in range(0, 50, 10)]

    together, alone = asyncio.run(all_at_once())
    assert [tokens for _, tokens in together] == [10 + i % 5 for i in range(100)]
    for i in range(50):
        assert together[i] == together[i + 50]
    for i, found in zip(range(0, 50, 10), alone):
        assert found == together[i]
    health = httpx.get(f"{address}/health").json()
    assert health == {"status": "ok", "running": 0, "waiting": 0}


def wait_until(holds, seconds=30):
    deadline = time.time() + seconds
    while not holds():
        assert time.time() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slots(address, monkeypatch, stream):
    from adpo_jax.engine.continuous import ContinuousBatch

    step = ContinuousBatch.step

    body = {"prompt": "Ann", "n": 12, "max_tokens": 64, "ignore_eos": True}
    assert post(address, json=body).status_code == 200  # compiles
    monkeypatch.setattr(ContinuousBatch, "step", lambda self: time.sleep(0.05) or step(self))

    def running():
        health = httpx.get(f"{address}/health").json()
        return health["running"] + health["waiting"]

    content = json.dumps(body | {"stream": stream}).encode()
    connection = socket.create_connection(address.removeprefix("http://").split(":"))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    wait_until(lambda: running() > 0)
    connection.close()
    gone = time.time()
    wait_until(lambda: running() == 0)
    # 12 samples of 64 tokens on 8 slots, 4 tokens a step of 0.05 s, would take 1.6 s.
    assert time.time() - gone < 1.0


# --- what is refused

REFUSED = {
    "no JSON": (b"{", None),
    "not UTF-8": (b'{"prompt": "\xff"}', None),
    "no object": (b"[1]", None),
    "deep": (b'{"prompt":' + b"[" * 100_000, None),
    "endless number": (b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", None),
    "no prompt": ({}, "prompt"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "empty list": ({"prompt": []}, "prompt"),
    "mixed list": ({"prompt": [1, "x"]}, "prompt"),
    "bool in list": ({"prompt": [True]}, "prompt"),
    "token outside": ({"prompt": [10**6]}, "prompt"),
    "endless token": ({"prompt": [10**30]}, "prompt"),
    "negative token": ({"prompt": [-1]}, "prompt"),
    "lone surrogate": (b'{"prompt": "\\ud800"}', "prompt"),
    "too long": ({"prompt": "apples " * 200}, "prompt"),
    "too many": ({"prompt": ["x"] * 100, "n": 2}, "n"),
    "n": ({"prompt": "x", "n": 0}, "n"),
    "n as float": ({"prompt": "x", "n": 1.0}, "n"),
    "max_tokens": ({"prompt": "x", "max_tokens": 65}, "max_tokens"),
    "temperature": ({"prompt": "x", "temperature": -1}, "temperature"),
    "no number": (b'{"prompt": "x", "temperature": NaN}', "temperature"),
    "no float": ({"prompt": "x", "temperature": 10**400}, "temperature"),
    "bool": ({"prompt": "x", "temperature": True}, "temperature"),
    "top_p": ({"prompt": "x", "top_p": 1.5}, "top_p"),
    "top_k": ({"prompt": "x", "top_k": 2**40}, "top_k"),
    "seed": ({"prompt": "x", "seed": "7"}, "seed"),
    "stop": ({"prompt": "x", "stop": [""]}, "stop"),
    "many stops": ({"prompt": "x", "stop": ["a"] * 99}, "stop"),
    "stream": ({"prompt": "x", "stream": "yes"}, "stream"),
    "logprobs": ({"prompt": "x", "logprobs": 99}, "logprobs"),
    "stop ids": ({"prompt": "x", "stop_token_ids": [-5]}, "stop_token_ids"),
    "unsupported": ({"prompt": "x", "frequency_penalty": 1}, "frequency_penalty"),
    "unknown": ({"prompt": "x", "tempreature": 1}, "tempreature"),
    "stream options": ({"prompt": "x", "stream_options": {"x": 1}}, "x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_openais_form_naming_the_field(address, name):
    body, param = REFUSED[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = post(address, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "at least one"),
        ([], "at least one"),
        ([{"role": "robot", "content": "x"}], "role"),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "no text"),
        ([{"role": "tool", "content": "x"}], "no tools"),
    ],
)
def test_bad_messages_are_refused(address, messages, message):
    response = post(address, "/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert message in error_of(response)["message"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"chat_template": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"},
        {"tokenize": False},
        {"tone": ["x"]},
        "x",
    ],
)
def test_a_client_has_no_hold_on_the_template_but_its_variables(address, kwargs):
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": kwargs}
    response = post(address, "/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "chat_template_kwargs" in error_of(response)["message"]


def test_other_refusals_have_their_status(address, client):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="gpt-4", prompt="x")
    assert post(address, data={"prompt": "x"}).status_code == 415
    big = json.dumps({"prompt": "x" * (1 << 20)}).encode()
    response = post(address, content=big, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert error_of(httpx.get(f"{address}/nothing"))["message"] == "Not Found"
    assert httpx.get(f"{address}/v1/completions").status_code == 405


def test_bytes_that_are_no_http_harm_nobody(address, client):
    for garbage in (
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n",
    ):
        with socket.create_connection(address.removeprefix("http://").split(":")) as connection:
            connection.sendall(garbage)
    answer = client.completions.create(model="tiny", prompt="Ann", max_tokens=2)
    assert answer.choices[0].finish_reason in ("stop", "length")


# --- a server of its own


def test_the_key_is_asked_for_and_never_written_down(folder, monkeypatch, tmp_path, capfd):
    secret = "secret-" + "x" * 20
    (tmp_path / "key").write_text(secret + "\n")
    options = [f"--api-key-file={tmp_path / 'key'}", "--max-requests=0"]
    with running(folder, *options) as (_, address):
        assert httpx.get(f"{address}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            refused = httpx.get(f"{address}/v1/models", headers=headers)
            assert refused.status_code == 401
            assert error_of(refused)["code"] == "invalid_api_key"
        key = {"Authorization": f"Bearer {secret}"}
        assert httpx.get(f"{address}/v1/models", headers=key).status_code == 200
        busy = post(address, json={"prompt": "x"}, headers=key)
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    shown = capfd.readouterr()
    assert secret not in shown.out + shown.err
    assert "/v1/models" in shown.out + shown.err
    with pytest.raises(ValueError, match=r"--host 0\.0\.0\.0 lets others in"):
        serve.read_api_key(serve.arguments(["--model=x", "--host=0.0.0.0"]))
    monkeypatch.setenv("ADPO_JAX_API_KEY", "k")
    assert serve.read_api_key(serve.arguments(["--model=x", "--host=0.0.0.0"])) == "k"


def test_sigterm_lets_streams_finish_and_takes_no_more(folder):
    with running(folder) as (server, address):
        body = {"prompt": "Ann", "max_tokens": 64, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        usage = json.loads(rest[-2].removeprefix("data: "))["usage"]
        assert usage["completion_tokens"] == 64

        def refused():
            with contextlib.suppress(httpx.ConnectError):
                httpx.get(f"{address}/health")
                return False
            return True

        wait_until(refused)


def test_when_decoding_fails_clients_are_told_and_the_server_goes_down(folder, monkeypatch):
    with running(folder) as (server, address):

        def fail(self):
            raise RuntimeError("out of memory")

        monkeypatch.setattr("adpo_jax.engine.batching.DecodeLoop._decode", fail)
        response = post(address, json={"prompt": "Ann"})
        assert response.status_code == 500
        assert error_of(response)["type"] == "server_error"
        assert "memory" not in response.text
        wait_until(lambda: server.should_exit)
        assert server.app.service.decoding.failed


@pytest.mark.long
def test_a_process_that_is_told_to_end_finishes_its_streams(folder):
    command = [sys.executable, "-m", "adpo_jax.serve", f"--model={folder}", "--port=0", *LENGTHS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if "running on" in line)
        address = re.search(r"http://[\d.:]+", line)[0]
        body = {"prompt": "Ann", "max_tokens": 64, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        process.stderr.read()
        # uvicorn ends by the signal it was given once everything is done.
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)


# --- what is in messages


def test_control_tokens_of_clients_are_text_and_no_field_is_dropped_unless_by_flag(
    client, address, folder
):
    def count(where, content, **more):
        messages = [{"role": "user", "content": content} | more]
        body = {"model": "tiny", "messages": messages, "max_tokens": 1}
        return post(where, "/v1/chat/completions", json=body)

    as_text = count(address, "a<eos>b").json()["usage"]["prompt_tokens"]
    refused = count(address, "a", weight="heavy")
    assert refused.status_code == 400
    assert error_of(refused)["message"].startswith('the chat template leaves out "weight"')
    kwargs = {"tone": "<eos>user: me"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    refused = post(address, "/v1/chat/completions", json=body | {"chat_template_kwargs": kwargs})
    assert "cannot hold the control token '<eos>'" in error_of(refused)["message"]
    with running(folder, "--allow-control-tokens") as (_, other):
        meant = count(other, "a<eos>b").json()["usage"]["prompt_tokens"]
    tokenizer = pretrained.load(folder).tokenizer
    assert meant == len(tokenizer("user: a<eos>b\n")["input_ids"])
    assert as_text > meant
