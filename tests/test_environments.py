"""Environments: the contract, processes, calls, answers as tokens, rollouts."""

import dataclasses
import inspect
import json
import os
import queue
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import environments_example as example
import jax
import numpy as np
import pytest
from parsing import parse
from test_metrics import check_documented

import adpo_jax
from adpo_jax.data import calculator, small_chat
from adpo_jax.data.dataset import Dataset
from adpo_jax.data.prompts import render_prompts
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.engine.session import Turn
from adpo_jax.environments import contract, rendering
from adpo_jax.environments.calls import Call, CallParser, calls_in, form_of, parameters_of
from adpo_jax.environments.contract import EndedEnvironment, Spec
from adpo_jax.environments.environments import Environments
from adpo_jax.environments.pool import Answer, EnvironmentFailed, EnvironmentPool, failure_text
from adpo_jax.environments.rendering import TurnTemplate
from adpo_jax.environments.worker import House
from adpo_jax.log.metrics import read_jsonl
from adpo_jax.records import Completion, GradedGroups, Prompts
from adpo_jax.rewards import RewardFunction, RewardModel, Scores
from adpo_jax.rewards.model import GIVEN
from adpo_jax.rollouts.completing import Reading
from adpo_jax.rollouts.conversations import Conversation, Conversations
from adpo_jax.rollouts.flight import FlyingSample, Told
from adpo_jax.rollouts.in_turns import InTurns
from adpo_jax.rollouts.sampler import generate_and_grade, sample_records, turn_metrics
from adpo_jax.run import setup
from adpo_jax.run.environments import check_environments, make_environments

FILE = str(Path(example.__file__))
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
MODELS = Path(os.environ.get("ADPO_JAX_MODELS", "/nowhere"))


# --- the contract


def test_public_methods_and_plain_functions_are_tools_with_schemas():
    described = contract.describe(example.Counter(), {"shout": example.shout})
    assert described.class_name == "Counter"
    assert described.has_reward
    assert tuple(described.parameters) == ("shout", "add", "fail", "hang", "wait")
    add = described.tools[1]["function"]
    assert add["description"] == "Adds to the count."
    number = add["parameters"]["properties"]["number"]
    assert number == {"type": "integer", "description": "What to add."}


def members_as_trl(instance):
    """What TRL 1.16 makes tools of."""
    members = inspect.getmembers(instance, predicate=inspect.ismethod)
    return [m for name, m in members if name not in ("reset", "get_reward") and name[0] != "_"]


def test_bound_methods_are_tools_as_in_trl_and_no_property_is_read():
    bound = example.Bound()
    assert list(contract.methods_of(bound).values()) == [bound.find, bound.other, bound.tool]
    assert not bound.reads
    assert members_as_trl(bound) == [bound.find, bound.other, bound.tool]
    described = contract.describe(bound, {})
    assert tuple(described.parameters) == ("search", "other", "tool")
    assert contract.tools_of(bound, {})["search"]("x") == "found x"
    bound.again = example.make_counter().add
    bound.plus = example.make_counter().add
    with pytest.raises(contract.Unfit, match="two tools of Bound have functions of the name add"):
        contract.describe(bound, {})


@pytest.mark.filterwarnings("ignore")  # of TRL, torch and transformers about each other
def test_trl_takes_the_same_file_and_shows_the_same_tools(tmp_path):
    pytest.importorskip("torch", reason="TRL needs torch")
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    if not (MODELS / "qwen3").is_dir():
        pytest.skip("ADPO_JAX_MODELS has no qwen3, whose template TRL knows")
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import get_json_schema
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "qwen3")
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen3.jinja").read_text()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads))
    rows = {"prompt": [[{"role": "user", "content": "Go."}]] * 4, "environment": ["counter"] * 4}
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], num_generations=2,
                        per_device_train_batch_size=2),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        tools=[example.shout],
        environment_factory=example.BOTH,
    )  # fmt: skip
    for name, make in example.BOTH.items():
        ours = contract.describe(make(), {"shout": example.shout})
        assert ours.tools == [get_json_schema(tool) for tool in trainer._env_tools[name]]
    assert trainer.reward_func_names == ["Counter"]


@pytest.fixture(scope="module")
def pool():
    with EnvironmentPool(Spec(FILE, "BOTH", ("shout", "whisper")), 2, timeout_s=1.0) as made:
        yield made


def described_in(path, name):
    makers, tools = contract.load(Spec(path, name))
    return contract.describe(makers[None](), tools)


BROKEN = {
    ("nothere.py", "X"): "there is no file",
    (FILE, "Nobody"): "defines no 'Nobody'",
    (FILE, "NoReset"): "has no method reset",
    (FILE, "NoHints"): "NoHints.tool needs type hints",
    (FILE, "NoDoc"): "NoDoc.tool needs type hints, and a docstring",
    (FILE, "ByPlace"): r"the tool ByPlace.tool takes \*numbers: int by its place",
    (FILE, "NoTools"): "has no tools",
    (FILE, "FILE"): "defines no 'FILE'",
}


def test_a_class_that_cannot_work_is_refused_in_a_sentence():
    for (path, name), text in BROKEN.items():
        with pytest.raises(ValueError, match=text):
            described_in(path, name)


def test_functions_of_one_name_are_no_two_tools():
    def made(name):
        return type(example.shout)(example.shout.__code__, {}, name, None)

    with pytest.raises(contract.Unfit, match="2 functions of environment.tools have the name tool"):
        contract.describe(contract.NoEnvironment(), {"a": made("tool"), "b": made("tool")})
    counter = example.make_counter()
    with pytest.raises(contract.Unfit, match="add is a tool of Counter and one of environment.too"):
        contract.describe(counter, {"plus": made("add")})


def test_environments_are_found_by_the_text_of_their_names(tmp_path):
    file = tmp_path / "numbered.py"
    file.write_text("class A: pass\nNUMBERED = {1: A, None: A}\n")
    assert contract.load(Spec(str(file), "NUMBERED"))[0].keys() == {"1", "None"}


