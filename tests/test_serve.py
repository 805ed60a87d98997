"""The server, driven by the official client and by others that mean it no good."""

import asyncio
import contextlib
import copy
import dataclasses
import errno
import functools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import h11
import httpx
import jax
import numpy as np
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from adpo_jax import Engine, SamplingParams, pretrained
from adpo_jax.data import arithmetic
from adpo_jax.data.prompts import PromptFormat
from adpo_jax.engine.requests import NewTokens, Request, Sample
from adpo_jax.environments import calls as tools
from adpo_jax.policy import Policy
from adpo_jax.serve import __main__ as serve
from adpo_jax.serve import app, hosting, protocol, service
from adpo_jax.serve.access import Hosts, bears
from adpo_jax.serve.answers import TokenTexts
from adpo_jax.serve.app import Page
from adpo_jax.serve.connections import Connections
from adpo_jax.serve.decoding import Decoding
from adpo_jax.serve.fields import MAX_DEPTH, ApiError, Fields, parse_object
from adpo_jax.serve.service import Language, Prompt, Service
from adpo_jax.serve.tokens import parse_tokens
from adpo_jax.serve.tools import parse_tools

CONFIG = arithmetic.MODEL_CONFIG | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "head_dim": 8,
    "initializer_range": 0.4,
}
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t['function']['name'] }} {% endfor %}"
    "by <tool_call>{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'tool' and not tools %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m['role'] }}: {% for c in m['tool_calls'] %}{{ c['function']['name'] }}"
    "{{ c['function']['arguments']['a'] }}{% endfor %}{{ m['content'] }}\n{% endfor %}{{ tone }}"
)
LENGTHS = ["--max-prompt-length=64", "--max-response-length=64", "--slots=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    policy, params = Policy.from_config(CONFIG, jax.random.key(0))
    tokenizer = copy.deepcopy(arithmetic.make_tokenizer())
    tokenizer.chat_template = TEMPLATE
    # As Gemma 4 has them: without special tokens a text has no calls any more.
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool_call>", "</tool_call>"]})
    policy.save_pretrained(folder, params, tokenizer)
    return folder


@contextlib.contextmanager
def running(folder, *options, on_close=lambda service: None):
    """A server in a thread; yields (it, its address)."""
    command = ["--model", str(folder), "--port=0", *LENGTHS, *options]
    server = serve.make_server(serve.arguments(command), on_close)
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
    engine = Engine(model.policy, max_prompt_length=64, max_response_length=64, num_slots=2)
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
            assert entry.bytes is None or bytes(entry.bytes).decode(errors="replace") == entry.token
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


def sentence_pieces():
    """A tokenizer as Llama 2's: a space begins a word, and is cut at the start of a text."""
    words = ["<unk>", "</s>", "▁a", "a", "▁", "b"] + [f"<0x{byte:02X}>" for byte in range(256)]
    model = models.BPE(
        {word: i for i, word in enumerate(words)},
        [("▁", "a")],
        byte_fallback=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def test_tokens_keep_their_space_and_their_bytes_whatever_the_tokenizer_cuts():
    pieces, levels = sentence_pieces(), arithmetic.make_tokenizer()
    half = levels("é")["input_ids"][:1]
    for tokenizer, token, text, made in (
        (pieces, pieces.convert_tokens_to_ids("▁a"), " a", b" a"),
        (pieces, pieces.convert_tokens_to_ids("a"), "a", b"a"),
        (pieces, pieces.convert_tokens_to_ids("<0xC3>"), "\ufffd", b"\xc3"),
        (pieces, pieces.eos_token_id, "</s>", b"</s>"),
        (levels, half[0], "\ufffd", b"\xc3"),
        (levels, levels.eos_token_id, "<eos>", b"<eos>"),
    ):
        entry = TokenTexts(tokenizer).entry(token, 0.0)
        assert (entry["token"], bytes(entry["bytes"])) == (text, made)


@pytest.fixture
def continuing():
    """Begins the first choice of a request in which the model goes on from "b"."""
    tokenizer, limits = sentence_pieces(), protocol.Limits(9, 9)
    tokenizer.chat_template = "{# tools <tool_call> #}"
    language = Language(tokenizer, len(tokenizer), (), PromptFormat())
    decoding = mock.Mock(batch=mock.Mock(version=0))
    made = Service(language, decoding, limits, mock.Mock())

    def begun(body, **chat):
        parse = parse_tokens if "token_ids" in body else protocol.parse
        asked = parse(body, model="m", limits=limits, **chat)
        return made._choice(0, asked, Prompt(tokenizer("b")["input_ids"])), asked.sampling

    yield begun
    made.close()


def push_text(choice, sampling, text):
    ids = np.array(sentence_pieces()(text)["input_ids"], np.int32)
    sample = Sample(Request(np.zeros(1, np.int32), sampling, None), 0)
    choice.push(NewTokens(sample, ids, np.zeros(len(ids), np.float32), None, "length"))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "x"}, " a a"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, " a a"),
        ({"messages": [{"role": "user", "content": "b"}]}, "a a"),
    ],
)
def test_a_completion_begins_with_the_space_that_stands_behind_what_it_continues(
    continuing, body, text
):
    choice, sampling = continuing(body, chat="messages" in body)
    push_text(choice, sampling, "a a")
    assert choice.whole().text == text


@pytest.mark.parametrize(
    ("body", "chat"),
    [
        ({"prompt": "x", "stop": " a"}, {"chat": False}),
        ({"token_ids": [5], "sampling_params": {"stop": [" a"]}}, {}),
    ],
)
def test_a_stop_string_may_begin_with_the_space_behind_the_prompt(continuing, body, chat):
    choice, sampling = continuing(body, **chat)
    push_text(choice, sampling, "ab a")
    assert choice.num_tokens == 1