# --- processes


def ask(pool, lease, verb, **arguments):
    answers = queue.SimpleQueue()
    pool.ask(lease, verb, arguments, answers)
    return answers.get(timeout=60)


def test_an_environment_is_reset_called_and_read_in_its_process(pool):
    described, several = pool.describe()
    assert several
    assert tuple(described["other"].parameters) == ("shout", "whisper", "look")
    lease = pool.lease("counter")
    row = {"start": 3, "prompt": "Go."}
    assert ask(pool, lease, "reset", row=row, seed=1).content["said"] == " It stands at 3."
    assert ask(pool, lease, "call", tool="add", arguments={"number": 4}).content["said"] == "7"
    assert ask(pool, lease, "call", tool="wait", arguments={"seconds": 0}).content["said"]
    assert ask(pool, lease, "call", tool="shout", arguments={"text": "x"}).content["said"] == "X"
    assert ask(pool, lease, "call", tool="whisper", arguments={"text": "X"}).content["said"] == "x"
    failed = ask(pool, lease, "call", tool="fail", arguments={})
    assert (failed.error, failed.kind) == ("it is broken", "raised")
    assert failed.content["attributes"]["count"] == 17
    assert "unexpected keyword" in ask(pool, lease, "call", tool="add", arguments={"x": 1}).error
    ended = ask(pool, lease, "end").content
    assert ended["reward"] == 17.0
    assert ended["attributes"]["double"] == 34
    assert ended["attributes"]["resets"] == 1
    pool.give_back(lease)
    again = pool.lease("counter")
    assert again is lease
    assert ask(pool, again, "reset", row={}, seed=1).content["said"] is None
    assert ask(pool, again, "end").content["attributes"]["resets"] == 2


def test_random_numbers_of_an_environment_are_its_own(pool):
    leases = [pool.lease("counter") for _ in range(4)]
    for lease in leases:
        ask(pool, lease, "reset", row={}, seed=5)
    lucks = {ask(pool, lease, "end").content["attributes"]["luck"] for lease in leases}
    assert lucks == {random.Random(5).random()}


def test_an_environment_that_is_made_for_a_reset_is_reset_as_one_that_was_there():
    with EnvironmentPool(Spec(FILE, "Deck"), 2, timeout_s=5.0) as pool:
        leases = [pool.lease(None) for _ in range(3)]
        said = [ask(pool, lease, "reset", row={}, seed=7).content["said"] for lease in leases * 2]
        assert len(set(said)) == 1
        assert ask(pool, leases[0], "reset", row={}, seed=8).content["said"] not in said


def test_a_process_that_has_ended_between_two_rollouts_is_replaced_at_the_next_reset():
    with EnvironmentPool(Spec(FILE, "Deck"), 1, timeout_s=5.0) as pool:
        lease = pool.lease(None)
        assert not ask(pool, lease, "reset", row={}, seed=7).kind
        assert ask(pool, lease, "call", tool="deal", arguments={}).content["said"] == "a card"
        time.sleep(1)
        assert not ask(pool, lease, "reset", row={}, seed=7).kind
        assert ask(pool, lease, "call", tool="deal", arguments={}).content["said"] == "a card"
        time.sleep(1)
        assert tuple(pool.describe()[0][""].parameters) == ("deal",)


def test_a_call_that_hangs_is_killed_and_its_environment_is_lost_until_the_next_reset(pool):
    lease, other = pool.lease("counter"), None
    while other is None or other.worker is lease.worker:
        other = pool.lease("counter")
    for each in (lease, other):
        ask(pool, each, "reset", row={}, seed=0)
    started = time.monotonic()
    assert ask(pool, lease, "call", tool="hang", arguments={}).kind == "timeout"
    assert time.monotonic() - started < 20
    assert ask(pool, lease, "call", tool="add", arguments={"number": 1}).kind == "lost"
    assert ask(pool, other, "call", tool="add", arguments={"number": 1}).content["said"] == "1"
    assert not ask(pool, lease, "reset", row={"start": 2}, seed=0).kind
    slow = ask(pool, lease, "call", tool="wait", arguments={"seconds": 30})
    assert slow.kind == "cancelled"  # and the environment lives
    assert ask(pool, lease, "call", tool="add", arguments={"number": 1}).content["said"] == "3"


def test_what_a_tool_raises_is_its_answer_even_if_it_looks_like_our_own_deadline():
    with EnvironmentPool(Spec(FILE, "Careless"), num_workers=1, timeout_s=5.0) as pool:
        lease = pool.lease(None)
        assert ask(pool, lease, "reset", row={}, seed=0).content["said"] == "caf?"
        for tool, text in (
            ("speechless", "Speechless"),
            ("unreachable", "did not answer"),
            ("hangs_up", "hung up"),
            ("cancels", ""),
        ):
            answer = ask(pool, lease, "call", tool=tool, arguments={})
            assert (answer.kind, answer.error) == ("raised", text)
        ended = ask(pool, lease, "end")
        assert ended.kind == "unfit"
        owner = "the environment Careless"
        wanted = f"get_reward of {owner} returned 'good'; wanted a finite number"
        assert failure_text("end", ended, 5.0) == wanted


def nested(depth):
    """Lists in lists."""
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_attributes_that_are_too_large_cost_no_reward(caplog):
    instance = example.Counter()
    instance.reset(start=2)
    kept = {"made", "resets", "count", "luck", "double", "fits"}
    instance.log = "x" * contract.MOST_ATTRIBUTES
    instance.deep, instance.fits = nested(500), nested(60)
    assert contract.attributes_of(instance).keys() == kept
    instance.log += "x"
    contract.attributes_of(instance)
    assert caplog.text.count("Counter.log is too large") == 1
    assert caplog.text.count("Counter.deep is too large") == 1
    for kept in ({"a": [1, "b"]}, "x" * 90, [{}] * 40, [None, 1.5]):
        for room in range(100):
            assert not contract._is_longer(kept, room) or len(json.dumps(kept)) > room
    assert contract._is_longer(["x" * 50] * 10**6, 100)
    assert contract._is_longer({"a": {"b": "x" * 99}}, 100)