@pytest.mark.parametrize(
    ("content", "num_calls"),
    [
        ("<think>\nA sum: ", 0),
        ("<think>a</think>", 1),
        ("Well. ", 1),
        ("<think>a</think><think>", 0),
    ],
)
def test_a_call_that_is_drafted_in_the_thought_of_a_continued_message_is_none(
    continuing, content, num_calls
):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    choice, sampling = continuing({"messages": messages, "tools": [ADD]}, chat=True)
    push_text(choice, sampling, f"{ADD_CALL} b</think>")
    assert len(choice.whole().calls) == num_calls


# --- what lm-eval and others ask


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_runs_its_likelihood_tasks_against_the_server(address, folder, tmp_path):
    reason = "lm-eval is not installed: pip install 'lm_eval[api]'"
    lm_eval = pytest.importorskip("lm_eval", reason=reason)
    pytest.importorskip("tenacity", reason=reason)
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    rows = [{"question": "Ann has 3 apples.", "choices": [" Ben", " coins"], "answer": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "apples",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    lm = LocalCompletionsAPI(
        base_url=f"{address}/v1/completions",
        model="tiny",
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        max_length=48,
        batch_size=2,
    )
    result = lm_eval.simple_evaluate(lm, tasks=[task], log_samples=True, bootstrap_iters=0)
    model = pretrained.load(folder)
    for (found, greedy), choice in zip(
        result["samples"]["apples"][0]["filtered_resps"], rows[0]["choices"], strict=True
    ):
        ids = model.tokenizer(rows[0]["question"] + choice)["input_ids"]
        context = len(model.tokenizer(rows[0]["question"])["input_ids"])
        log_probs = model.policy.log_probs(model.params, [ids])[0, context:]
        best = model.policy.logits(model.params, [ids])[0, context - 1 : -1].argmax(-1)
        assert found == pytest.approx(float(log_probs.sum()), abs=1e-4)
        assert greedy == (best.tolist() == ids[context:])


def test_an_echoed_prompt_has_the_log_probs_that_the_policy_gives_it(client, folder):
    model = pretrained.load(folder)
    texts = ["Ann has 3 apples.", "Ben"]
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    asked = {"model": "tiny", "echo": True, "logprobs": 2, "temperature": 0}
    zero = client.completions.create(prompt=ids, max_tokens=0, **asked)
    one = client.completions.create(prompt=texts, max_tokens=1, **asked)
    chunks = list(client.completions.create(prompt=texts, max_tokens=1, stream=True, **asked))
    assert zero.usage.completion_tokens == 0
    assert one.usage.completion_tokens == 2
    for i, (text, tokens) in enumerate(zip(texts, ids)):
        log_probs = model.policy.log_probs(model.params, [tokens])[0]
        scored = zero.choices[i].logprobs
        assert zero.choices[i].text == text
        assert zero.choices[i].finish_reason == "length"
        assert scored.token_logprobs[0] is scored.top_logprobs[0] is None
        assert scored.token_logprobs[1:] == pytest.approx(log_probs[1:].tolist(), abs=1e-4)
        assert "".join(scored.tokens) == text
        assert [len(top) for top in scored.top_logprobs[1:]] == [2] * (len(tokens) - 1)
        assert all(text.startswith(t, at) for t, at in zip(scored.tokens, scored.text_offset))
        longer = one.choices[i]
        assert longer.text.startswith(text)
        assert longer.logprobs.token_logprobs[:-1] == scored.token_logprobs
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == i]
        assert "".join(choice.text for choice in mine) == longer.text
        together = [p for choice in mine for p in choice.logprobs.token_logprobs]
        assert together == longer.logprobs.token_logprobs
        assert mine[-1].logprobs.text_offset == longer.logprobs.text_offset[-1:]


def test_more_log_probs_than_an_answer_holds_are_refused(address, monkeypatch):
    body = {"prompt": ["Ann has 3 apples. " * 4] * 128, "echo": True, "max_tokens": 0}
    assert post(address, json=body).status_code == 200
    monkeypatch.setattr(service, "MAX_ECHOED", 1000)
    refused = post(address, json=body | {"logprobs": 5})
    assert refused.status_code == 400
    assert "send fewer prompts at once" in error_of(refused)["message"]


CHAT = {"messages": [{"role": "user", "content": "x"}]}
SAMPLES = {"n": 128, "max_tokens": 2048}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x", "logprobs": 4} | SAMPLES, "logprobs"),
        ("/v1/completions", {"prompt": ["x"] * 128, "logprobs": 4, "max_tokens": 2048}, "logprobs"),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 4, "n": 128},
         "top_logprobs"),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": SAMPLES | {"logprobs": 4}},
         "logprobs"),
    ],
)  # fmt: skip
def test_samples_have_no_more_log_probs_than_an_answer_holds(path, body, param):
    limits = protocol.Limits(2048, 2048)
    if path == "/inference/v1/generate":
        parse = parse_tokens
    else:
        parse = functools.partial(protocol.parse, chat="chat" in path)
    with pytest.raises(ApiError, match="is 1310720 log-probs; .* up to 1048576 in an") as error:
        parse(body, model="tiny", limits=limits)
    assert error.value.param == param
    parse(body, model="tiny", limits=dataclasses.replace(limits, max_response_length=64))