def test_what_is_said_has_a_limit(tmp_path):
    (tmp_path / "pages.py").write_text(
        "class Pages:\n"
        "    def reset(self, **row):\n"
        "        return 'a' * 1_000_000 + 'z'\n\n"
        "    def read(self):\n"
        "        return self.reset()\n"
    )
    house = House(Spec(str(tmp_path / "pages.py"), "Pages"), timeout_s=5.0)
    said = house.reset(number=0, name=None, row={}, seed=0)["said"]
    assert (len(said), said[-1]) == (1_000_000, "z")  # as prompts are cut
    said = house.call(number=0, tool="read", arguments={})["said"]
    assert (len(said), said[-1]) == (1_000_000, "a")


def test_a_process_that_answers_something_else_is_replaced(pool, monkeypatch):
    lease = pool.lease("counter")
    for reply in ({}, [], None, {"said2": 1}):
        with monkeypatch.context() as patch:
            patch.setattr("adpo_jax.environments.pool.wire.receive_json", lambda *_, r=reply: r)
            assert ask(pool, lease, "reset", row={}, seed=0).kind == "raised"
    # Its process is another one by now, which has no answer left to what was asked before.
    assert ask(pool, lease, "reset", row={"start": 2}, seed=0).content["said"]
    assert ask(pool, lease, "call", tool="add", arguments={"number": 1}).content["said"] == "3"


def test_what_reward_functions_read_of_an_ended_environment():
    ended = EndedEnvironment("Counter", {"count": 3})
    assert ended.count == 3
    assert not hasattr(ended, "add")
    with pytest.raises(AttributeError, match="Counter has no 'add' to read"):
        ended.add(1)


# --- calls


QWEN_XML = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
TOOLS = {"add": {}}
ONE = [Call("add", {"a": 1})]
CALLS = [
    ("tags", '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', ONE),
    ("tags", 'Well.<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', ONE),
    ("tags", QWEN_XML, ONE),
    ("tags", QWEN_XML.removesuffix("</tool_call>"), ONE),
    ("tags", '<tool_call>{"name": "add", "arguments": {"a": "<function=add>"}}',
     [Call("add", {"a": "<function=add>"})]),
    ("tags", "no call", []),
    ("json", '{"name": "add", "parameters": {"a": 1}}', ONE),
    ("json", '<|python_tag|>[{"name": "add", "arguments": {"a": 1}}]', ONE),
    ("json", 'So:\n```json\n{"name": "add", "arguments": {"a": 1}}\n```', ONE),
    ("json", '{"a": 1}', []),
    ("gemma", "<start_function_call>call:add{a:1}<end_function_call>", ONE),
    ("gemma", "<start_function_call>call:add{a:<escape>x}y<escape>,b:[1,{c:true}]}",
     [Call("add", {"a": "x}y", "b": [1, {"c": True}]})]),
    ("gemma4", '<|tool_call>call:add{a:1}<tool_call|><|tool_call>call:add{a:1}<tool_call|>',
     ONE * 2),
]  # fmt: skip
MALFORMED = [
    ("tags", QWEN_XML[: QWEN_XML.find("</parameter>")], "no </function>"),
    ("tags", "<tool_call>{", "no JSON object"),
    ("tags", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', 'no tool "rm"; there are'),
    ("tags", '<tool_call>{"name": {"a": 1}, "arguments": {}}</tool_call>', "there is no tool"),
    ("tags", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "arguments of add"),
    ("tags", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "no JSON object"),
    ("tags", '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>', "no JSON object"),
    ("tags", "<tool_call>" + "[" * 100_000, "no JSON object"),
    ("tags", '<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 10_000 + "}}", "no JSON"),
    (
        "tags",
        '<tool_call>{"name": "add", "arguments": {"a": %s}}' % ("[" * 600 + "]" * 600),
        "nest",
    ),
    (
        "json",
        '{"name": "add", "parameters": {"a": %s}}' % ("[" * 600 + "]" * 600),
        "add nest deeper",
    ),
    ("json", '{"name": "add", "parameters": {', "no JSON object"),
    ("gemma", "<start_function_call>call:add{a:" + "[" * 100_000, "arguments of add"),
    ("gemma", "<start_function_call>call:add{a:<escape>x", "arguments of add"),
    ("gemma4", "<|tool_call>os.system<tool_call|>", "no JSON object"),
]


def test_calls_of_all_families_are_found_and_malformed_ones_say_why():
    for form, text, wanted in CALLS:
        assert calls_in(form, text, TOOLS) == wanted, text
    for form, text, why in MALFORMED:
        (call,) = calls_in(form, text, TOOLS)
        assert why in call.error, (text[:80], call)
        assert len(call.error) < 300
    assert len(calls_in("tags", "<tool_call>{}" * 1000, TOOLS)) == 65
    deep = json.dumps({"name": "add", "arguments": {"a": nested(31)}})
    assert calls_in("json", deep, TOOLS) == [Call("add", {"a": nested(31)})]


CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize(
    ("form", "text", "wanted"),
    [
        ("tags", f"<think>\nOr {CALL}?\n</think>\n\nNothing to do.", []),
        ("tags", f"<think>\nOr {CALL}?\n</think>\n\n{CALL}", ONE),
        ("tags", f"<think>a</think> <think>{CALL}</think>{CALL}", ONE),
        ("tags", f"Well.<think>\n{CALL} and", []),
        ("tags", f"<think>\n{CALL} or {QWEN_XML}", ONE),  # as Qwen3.5 ends a thought
        ("tags", f"<think>\n{QWEN_XML} or so</think>Well.", []),
        ("tags", "<think>\nOr <tool_call> <fun", []),
        ("tags", CALL + "<think>", ONE),
        ("tags", '<tool_call>{"name": "add", "arguments": {"a": "</think>"}}</tool_call>',
         [Call("add", {"a": "</think>"})]),
        ("tags", '<tool_call>{"name": "add", "arguments": {"a": "<think>"}}</tool_call>',
         [Call("add", {"a": "<think>"})]),
        ("json", '<think>{"name": "add"}</think>{"name": "add", "parameters": {"a": 1}}', ONE),
        ("json", '{"name": "add", "parameters": {"a": "<think>"}}',
         [Call("add", {"a": "<think>"})]),
        ("gemma4", "<|channel>thought\n<|tool_call>call:add{a:1}<tool_call|><channel|>Done.", []),
        ("gemma4", "<|channel>thought\n<channel|><|tool_call>call:add{a:1}<tool_call|>", ONE),
    ],
)  # fmt: skip
def test_a_call_that_is_drafted_in_a_thought_is_none(form, text, wanted):
    assert calls_in(form, text, TOOLS) == wanted
    begun = [mark for mark in ("<think>", "<|channel>") if text.startswith(mark)]
    for thought in ("", *begun):
        for size in (1, 3, len(text)):
            parser = CallParser(form, [{"function": {"name": "add"}}], thought=thought)
            comes = text.removeprefix(thought)
            found = [parser.push(comes[i : i + size]) for i in range(0, len(comes), size)]
            found.append(parser.push("", last=True))
            functions = [call["function"] for piece in found for call in piece.calls]
            made = [Call(each["name"], json.loads(each["arguments"])) for each in functions]
            assert made == wanted
            if not wanted:
                assert "".join(piece.text for piece in found) == comes


def test_a_template_that_begins_a_thought_is_known(tokenizer, monkeypatch):
    assert template_of(tokenizer).thought == ""
    begins = "{%- if add_generation_prompt %}<think>\n{%- endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + begins)
    assert template_of(tokenizer).thought == "<think>"


TEXT, FLAG, WHOLE = ({"type": kind} for kind in ("string", "boolean", "integer"))
TEXT_OR_NONE = {"anyOf": [TEXT, {"type": "null"}]}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (TEXT, "\n2024\n", "2024"),
        (TEXT, "true", "true"),
        (TEXT, "null", "null"),
        (TEXT, "1.10", "1.10"),
        (TEXT, '"x"', '"x"'),
        (TEXT, "\n\n  123\n\n", "\n  123\n"),
        (TEXT_OR_NONE, "null", None),
        (TEXT_OR_NONE, "2024", "2024"),
        ({"type": ["string", "integer"]}, "2024", 2024),
        ({"type": ["string", "integer"]}, "1.10", "1.10"),
        (FLAG, "\nTrue\n", True),
        (FLAG, "false", False),
        (WHOLE, "\n5\n", 5),
        (WHOLE, "five", "five"),
        ({"type": "array"}, '["a"]', ["a"]),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": "1"}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"allOf": [TEXT]}, "1", "1"),
        ({"anyOf": [{"type": ["string", "null"]}]}, "1", "1"),
        ({"oneOf": [{"anyOf": [TEXT]}]}, "1", "1"),
        ({"$ref": "#/$defs/text"}, "1", "1"),
        ({"$ref": "#/$defs/circle"}, "1", 1),
        ({"$ref": "#/$defs/none"}, "1", 1),
        ({}, "2024", 2024),
        ({}, "\n\na\n", "\na"),
        ({"type": 5}, "2024", 2024),
        (None, "2024", 2024),
    ],
    ids=str,
)
def test_an_argument_in_xml_has_the_type_that_its_tool_declares(schema, text, value):
    written = QWEN_XML.replace("\n1\n", text)
    shared = {"text": TEXT, "circle": {"anyOf": [{"$ref": "#/$defs/circle"}] * 2}}
    tool = {"name": "add", "parameters": {"properties": {"a": schema}, "$defs": shared}}
    tools = [{"type": "function", "function": tool}]
    (call,) = calls_in("tags", written, parameters_of(tools))
    assert call == Call("add", {"a": value})
    assert type(call.arguments["a"]) is type(value)
    (call,) = CallParser("tags", tools).push(written, last=True).calls
    assert json.loads(call["function"]["arguments"]) == {"a": value}


def test_a_fence_within_a_line_is_no_block():
    text = 'Use ```add```:\n```json\n{"name": "add", "arguments": {"a": 1}}\n```'
    assert calls_in("json", text, TOOLS) == ONE


def test_a_block_of_code_in_another_language_does_not_hide_the_one_with_the_call():
    text = 'So:\n```python\nadd(1)\n```\nor\n```json\n{"name": "add", "parameters": {"a": 1}}\n```'
    assert calls_in("json", text, TOOLS) == ONE


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("json", "```json" + "\n" * 200_000),
        ("json", "``` " * 50_000),
        ("tags", "<tool_call><function=add>" + "<parameter=" * 200_000),
        ("tags", "<tool_call><function=add>" + "<parameter= " * 200_000 + ">"),
        ("tags", "<tool_call>" + "<function=" * 20_000),
        ("tags", "<think></think>" * 20_000),
        ("tags", "<think>" + "<tool_call> " * 20_000),
    ],
)
def test_calls_are_looked_for_in_linear_time(form, text):
    """Each took minutes by regular expressions with two open repeats."""
    started = time.process_time()
    calls_in(form, text, TOOLS)
    assert time.process_time() - started < 5


def test_no_text_makes_the_parsers_raise_or_hang():
    rng = random.Random(0)
    pieces = ["<tool_call>", "</tool_call>", "<|tool_call>", "<start_function_call>", "call:add",
              "{", "}", "[", "]", '"name"', ":", '"add"', "<escape>", ",", "<function=add>", "a",
              "<parameter=a>", "\\u", "```json\n", "\n```", "<|python_tag|>", "1e999",
              "\ud800"]  # fmt: skip
    started = time.monotonic()
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 30)))
        for form in ("tags", "json", "gemma", "gemma4"):
            for call in calls_in(form, text, TOOLS):
                assert call.error or call.name == "add"
    assert time.monotonic() - started < 20


# --- answers as tokens


@pytest.fixture(scope="module")
def tokenizer():
    return calculator.make_tokenizer()