def test_an_answer_of_many_log_probs_is_written_down_in_small_parts(monkeypatch):
    entry = {"token": "é", "logprob": -1.5, "bytes": [1, 2], "top_logprobs": [{"a": None}] * 20}
    choice = {"index": 0, "logprobs": {"content": [entry] * 1000, "refusal": None}, "text": ""}
    columns = {"index": 1, "logprobs": {"tokens": ["a"] * 999, "top_logprobs": [{"a": -1}] * 999}}
    prompt = [None, *[{"5": {"logprob": -1}}] * 1000]
    body = {"choices": [choice, columns], "prompt_logprobs": prompt, "usage": {"a": 1}, "b": []}
    wanted, dumps, longest = app._dumped(body), json.dumps, []

    def noted(*args, **kwargs):
        made = dumps(*args, **kwargs)
        longest.append(len(made))
        return made

    monkeypatch.setattr(app.json, "dumps", noted)
    assert app._dumped_in_parts(body) == wanted
    assert max(longest) < len(wanted) / 20
    assert len(longest) < 200  # entries of a list are written together


NEUTRAL = {
    "user": "me",
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "best_of": 1,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "use_beam_search": False,
    "response_format": {"type": "text"},
    "stream_options": {"include_usage": True, "include_obfuscation": True},
    "seed": 1,
    "min_p": 0.0,
    "top_k": -1,
    "stop": None,
    "prompt_logprobs": None,
    "guided_json": None,
    "priority": 0,
}


@pytest.mark.parametrize("chat", [False, True])
def test_fields_that_ask_for_nothing_are_taken(address, chat):
    own = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    own |= {"tools": [], "tool_choice": "none", "logprobs": False} if chat else {"suffix": ""}
    answer = post(address, path, json=NEUTRAL | own | {"max_tokens": 1})
    assert answer.status_code == 200, answer.text


def test_a_last_message_of_the_assistant_is_continued_and_none_is_begun_behind_it(address):
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "An"}]
    ask = functools.partial(post, address, "/v1/chat/completions")
    own = {"messages": talk, "max_tokens": 1}
    vllms = {"continue_final_message": True, "add_generation_prompt": False}
    for fields in ({}, vllms):
        assert ask(json=own | fields).status_code == 200
    for name, value in vllms.items():
        refused = ask(json=own | {name: not value})
        assert (refused.status_code, error_of(refused)["param"]) == (400, name)
        assert "this server continues it" in error_of(refused)["message"]
        # Behind a user's message it is the other way round.
        assert ask(json=own | {"messages": talk[:1], name: not value}).status_code == 200
        assert ask(json=own | {"messages": talk[:1], name: value}).status_code == 400


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--allowed-host", "https://my.server", "wanted a name such as example.org"),
        ("--cors-origin", "my.server", "wanted an origin such as https://example.org"),
        ("--cors-origin", "https://my.server/path", "wanted an origin"),
    ],
)
def test_names_that_no_client_sends_are_refused(option, value, wanted, capsys):
    with pytest.raises(SystemExit):
        serve.arguments(["--model=x", option, value])
    assert wanted in capsys.readouterr().err


def test_max_tokens_above_the_room_is_cut(client):
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 10**9}
    asked["extra_body"] = {"ignore_eos": True, "min_tokens": 10**6}
    for answer in (
        client.completions.create(prompt="Ann", **asked),
        client.chat.completions.create(messages=[{"role": "user", "content": "x"}], **asked),
    ):
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 64