def template_of(tokenizer, max_tool_tokens=16, kwargs=None):
    stop = [tokenizer.eos_token_id]
    return TurnTemplate(tokenizer, kwargs or {}, [ADD], stop, max_tool_tokens)


def test_an_answer_is_what_the_rendering_grows_by(tokenizer):
    template = template_of(tokenizer)
    (one, two) = template.answer_ids([[("add", "42")], [("add", "1"), ("add", "2")]])
    assert tokenizer.decode(one) == "<tool>42</tool>"
    assert tokenizer.decode(two) == "<tool>1</tool><tool>2</tool>"
    assert tokenizer.convert_ids_to_tokens(one)[0] == "<tool>"  # the control token


def test_control_tokens_in_an_answer_are_text(tokenizer):
    template = template_of(tokenizer)
    (ids,) = template.answer_ids([[("add", template.cut("</tool><eos>\ud800"))]])
    assert tokenizer.decode(ids) == "<tool></tool><eos>?</tool>"
    special = [i for i in ids if i in tokenizer.all_special_ids or i < 6]
    assert tokenizer.convert_ids_to_tokens(special) == ["<tool>", "</tool>"]


def test_a_long_answer_is_cut_with_a_mark(tokenizer):
    template = template_of(tokenizer, 4)
    assert template.cut("1234") == "1234"
    assert template.cut("12345") == "1234... (cut at 4 tokens)"
    assert template.cut("1" * 10_000_000).endswith("... (cut at 4 tokens)")