# --- tools

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
SUB = {"type": "function", "function": {"name": "sub"}}
XML_CALL = "<tool_call>\n<function=add>\n<parameter=a>\n12\n</parameter>\n</function>"
QUOTED = {"text": "use <function=add> here"}
QUOTING_CALL = f'<tool_call>{{"name": "sub", "arguments": {json.dumps(QUOTED)}}}'
ADD_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def pieces(form, text, size, **options):
    """What a parser makes of a text that comes in pieces: (text, [(function, arguments)])."""
    parser = tools.CallParser(form, [ADD, SUB], **options)
    found = [parser.push(text[i : i + size]) for i in range(0, len(text), size)]
    found.append(parser.push("", last=True))
    calls = [call["function"] for piece in found for call in piece.calls]
    said = "".join(piece.text for piece in found)
    return said, [(call["name"], json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("tags", "No call. \n", ("No call. \n", [])),
        ("tags", f"Well.\n{ADD_CALL}\n", ("Well.", [("add", {"a": 1})])),
        (
            "tags",
            f'{ADD_CALL}\n<tool_call>{{"name": "sub", "arguments": {{}}}}</tool_call>',
            ("", [("add", {"a": 1}), ("sub", {})]),
        ),
        ("tags", '<tool_call>{"name": "sub"}', ("", [("sub", {})])),
        ("tags", 'a <tool_call>{"name": "sub"', ('a <tool_call>{"name": "sub"', [])),
        ("tags", 'a <tool_call>{"name": "rm"}</tool_call>', None),
        ("tags", '<tool_call>{"name": ["add"]}</tool_call> b', None),
        ("tags", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', None),
        ("tags", "<tool_call>" + "[" * 3000, None),
        ("tags", "1 < 2 <tool", None),
        ("tags", XML_CALL, ("", [("add", {"a": 12})])),
        *(("tags", QUOTING_CALL + end, ("", [("sub", QUOTED)])) for end in ("", "</tool_call>")),
        *(("tags", XML_CALL[: XML_CALL.find(cut)], None) for cut in ("2", "</par", "/function")),
        ("json", '{"name": "add", "parameters": {"a": 1}}', ("", [("add", {"a": 1})])),
        (
            "json",
            '<|python_tag|>{"name": "add", "parameters": {}}; {"name": "sub", "parameters": {}}',
            ("", [("add", {}), ("sub", {})]),
        ),
        (
            "json",
            ' [{"name": "add", "parameters": {}}, {"name": "sub"}]',
            ("", [("add", {}), ("sub", {})]),
        ),
        (
            "json",
            '<think>{"name": "sub"}</think>\n{"name": "add", "parameters": {}}',
            ('<think>{"name": "sub"}</think>', [("add", {})]),
        ),
        ("json", '[{"name": "add", "parameters": {}}, 5]', None),
        ("json", "[1, 2] and more", None),
        ("json", "[]", None),
        ("json", '{"name": "add", "parameters": {}} and more', None),
        ("json", '{"answer": 5}', None),
        ("json", "Text {", None),
        ("json", "[" * 3000, None),
    ],
)
def test_calls_are_found_in_what_a_model_writes_however_it_comes(form, text, expected):
    expected = (text, []) if expected is None else expected
    for size in (1, 2, 5, 10**6):
        assert pieces(form, text, size) == expected
    one = expected[0], expected[1][:1]
    assert pieces(form, text, 3, parallel=False) == one


def test_the_template_tells_the_form_of_calls():
    llama = 'Respond in the format {"name": function name, "parameters": dictionary of arguments'
    assert tools.form_of("{% if tools %}" + llama) == "json"
    assert tools.form_of(TEMPLATE) == "tags"
    assert tools.form_of("<tool_call>") is None
    assert tools.form_of("{% if tools %}[TOOL_CALLS]") is None


def writes(monkeypatch, text: str, tokenizer=None):
    """Every completion says this, three tokens at a time."""
    tokenizer = tokenizer or arithmetic.make_tokenizer()
    tokens = np.array(tokenizer(text)["input_ids"], np.int32)

    def submit(self, prompt, sampling, *, queue, **_):
        request = Request(np.array(prompt), sampling, lambda: None)
        for sample in request.samples:
            for at in range(0, len(tokens), 3):
                new, last = tokens[at : at + 3], at + 3 >= len(tokens)
                zeros = np.zeros(len(new), np.float32)
                queue.put_nowait(NewTokens(sample, new, zeros, None, "stop" if last else None))
        return request.samples

    monkeypatch.setattr(Decoding, "submit", submit)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_model_calls_functions_and_is_told_what_they_gave(client, folder, monkeypatch, parallel):
    tokenizer = pretrained.load(folder).tokenizer
    end = tokenizer.eos_token
    assert "<tool_call>" in tokenizer.all_special_tokens
    writes(monkeypatch, f"I add.\n{ADD_CALL}\n{ADD_CALL}{end}", tokenizer)
    asked = {"model": "tiny", "tools": [ADD, SUB], "max_tokens": 64}
    asked["parallel_tool_calls"] = parallel
    question = {"role": "user", "content": "x"}
    whole = client.chat.completions.create(messages=[question], **asked)
    rendered = "add sub by <tool_call>user: x\n"
    assert whole.usage.prompt_tokens == len(tokenizer(rendered)["input_ids"])
    choice = whole.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I add.")
    calls = choice.message.tool_calls
    assert [(c.function.name, c.function.arguments) for c in calls] == [("add", '{"a": 1}')] * (
        2 if parallel else 1
    )
    assert len({call.id for call in calls}) == len(calls)

    text, streamed, reason = "", {}, None
    for chunk in client.chat.completions.create(messages=[question], stream=True, **asked):
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason or reason
        text += delta.content or ""
        for call in delta.tool_calls or ():
            streamed[call.index] = (call.function.name, call.function.arguments)
    assert (text, reason) == ("I add.", "tool_calls")
    assert streamed == dict(enumerate((c.function.name, c.function.arguments) for c in calls))

    told = [question, choice.message.to_dict()]
    told.append({"role": "tool", "tool_call_id": calls[0].id, "content": "2"})
    whole = client.chat.completions.create(messages=told, **asked)
    rendered += "assistant: " + "add1" * len(calls) + "I add.\ntool: 2\n"
    assert whole.usage.prompt_tokens == len(tokenizer(rendered)["input_ids"])


def test_null_is_as_good_as_absent_in_tools_and_messages(address):
    told = {"name": "add", "parameters": None, "description": None, "strict": None}
    tool = {"type": "function", "function": told, "extra": None}
    call = {"id": None, "type": None, "function": {"name": "add", "arguments": None}}
    messages = [
        {"role": "user", "content": "x", "name": None, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": None},
    ]
    asked = {"messages": messages, "max_tokens": 1, "tools": [tool], "tool_choice": None}
    answer = post(address, "/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    given = protocol._messages(Fields({"messages": messages}))
    assert None not in [value for message in given for value in message.values()]
    fields = Fields({"tools": [tool]})
    assert parse_tools(fields) == [{"type": "function", "function": {"name": "add"}}]


STRICT = {"type": "function", "function": {"name": "add", "strict": True}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [ADD], "tool_choice": "required"}, "cannot make a model call"),
        ({"tools": [ADD], "tool_choice": {"type": "function"}}, "cannot make a model call"),
        ({"tools": [STRICT]}, "strict must be false"),
        ({"tools": [{"type": "web_search"}]}, 'must be {"type": "function"'),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "letters, digits"),
        ({"tools": {"a": 1}}, "a list of up to"),
        ({"functions": [{"name": "add"}]}, "functions has no effect"),
    ],
)
def test_tools_that_cannot_be_served_are_refused(address, fields, message):
    body = {"messages": [{"role": "user", "content": "x"}]} | fields
    refused = post(address, "/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert message in error_of(refused)["message"]


DEEP = '{"a": ' * 900 + "1" + "}" * 900


@pytest.mark.parametrize("arguments", ["no JSON", "[1]", '{"a": NaN}', "[" * 9999, DEEP, 5])
def test_calls_of_earlier_messages_have_arguments_that_can_be_read(address, arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    refused = post(address, "/v1/chat/completions", json={"messages": messages})
    assert refused.status_code == 400
    assert "must be a JSON object" in error_of(refused)["message"]


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
    assert (health["status"], health["running"], health["waiting"]) == ("ok", 0, 0)


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
    steps = []

    def slow_step(self):
        steps.append(time.sleep(0.05))
        return step(self)

    monkeypatch.setattr(ContinuousBatch, "step", slow_step)

    def running():
        health = httpx.get(f"{address}/health").json()
        return health["running"] + health["waiting"]

    content = json.dumps(body | {"stream": stream}).encode()
    connection = socket.create_connection(address.removeprefix("http://").split(":"))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    wait_until(lambda: running() > 0)
    connection.close()
    wait_until(lambda: running() == 0)
    # 12 samples of 64 tokens on 8 slots, 4 tokens a step, would take 32 steps.
    assert len(steps) < 24


# --- what is refused

REFUSED = {
    "no JSON": (b"{", None),
    "not UTF-8": (b'{"prompt": "\xff"}', None),
    "no object": (b"[1]", None),
    "deep": (b'{"prompt":' + b"[" * 100_000, None),
    "deeper than any schema": (b'{"metadata":' + b"[" * 100 + b"]" * 100 + b"}", None),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), None),
    "half as bytes": (b'{"prompt": "x", "user": "\xed\xa0\xbd"}', "user"),
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
    "half a pair": (b'{"prompt": "x", "user": "\\ud83d"}', "user"),
    "too long": ({"prompt": "apples " * 200}, "prompt"),
    "too many ids": ({"prompt": [5] * 100_000}, "prompt"),
    "too many": ({"prompt": ["x"] * 100, "n": 2}, "n"),
    "n": ({"prompt": "x", "n": 0}, "n"),
    "n as float": ({"prompt": "x", "n": 1.0}, "n"),
    "max_tokens": ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
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
    "penalty": ({"prompt": "x", "repetition_penalty": 1.1}, "repetition_penalty"),
    "bias": ({"prompt": "x", "logit_bias": {"5": -100}}, "logit_bias"),
    "best of": ({"prompt": "x", "best_of": 3}, "best_of"),
    "suffix": ({"prompt": "x", "suffix": "y"}, "suffix"),
    "beams": ({"prompt": "x", "use_beam_search": True}, "use_beam_search"),
    "tools": ({"prompt": "x", "tools": []}, "tools"),
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


def test_a_body_may_be_as_deep_as_is_said_and_hold_any_character():
    deep = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    assert parse_object(b'{"a":' + deep + b"}")["a"]
    with pytest.raises(ApiError, match="nested too deeply: up to 100 levels"):
        parse_object(b'{"a":[' + deep + b"]}")
    held = parse_object('\ufeff{"a": "\ud7ff\U0001f600"}'.encode())
    assert held == {"a": "\ud7ff\U0001f600"}


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
            if garbage.startswith(b"\x00"):
                with connection.makefile("rb") as file:
                    head, _, body = file.read().partition(b"\r\n\r\n")
                assert b" 400 " in head
                assert error_of(httpx.Response(400, content=body))["message"].endswith(
                    "no HTTP request"
                )
    answer = client.completions.create(model="tiny", prompt="Ann", max_tokens=2)
    assert answer.choices[0].finish_reason in ("stop", "length")


# --- strangers, and clients that mean no good

COMMON = {"prompt": "Ann", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def strict_server(folder):
    """A server that gives up soon; yields it and its address."""
    options = ["--head-timeout=0.4", "--body-timeout=0.4", "--max-requests-per-client=2"]
    options += ["--allowed-host=My.server:8000", "--cors_origin=https://A.example/"]
    with running(folder, *options) as (server, address):
        yield server, address


@pytest.fixture
def strict(strict_server):
    return strict_server[1]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:1", 200),
        ("MY.server:80", 200),
        ("evil.example", 421),
        ("localhost.evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("192.168.0.7", 421),
        ("", 421),
    ],
)
def test_a_page_that_takes_our_address_for_its_name_is_refused(strict, host, status):
    for path in ("/", "/health", "/v1/models"):
        answer = httpx.get(strict + path, headers={"Host": host})
        assert answer.status_code == status
        if status != 200:
            assert "--allowed-host" in error_of(answer)["message"]


def test_a_server_on_all_interfaces_takes_addresses_and_names_it_was_told():
    for bound in ("0.0.0.0", "::"):
        hosts = Hosts(bound, ["my.server"])
        for good in ("10.0.0.7:8000", "[fe80::1]:80", "my.server", "localhost"):
            hosts.check(good)
        with pytest.raises(ApiError, match="--allowed-host"):
            hosts.check("evil.example")
    for allowed in ("2001:DB8::1", "[2001:db8::1]:8000"):
        Hosts("127.0.0.1", [allowed]).check("[2001:db8::1]:80")
    Hosts("127.0.0.1", ["*"]).check("evil.example")


@pytest.mark.parametrize(
    ("header", "let_in"),
    [
        ("Bearer schlüssel", True),
        ("bearer schlüssel", True),
        ("BEARER  schlüssel", True),
        ("schlüssel", True),
        ("Bearer", False),
        ("Bearer schl?ssel", False),
        ("Bearer schlüsse", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("code", ["utf-8", "latin-1"])
def test_a_key_is_read_in_either_code_and_whatever_the_case_of_its_scheme(header, let_in, code):
    # Starlette reads headers so.
    assert bears(header.encode(code).decode("latin-1"), "schlüssel") is let_in
    assert not bears("Bearer ?", "€")


def test_pages_of_named_origins_alone_may_use_the_server(strict, address):
    asked = {"Access-Control-Request-Method": "POST"}
    # As OpenAI's client for JavaScript asks.
    names = "authorization, content-type, x-stainless-lang, x-stainless-retry-count"
    asked["Access-Control-Request-Headers"] = names
    for origin, allowed in (
        ("https://a.example", "https://a.example"),
        ("https://b.example", None),
    ):
        headers = {"Origin": origin}
        before = httpx.options(f"{strict}/v1/chat/completions", headers=headers | asked)
        assert before.headers.get("access-control-allow-origin") == allowed
        assert before.status_code == (200 if allowed else 400)
        answer = post(strict, json=COMMON, headers=headers)
        assert answer.headers.get("access-control-allow-origin") == allowed
        silent = httpx.get(f"{address}/v1/models", headers=headers)
        assert "access-control-allow-origin" not in silent.headers


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /v1/comp",
        HEAD + b"X: y\r\n",
        HEAD + b"Content-Length: 100\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        # What is answered before it has all been sent.
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1",
    ],
)
def test_a_request_that_is_half_sent_and_trickles_on_ends(strict, begun):
    began = time.time()
    with socket.create_connection(strict.removeprefix("http://").split(":")) as connection:
        connection.sendall(begun)
        connection.settimeout(0.1)
        answer, last = b"", None
        while last != b"":
            assert time.time() - began < 30, answer
            with contextlib.suppress(TimeoutError):
                try:
                    last = connection.recv(4096)
                    answer += last
                    connection.sendall(b"1")
                except (ConnectionError, BrokenPipeError):
                    break
    if b"Content-Length: 100" in begun or b"chunked" in begun:
        assert b" 408 " in answer


async def no_app(scope, receive, send):
    pass


def test_a_client_that_does_not_read_is_let_go():
    """The transport says that nothing goes out; the timer that ends it can be seen."""
    aborted = []

    async def run():
        config = uvicorn.Config(app=no_app, lifespan="off", log_config=None)
        limits = Connections(most=4, most_each=4, reading_timeout_s=0.01)
        state = types.SimpleNamespace(connections=set(), tasks=set(), default_headers=[])
        made = limits.protocol(config=config, server_state=state, app_state={})
        unread = 1 << 20
        transport = mock.Mock(get_extra_info={}.get, abort=lambda: aborted.append(1))
        transport.get_write_buffer_size = lambda: unread
        made.connection_made(transport)
        made.pause_writing()
        made.resume_writing()
        await asyncio.sleep(0.05)
        assert not aborted
        made.pause_writing()
        for _ in range(5):  # one that reads slowly, but all the time
            made._read_at -= 1.0
            unread -= 1
            made._reading_timer.cancel()
            made._check_reading()
        assert not aborted
        await asyncio.sleep(0.05)
        made.connection_lost(OSError())
        assert limits.open.total() == 0

    asyncio.run(run())
    assert aborted == [1]


def test_a_body_that_breaks_off_ends_its_request_and_never_follows_an_answer():
    broken = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    ended = []

    async def waits(scope, receive, send):
        while (message := await receive())["type"] != "http.disconnect":
            assert message["type"] == "http.request"
        ended.append(scope["path"])

    async def run():
        config = uvicorn.Config(app=waits, lifespan="off", log_config=None)
        config.load()
        state = types.SimpleNamespace(
            connections=set(), tasks=set(), default_headers=[], total_requests=0
        )
        for begun in (False, True):
            made = Connections(most=4, most_each=4).protocol(
                config=config, server_state=state, app_state={}
            )
            transport = mock.Mock(get_extra_info={}.get, is_closing=lambda: False)
            made.connection_made(transport)
            made.data_received(broken)
            if begun:
                made.conn.send(h11.Response(status_code=200, headers=[]))
            made.data_received(b"no size\r\n")
            assert transport.close.called
            # What has begun is broken off; two answers would be read as one.
            assert transport.write.called != begun
            await asyncio.wait_for(asyncio.gather(*state.tasks), 5)

    asyncio.run(run())
    assert ended == ["/", "/"]


def test_a_client_with_too_many_connections_leaves_room_for_others():
    limits = Connections(most=13, most_each=2, proxies=["10.0.0.9"])
    states, said = [], []
    peers = ["10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8::2"]
    # Behind a proxy there are many clients, who come by its address.
    proxies = ["10.0.0.9"] * 3 + ["127.0.0.1", "::ffff:127.0.0.1", "127.0.0.1", "::1"]

    async def run():
        config = uvicorn.Config(app=no_app, lifespan="off", log_config=None)
        state = types.SimpleNamespace(connections=set(), tasks=set(), default_headers=[])
        for peer in peers + proxies:
            known = {"peername": (peer, 1)}
            transport = mock.Mock(get_extra_info=known.get)
            limits.protocol(config=config, server_state=state, app_state={}).connection_made(
                transport
            )
            states.append(transport.close.called)
            said.extend(call.args[0] for call in transport.write.call_args_list)

    asyncio.run(run())
    (answer,) = said
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"Content-Length: %d\r\n" % len(body) in head + b"\r\n"
    assert "too many connections" in error_of(httpx.Response(503, content=body))["message"]
    assert states == [False, False, True, *[False] * 10]
    # The addresses of one IPv6 network are one client.
    assert limits.open["2001:db8::/64"] == 2


def test_a_client_with_too_many_requests_leaves_room_for_others(strict_server, monkeypatch):
    server, strict = strict_server
    release = threading.Event()
    tokenize = Service._tokenize

    def slow(self, request):
        if request.prompts == ["slow"]:
            release.wait(30)
        return tokenize(self, request)

    monkeypatch.setattr(Service, "_tokenize", slow)

    def ask(prompt, client):
        return post(strict, json=COMMON | {"prompt": prompt}, headers={"X-Forwarded-For": client})

    with ThreadPoolExecutor(8) as pool:
        try:
            busy = [pool.submit(ask, "slow", "10.1.1.1") for _ in range(2)]
            wait_until(lambda: server.app.clients.under_way == 2)
            refused = ask("Ann", "10.1.1.1")
            assert refused.status_code == 429
            assert "of this client" in error_of(refused)["message"]
            assert refused.headers["retry-after"] == "1"
            # Many slow clients of one prompt each would be needed to fill the threads.
            assert ask("Ann", "10.1.1.2").status_code == 200
        finally:
            release.set()
        assert [future.result().status_code for future in busy] == [200, 200]
    assert ask("Ann", "10.1.1.1").status_code == 200


def test_a_slow_tokenizer_stalls_no_stream(address, monkeypatch):
    release, tokenize = threading.Event(), Service._tokenize

    def slow(self, request):
        if request.prompts == ["slow"]:
            release.wait(30)
        return tokenize(self, request)

    monkeypatch.setattr(Service, "_tokenize", slow)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(post, address, json=COMMON | {"prompt": "slow"})
        try:
            headers = {"X-Forwarded-For": "10.1.1.3"}
            body = COMMON | {"stream": True, "max_tokens": 20}
            answer = post(address, json=body, headers=headers)
            assert answer.text.endswith("data: [DONE]\n\n")
            assert not held.done()
        finally:
            release.set()
        assert held.result().status_code == 200


@pytest.mark.parametrize("chat", [True, False])
def test_a_text_too_long_for_any_prompt_is_refused_before_it_is_tokenised(
    address, monkeypatch, chat
):
    monkeypatch.setattr(Service, "_tokenize", lambda *_: pytest.fail("tokenised"))
    text = "x" * (16 * 64 + 1)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    bodies = [{"messages": [{"role": "user", "content": text}]}] if chat else [{"prompt": text}]
    if chat:
        tool = {"type": "function", "function": {"name": "add", "description": text}}
        short = {"messages": [{"role": "user", "content": "x"}]}
        bodies += [short | {"tools": [tool]}, short | {"chat_template_kwargs": {"tone": text}}]
    for body in bodies:
        refused = post(address, path, json=body)
        assert refused.status_code == 400
        assert error_of(refused)["code"] == "context_length_exceeded"
        assert "characters" in error_of(refused)["message"]


# --- what it tells of itself


def test_prometheus_reads_what_was_asked_and_answered(strict):
    def read():
        text = httpx.get(f"{strict}/metrics").text
        families = text_string_to_metric_families(text)
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in families
            for sample in family.samples
        }

    before = read()
    assert post(strict, json=COMMON | {"max_tokens": 9, "n": 2}).status_code == 200
    assert post(strict, json={"prompt": ""}).status_code == 400
    after = read()

    def grown(*key):
        return after[key] - before.get(key, 0)

    assert grown("vllm:prompt_tokens_total", "tiny") == 1
    assert grown("vllm:generation_tokens_total", "tiny") == 18
    assert grown("vllm:request_success_total", "length", "tiny") == 2
    assert grown("vllm:time_to_first_token_seconds_count", "tiny") == 2
    assert grown("vllm:e2e_request_latency_seconds_count", "tiny") == 2
    assert grown("vllm:request_time_per_output_token_seconds_count", "tiny") == 2
    assert grown("adpo_jax:http_responses_total", "/v1/completions", "200") == 1
    assert grown("adpo_jax:http_responses_total", "/v1/completions", "400") == 1
    assert after["vllm:num_requests_running", "tiny"] == 0
    assert after["vllm:num_requests_waiting", "tiny"] == 0
    assert after["adpo_jax:max_slots", "tiny"] == 8


def test_the_page_is_one_file_that_may_load_nothing_beside_it(address):
    page = httpx.get(f"{address}/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href)\s*=|https?:|innerHTML|@import""", page.text)


@pytest.mark.parametrize("has_chat", [True, False])
def test_the_page_sends_plain_text_where_there_is_no_chat_template(has_chat):
    page = asyncio.run(Page(lambda: has_chat).answer(None)).body.decode()
    assert ('<option value="chat" disabled>' in page) is not has_chat
    assert '<option value="text">' in page  # which a browser chooses where the first is disabled


@pytest.mark.filterwarnings("ignore")
def test_the_policy_answers_in_a_browser(address, monkeypatch, tmp_path):
    reason = "needs `pip install playwright` and a Chromium on the PATH (Debian's `chromium`)"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip(reason)
    hostile = "<img src=x onerror=\"document.title='taken'\"><script>alert(1)</script>"
    writes(monkeypatch, hostile)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        try:
            page, asked, faults = browser.new_page(), [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda message: faults.append(message.text))
            page.goto(f"{address}/")
            expect, say = playwright.expect, page.get_by_label("Message", exact=True)
            expect(page.get_by_role("heading")).to_have_text("tiny")
            expect(page.get_by_role("status")).to_have_text("ready")
            say.fill("2 + 2?")
            page.get_by_role("button", name="Send").click()
            expect(page.locator("article.assistant")).to_contain_text(hostile)
            expect(page.locator("article small")).to_contain_text("stop, ")
            assert page.locator("article img").count() == 0
            assert page.title() == "tiny"
            page.get_by_text("Settings").click()
            page.get_by_label("Send as").select_option("text")
            page.get_by_label("Temperature").fill("0")
            say.fill("Ann")
            page.get_by_role("button", name="Send").click()
            expect(page.locator("article.assistant small")).to_have_count(2)
            assert faults == []
            say.fill("x" * 5000)
            page.get_by_role("button", name="Send").click()
            expect(page.locator("article.error")).to_contain_text("characters")
            page.screenshot(path=tmp_path / "page.png", full_page=True)
            page.get_by_role("button", name="Start anew").click()
            expect(page.locator("article")).to_have_count(0)
            assert {url.removeprefix(address) for url in asked} == {
                "/",
                "/v1/models",
                "/v1/chat/completions",
                "/v1/completions",
            }
        finally:
            browser.close()


# --- a server of its own


@pytest.mark.parametrize(
    "option", ["--port=99999", "--port=-1", "--slots=0", "--head-timeout=nan", "--body-timeout=-1"]
)
def test_an_option_that_cannot_work_is_refused(option, capsys):
    with pytest.raises(SystemExit) as exit:
        serve.arguments(["--model=x", option])
    assert exit.value.code == 2
    assert "wanted a" in capsys.readouterr().err


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


def test_sigterm_lets_streams_finish_and_takes_no_more(folder, monkeypatch):
    ended, codes = [], []
    monkeypatch.setattr(serve, "CLOSE_S", 0.01)
    monkeypatch.setattr(serve.os, "_exit", codes.append)
    with running(folder, on_close=ended.append) as (server, address):
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
            # One that waited to be accepted as the listener closed is reset or ends without an
            # answer.
            with contextlib.suppress(httpx.NetworkError, httpx.RemoteProtocolError):
                httpx.get(f"{address}/health")
                return False
            return True

        wait_until(refused)
    # Of a process of its own threads do not hold up the end.
    assert ended == [server.app.service]
    serve.end_in_time(ended[0])
    wait_until(lambda: codes == [0])


class LateEvent(threading.Event):
    """An event that is set, for the end of a thread, just before the thread clears it."""

    def __init__(self, decoding):
        super().__init__()
        self._decoding = decoding

    def clear(self):
        self._decoding._stopping = True
        self.set()
        super().clear()


def test_decoding_ends_whenever_it_is_told_to():
    loop = asyncio.new_event_loop()
    idle = mock.Mock(step=list, under_way=False, holds=False, busy=False)
    decoding = Decoding(idle, loop)
    first, decoding._wake = decoding._wake, LateEvent(decoding)
    first.set()
    decoding._thread.join(10)
    assert not decoding._thread.is_alive()
    loop.close()


def test_a_server_without_its_model_leaves_the_port(folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = []
    monkeypatch.setattr(
        hosting, "bound", lambda *a, bound=hosting.bound: made.extend(bound(*a)) or made
    )
    assert serve.main(["--model=no/model", f"--port={port}"]) == 2
    assert [one.fileno() for one in made] == [-1]


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--model=no/model", f"--port={port}"]) == 2
    said = capsys.readouterr().err
    assert f"--port is 127.0.0.1:{port}, at which this machine cannot listen" in said


def test_a_port_that_another_server_took_while_this_one_loaded_is_told(monkeypatch, capsys):
    def run():
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(serve, "make_server", lambda *_: types.SimpleNamespace(run=run))
    assert serve.main(["--model=x"]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_told(monkeypatch, capsys):
    def load(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "model")

    monkeypatch.setattr(pretrained, "load", load)
    assert serve.main(["--model=model", "--port=0"]) == 2
    assert "Permission denied: 'model'" in capsys.readouterr().err


def test_a_name_with_several_addresses_has_one_port_on_all_of_them(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", 0)) for last in (2, 3)]
    found.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)))  # not this machine
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(one) for one in hosting.bound("name", 0, "--port")]
        (host, port), (other, same) = (one.getsockname() for one in sockets)
    assert (host, other, port) == ("127.0.0.2", "127.0.0.3", same)
    del found[:2]
    with pytest.raises(ValueError, match="--port is name:0, at which this machine cannot listen"):
        hosting.bound("name", 0, "--port")


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
def test_a_process_whose_threads_do_not_end_ends_all_the_same(folder):
    program = (
        "import threading, time\n"
        "from adpo_jax.serve import __main__ as serve, service\n"
        "service.Service.close = lambda self: time.sleep(600)\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "serve.run()\n"
    )
    command = [sys.executable, "-c", program, f"--model={folder}", "--port=0", *LENGTHS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stderr if "running on" in line)
        process.send_signal(signal.SIGTERM)
        assert "without its threads" in process.stderr.read()
        assert process.wait(timeout=30) == 0


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


def test_a_model_is_served_under_the_name_of_its_folder_or_of_its_run(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    for inner in ("export", "checkpoints/50"):
        (folder / inner).mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert serve.model_name(".") == serve.model_name("checkpoints/..") == "mine"
    assert serve.model_name("Qwen/Qwen3-0.6B") == "Qwen3-0.6B"
    assert serve.model_name("export") == "export"
    (folder / "config.json").write_text('{"actor_rollout_ref": {}}')
    assert serve.model_name(".") == serve.model_name("export") == "mine"
    assert serve.model_name("checkpoints/50") == serve.model_name("checkpoints") == "mine"