FORGETS = (
    "{% if tools %}<tool_call>{{ tools[0]['function']['name'] }}\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.tool_calls %}{% if loop.last %}hm {% endif %}"
    "{{ m.tool_calls[0].function.name }}<eos>{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def with_template(tokenizer, text):
    made = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    made.chat_template = text
    return made


def test_a_template_that_cannot_take_turns_is_refused(tokenizer):
    for text, why in (
        (None, "no chat template"),
        ("{{ messages[0].content }}", "leaves out the calls"),
        (FORGETS, "turn 1 says 'hm mark0000k<eos>', and then 'mark0000k<eos>"),
        (FORGETS.replace("hm ", "").replace("<tool_call>", ""), "form of calls"),
        (FORGETS.replace("hm ", "").replace("<eos>", "|"), "none of the tokens that end"),
    ):
        with pytest.raises(ValueError, match=why):
            template_of(with_template(tokenizer, text))
    assert template_of(with_template(tokenizer, FORGETS.replace("hm ", ""))).patch == ""


@pytest.mark.skipif(not (MODELS / "qwen3").is_dir(), reason="ADPO_JAX_MODELS has no qwen3")
def test_the_template_of_qwen3_is_patched_by_name_and_gives_what_transformers_does():
    from transformers import AutoTokenizer

    qwen3 = AutoTokenizer.from_pretrained(MODELS / "qwen3")
    template = template_of(qwen3)
    assert (template.form, template.patch) == ("tags", "qwen3")
    (ids,) = template.answer_ids([[("add", "42"), ("add", "<|im_end|>")]])
    assert qwen3.decode(ids) == (
        "\n<|im_start|>user\n<tool_response>\n42\n</tool_response>\n<tool_response>\n<|im_end|>\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(qwen3.eos_token_id) == 1
    calling = rendering._told([("add", "42")], [("add", "42")])
    whole = qwen3.apply_chat_template(calling, add_generation_prompt=True, return_dict=False)
    (ids,) = template.answer_ids([[("add", "42")]])
    assert whole[-len(ids) :] == ids


def test_the_template_tells_the_form_of_calls_of_gemma():
    assert form_of("{% if tools %}<start_function_call>") == "gemma"
    assert form_of("{% if tools %}<|tool_call>") == "gemma4"


# --- rollouts, over an engine that says what a script has


class Sample:
    def __init__(self, place, index):
        self.place, self.index = place, index


class Script:
    """An engine's session whose samples say lines one after the other; "..." runs out of room."""

    def __init__(self, tokenizer, lines, max_tokens):
        self._tokenizer, self._lines, self._max = tokenizer, lines, max_tokens
        self.stats, self.appended, self._ready, self._size = {}, {}, [], {}
        self._num_submitted = 0

    def __call__(self, params, sampling, key, *, version=0):
        self._n = sampling.n
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert not self._size, "some samples have not ended"

    @property
    def num_decoding(self):
        return len(self._ready)

    def submit(self, ids, keys):
        samples = [Sample(self._num_submitted, i) for i in range(self._n)]
        self._num_submitted += 1
        for sample in samples:
            key = (sample.place, sample.index)
            self._ready.append((sample, list(self._lines[key])))
            self.appended[key], self._size[key] = [], 0
        return SimpleNamespace(samples=samples)

    def step(self):
        ready, self._ready, turns = self._ready[:1], self._ready[1:], []
        for sample, lines in ready:
            line = lines.pop(0)
            sample.lines = lines
            ids = np.array(self._tokenizer(line.replace("...", ""))["input_ids"], np.int32)
            self._size[sample.place, sample.index] += len(ids)
            probs = np.full(len(ids), -1.0, np.float32)
            turns.append(Turn(sample, ids, probs, None, "length" if "..." in line else "stop"))
        return turns

    def room(self, sample):
        return self._max - self._size[sample.place, sample.index]

    def go_on(self, sample, ids):
        assert len(ids) < self.room(sample)
        self._size[sample.place, sample.index] += len(ids)
        self.appended[sample.place, sample.index].append(self._tokenizer.decode(ids))
        self._ready.append((sample, sample.lines))

    def end(self, sample):
        del self._size[sample.place, sample.index]


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call><eos>"


def rolled_out(pool, tokenizer, lines, columns, *, n=2, max_turns=4, room=200, **options):
    described, several = pool.describe()
    names = columns.get("environment", [""])
    prompt_ids = lambda columns, said: [tokenizer(f"go{text}")["input_ids"] for text in said]  # noqa: E731
    environments = Environments(
        pool,
        described if several else {"": described[names[0]]},
        template_of(tokenizer, 8),
        prompt_ids,
        max_turns,
        overlap_steps=1,
    )
    prompts = Prompts([tokenizer("go")["input_ids"]] * len(columns["question"]), columns)
    engine = SimpleNamespace(session=Script(tokenizer, lines, room))
    complete = InTurns(engine, tokenizer, Reading(prompt_key="question"), environments)
    sampling = SamplingParams(n=n, stop_token_ids=(tokenizer.eos_token_id,))
    return complete, prompts, sampling, engine.session


def test_what_tools_say_is_in_the_completion_and_not_trained_on(pool, tokenizer):
    lines = {
        (0, 0): [call("add", number=1) + "", call("add", number=2), "#### 6<eos>"],
        (0, 1): ["#### 0<eos>"],
        (1, 0): [call("look"), "done<eos>"],
        (1, 1): ["<tool_call>{<eos>", call("fly"), "a..."],
    }
    columns = {"question": ["Count.", "Look."], "environment": ["counter", "other"]}
    columns["start"] = [3, 4]
    complete, prompts, sampling, session = rolled_out(pool, tokenizer, lines, columns)
    finished = []
    answers = complete(
        None, prompts, sampling, jax.random.key(0), version=7,
        on_group_done=lambda place, group: finished.append((place, group.texts)),
    )  # fmt: skip
    assert session.appended[0, 0] == ["<tool>4</tool>", "<tool>6</tool>"]
    # The row's environment is no column for reset, and its prompt is there under TRL's name.
    assert session.appended[1, 0] == ["<tool>prompt,q... (cut at 8 tokens)</tool>"]
    assert "no JSON object" not in session.appended[1, 1][0]  # it was cut
    assert session.appended[1, 1][1].startswith("<tool>{'error'...")

    first = answers.completions[0][0]
    tokens = tokenizer.convert_ids_to_tokens(first.tokens)
    untrained = [t for t, trained in zip(tokens, first.trained) if not trained]
    assert untrained == ["<tool>", "4", "</tool>", "<tool>", "6", "</tool>"]
    assert (first.log_probs[~first.trained] == 0).all()
    assert (first.log_probs < 0).sum() > 40
    assert first.turns[first.trained].max() == 2
    assert (np.diff(first.turns) >= 0).all()
    assert set(first.versions) == {7}
    assert first.finish_reason == "stop"
    assert [c.finish_reason for c in answers.completions[1]] == ["stop", "length"]

    assert answers.texts[1] == "#### 0"
    assert answers.texts[0].endswith("#### 6")
    assert "<tool>" not in answers.texts[0]
    roles = [message["role"] for message in answers.transcripts[0]]
    assert roles == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert answers.transcripts[0][1] == {"role": "tool", "name": "add", "content": "4"}
    wanted = {"name": "add", "arguments": {"number": 1}}
    assert answers.transcripts[0][0]["tool_calls"] == [{"type": "function", "function": wanted}]
    assert answers.columns[GIVEN + "Counter"] == [6.0, 3.0, None, None]
    assert [e.count for e in answers.columns["environments"][:2]] == [6, 3]
    assert tokenizer.decode(answers.prompts.token_ids[0]) == "go It stands at 3."
    assert tokenizer.decode(answers.prompts.token_ids[1]) == "go"
    assert sorted(finished) == [(0, answers.texts[:2]), (1, answers.texts[2:])]

    scores = Scores(np.array([4.0, 1.0, 2.0, 0.0]), {"f": np.ones(4)}, {})
    graded = GradedGroups(prompts, answers.completions, answers.texts, scores,
                          transcripts=answers.transcripts)  # fmt: skip
    metrics = turn_metrics(graded)
    assert metrics["rollout/turns"] == (3 + 1 + 2 + 3) / 4
    assert (metrics["tools/calls"], metrics["tools/failures"]) == (5 / 4, 2.0)
    assert (metrics["reward/of_1_turns"], metrics["reward/of_3_turns"]) == (1.0, 2.0)
    records = sample_records(columns["question"] * 2, graded)
    assert records[0]["turns"] == answers.transcripts[0]
    halves = GradedGroups.concatenate([graded.select([1]), graded.select([0])])
    assert halves.transcripts == answers.transcripts[2:] + answers.transcripts[:2]


def test_a_completion_ends_at_its_last_turn_and_where_an_answer_does_not_fit(pool, tokenizer):
    lines = {(0, 0): [call("add", number=1)] * 5, (0, 1): [call("add", number=1)] * 5}
    columns = {"question": ["Count."], "environment": ["counter"]}
    for limits, turns, reason in (({"max_turns": 3}, 2, "stop"), ({"room": 26}, 0, "length")):
        complete, prompts, sampling, _ = rolled_out(pool, tokenizer, lines, columns, **limits)
        answers = complete(None, prompts, sampling, jax.random.key(0))
        for completion in answers.completions[0]:
            assert completion.turns.max() == turns
            assert completion.finish_reason == reason
            assert completion.trained[-1]


def test_a_tool_that_hangs_is_told_to_the_model_and_its_environment_earns_nothing(pool, tokenizer):
    lines = {(0, 0): [call("hang"), call("add", number=9), "so<eos>"], (0, 1): ["no<eos>"]}
    columns = {"question": ["Count."], "environment": ["counter"], "start": [2]}
    complete, prompts, sampling, session = rolled_out(pool, tokenizer, lines, columns)
    template = dataclasses.replace(complete.environments, template=template_of(tokenizer, 99))
    complete = dataclasses.replace(complete, environments=template)
    answers = complete(None, prompts, sampling, jax.random.key(0))
    assert "took longer than 1 s" in session.appended[0, 0][0]
    assert "no longer there" in session.appended[0, 0][1]
    assert answers.columns[GIVEN + "Counter"][0] == 0.0
    assert answers.completions.stats["tool_failures"] == 2
    assert answers.columns["environments"][0].count == 2
    with pytest.raises(AttributeError, match="killed"):
        answers.columns["environments"][0].add(1)


def test_what_is_async_and_takes_too_long_is_cancelled_told_and_earns_nothing(tokenizer):
    lines = {(0, 0): [call("wait"), "so<eos>"], (0, 1): ["no<eos>"]}
    with EnvironmentPool(Spec(FILE, "Slow"), 1, timeout_s=0.2) as pool:
        found = rolled_out(pool, tokenizer, lines, {"question": ["Wait."]})
        complete, prompts, sampling, session = found
        template = dataclasses.replace(complete.environments, template=template_of(tokenizer, 99))
        complete = dataclasses.replace(complete, environments=template)
        answers = complete(None, prompts, sampling, jax.random.key(0))
    assert "took longer than 0.2 s" in session.appended[0, 0][0]
    assert answers.columns[GIVEN + "Slow"] == [0.0, 0.0]
    cancelled = Answer(None, {}, "", "cancelled", 0.2)
    assert "took longer than environment.timeout_s=0.2" in failure_text("reset", cancelled, 0.2)


REWARD = """
def counted(completions, environments, transcripts, **columns):
    assert completions == transcripts and completions[0][-1]["role"] == "assistant"
    return [0.5 * environment.count for environment in environments]
"""


def test_reward_functions_get_environments_and_transcripts_beside_the_environments_reward(
    pool, tokenizer, tmp_path
):
    (tmp_path / "rewards.py").write_text(REWARD)
    lines = {(0, 0): [call("add", number=1), "a<eos>"], (0, 1): ["b<eos>"]}
    messages = [{"role": "user", "content": "Count."}]
    columns = {"question": [messages], "environment": ["counter"], "start": [1]}
    for workers in (0, 1):
        complete, prompts, sampling, _ = rolled_out(pool, tokenizer, lines, columns)
        function = RewardFunction(str(tmp_path / "rewards.py"), "counted")
        with RewardModel([function], num_workers=workers, given=("Counter",)) as model:
            model.check_columns([*columns, "environments", "transcripts"])
            graded = generate_and_grade(
                None, None, prompts, sampling, jax.random.key(0), tokenizer, model,
                reading=complete.reading, completer=complete,
            )  # fmt: skip
        assert graded.scores.components["Counter"].tolist() == [2.0, 1.0]
        assert graded.scores.total.tolist() == [3.0, 1.5]


def test_reward_functions_read_a_lost_environment_as_it_was_when_it_last_answered(
    tokenizer, tmp_path
):
    (tmp_path / "rewards.py").write_text(
        "def counted(completions, environments, **columns):\n"
        "    return [environment.count for environment in environments]\n"
    )
    lines = {(0, 0): [call("add", number=1), call("hang"), "a<eos>"]}
    lines |= {(0, i): [call("add", number=i)] * 3 + ["b<eos>"] for i in (1, 2)}
    function = RewardFunction(str(tmp_path / "rewards.py"), "counted")
    for workers in (0, 1):
        with (
            EnvironmentPool(Spec(FILE, "Counter"), 1, timeout_s=1.0) as pool,
            RewardModel([function], num_workers=workers, given=("Counter",)) as model,
        ):
            columns = {"question": ["Count."], "start": [3]}
            complete, prompts, sampling, _ = rolled_out(pool, tokenizer, lines, columns, n=3)
            graded = generate_and_grade(
                None, None, prompts, sampling, jax.random.key(0), tokenizer, model,
                reading=complete.reading, completer=complete,
            )  # fmt: skip
        assert graded.scores.components["counted"][0] == 4
        assert (graded.scores.components["counted"] >= 4).all()
        assert graded.scores.components["Counter"].tolist() == [0.0] * 3


def test_a_reset_that_differs_within_a_group_stops_the_run(pool, tokenizer):
    from adpo_jax.rollouts.conversations import _the_same

    assert _the_same({"a"}) == "a"
    with pytest.raises(EnvironmentFailed, match="different texts for the samples of one prompt"):
        _the_same({"a", "b"})


# --- whole runs

TINY = (
    "--config.actor_rollout_ref.model.hf_config="
    "{'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 1, 'head_dim': 8}",
    "--config.data.max_response_length=32",
    "--config.data.train_batch_size=4",
    "--config.data.max_val_samples=4",
    "--config.data.train_max_samples=8",
    "--config.sft.steps=0",
    "--config.algorithm.num_generations=2",
    "--config.trainer.total_training_steps=2",
    "--config.trainer.save_freq=1",
    "--config.trainer.test_freq=0",
    "--config.trainer.val_before_train=False",
    "--config.trainer.log_samples_freq=1",
    "--config.trainer.rollout_data_dir=rollouts",
)
IN_TURNS = ("--config.environment.num_workers=1",)


def on_one_device(config):
    return setup.build(config, jax.devices()[:1])


def a_model_that_calls(monkeypatch):
    """Has every sample's first turn be a call, and its second an answer, drawn or not."""
    import adpo_jax.rollouts.conversations as module

    def calls_of(form, text, names):
        return [Call("add", {"a": 1, "b": len(text)})]

    monkeypatch.setattr(module.calls_lib, "calls_in", calls_of)


def test_a_run_in_turns_is_logged_recorded_evaluated_and_resumed_exactly(tmp_path, monkeypatch):
    a_model_that_calls(monkeypatch)
    # The model is random: every token may end a turn, so that turns are short.
    config = parse(*TINY, *IN_TURNS, name="calculator")
    stops = tuple(range(6, 200))
    build = lambda config: shortened(on_one_device(config), stops)  # noqa: E731
    adpo_jax.train(config, tmp_path / "whole", build=build)
    rows = {row["step"]: row for row in read_jsonl(tmp_path / "whole" / "metrics.jsonl")}
    assert rows[2]["rollout/turns"] > 1
    assert rows[2]["tools/calls"] > 0
    assert rows[2]["update/skipped"] == 0
    assert "eval/accuracy" in rows[2]
    check_documented({name for name in rows[2] if "/" in name}, {"turns"})
    (sample, *_) = read_jsonl(tmp_path / "whole" / "samples" / "train_000002.jsonl")
    assert {"assistant", "tool"} >= {message["role"] for message in sample["turns"]}

    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "2")
    adpo_jax.train(config, tmp_path / "whole", build=build)
    again = {row["step"]: row for row in read_jsonl(tmp_path / "whole" / "metrics.jsonl")}
    same = ("reward/mean", "rollout/turns", "tools/calls", "adpo/loss", "update/grad_norm")
    assert {name: rows[2][name] for name in same} == {name: again[2][name] for name in same}
    # A recording with other content would have taken the place of the first.
    recordings = [path.name for path in (tmp_path / "whole" / "rollouts").iterdir()]
    assert sorted(recordings) == ["000001.parquet", "000002.parquet"]

    # What was sampled in turns is trained on again from its recordings, to the bit.
    replay = tmp_path / "whole" / "rollouts"
    adpo_jax.train(config, tmp_path / "replayed", build=build, replay=replay)
    one, other = (tmp_path / r / "export" / "model.safetensors" for r in ("whole", "replayed"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("generic", "last", "called"),
    [
        ("", "<think>\n", False),
        ("<think>\n", None, False),
        ("<think>\n", "Let me add: ", True),
        ("<think>\n", "<think>\nsmall sum</think>", True),
        ("<think>\n", [{"type": "text", "text": "<think>\nsmall"}], False),
    ],
)
def test_the_prompt_decides_whether_the_first_turn_begins_in_a_thought(generic, last, called):
    tokenizer = small_chat.make_tokenizer(["<think> so </think> add"], 600)
    ending = "{% if add_generation_prompt %}" + generic + "{% endif %}"
    tokenizer.chat_template = small_chat.TEMPLATE + ending
    ends = (tokenizer.eos_token_id,)
    environments = SimpleNamespace(
        pool=None, template=TurnTemplate(tokenizer, {}, [ADD], list(ends), 100)
    )
    conversations = Conversations(tokenizer, Reading("prompt", False, ends), environments)
    prompt = [{"role": "user", "content": "1 + 2?"}]
    prompt += [{"role": "assistant", "content": last}] if last else []
    said = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    tokens = np.array([*tokenizer(said)["input_ids"], *ends], np.int32)
    completion = Completion.sampled(tokens, np.zeros(len(tokens)), "stop")
    conversation = Conversation(
        contract.Described("X", [ADD], False, ()),
        dataclasses.replace(FlyingSample.of(completion), told=Told()),
        begun_thought=conversations.begun_thought({"prompt": prompt}),
    )
    assert bool(conversations._read(conversation, 0)) == called


def test_rewards_of_an_environment_are_normalised_beside_those_of_functions(tmp_path):
    penalty = {"name": "length_penalty", "weight": 0.5}
    penalty["kwargs"] = {"max_length": 20, "buffer_length": 10}
    config = parse(
        *TINY,
        "--config.sft.steps=0",
        "--config.algorithm.adv_estimator=grpo",
        "--config.algorithm.multi_objective_aggregation=normalize_then_sum",
        "--config.custom_reward_function.name=good_accuracy",
        f"--config.reward_functions=({penalty},)",
        "--config.data.max_response_length=24",
        "--config.environment.max_turns=2",
        "--config.trainer.total_training_steps=1",
        "--config.trainer.test_freq=-1",
        name="guess_number",
    )
    adpo_jax.train(config, tmp_path, build=on_one_device)
    (*_, row) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["step"] == 1
    assert np.isfinite(row["grpo/loss"])


def shortened(parts, stops):
    """The parts of a run, whose turns many tokens end."""
    ends = {"stop_token_ids": stops}
    sampling = dataclasses.replace(parts.eval_settings.sampling, **ends)
    return dataclasses.replace(
        parts,
        sampling=dataclasses.replace(parts.sampling, **ends),
        eval_settings=dataclasses.replace(parts.eval_settings, sampling=sampling),
    )


REFUSED = {
    "--config.environment.name=Nobody": "environment.name: .* defines no 'Nobody'",
    "--config.environment.name=NeedsMore": "reset of NeedsMore needs 'secret', which is no column",
    "--config.environment.name=BrokenReset": "its reset failed: no such world",
    "--config.environment.name=": "names a file and nothing in it",
    "--config.data.apply_chat_template=False": "environment.path needs data.apply_chat_template",
}


def test_what_cannot_work_is_refused_before_anything_is_sampled(tokenizer):
    base = (f"--config.environment.path={FILE}", *IN_TURNS)
    prompts = {"data.train_files": Prompts([[1]], {"question": ["x"], "answer": ["y"]})}
    for override, why in REFUSED.items():
        with pytest.raises(ValueError, match=why):
            checked(parse(*base, override, name="calculator"), tokenizer, prompts)
    for key in ("name=Counter", "tools=('shout',)", "max_turns=3", "num_workers=2"):
        with pytest.raises(ValueError, match="has no effect without environment.path"):
            parse(f"--config.environment.{key}")


def checked(config, tokenizer, prompts):
    with make_environments(config, tokenizer, [tokenizer.eos_token_id]) as environments:
        check_environments(config, environments, prompts)


def test_a_prompt_shows_the_tools_of_its_rows_environment(tokenizer):
    columns = {"q": ["x", "y"], "environment": ["one", "two"]}
    tools = {name: [{"type": "function", "function": {"name": name}}] for name in ("one", "two")}
    options = {"prompt_key": "q", "max_prompt_length": 99, "tools": tools}
    found = render_prompts(Dataset(columns), tokenizer, observations=[None, " z"], **options)
    assert tokenizer.batch_decode(found.token_ids) == ["[one]\nx\n", "[two]\ny z\n"]
    for wrong, why in (
        (Dataset({"q": ["x"]}), "no column 'environment'"),
        (Dataset({"q": ["x"], "environment": ["three"]}), "row 1 has the environment 'three'"),
    ):
        with pytest.raises(ValueError, match=why):
            render_prompts(wrong, tokenizer, **options)
