"""Folders of models that somebody made to do harm, or that a disk damaged.

Each is refused in one sentence, within seconds, without a traceback and without allocating what it
asks for.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adpo_jax import pretrained
from adpo_jax.config import default_config
from adpo_jax.data import arithmetic
from adpo_jax.policy import Policy, adapters
from adpo_jax.run import loading, setup

ROOT = Path(__file__).resolve().parents[1]
SMALL = arithmetic.MODEL_CONFIG | {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed") / "good"
    policy, params = Policy.from_config(SMALL, jax.random.key(9))
    policy.save_pretrained(folder, params, arithmetic.make_tokenizer())
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "model"))


def read(folder: Path) -> None:
    """All that a run reads of a model's folder before it begins."""
    config = default_config()
    config.actor_rollout_ref.model.path = str(folder)
    source = loading.find_model(config)
    loading.make_policy(config, source, None)
    loading.initial_params(config, source, None)


def test_the_folder_that_the_others_are_made_from_is_good(folder):
    read(folder)


# --- how a folder is spoilt; each takes the folder


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def keys(name, **changes):
    def spoil(folder):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))

    return spoil


def config(**changes):
    return keys("config.json", **changes)


def header(content, data=b"\0" * 64):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return text(WEIGHTS, struct.pack("<Q", len(raw)) + raw + data)


def tensor(**changes):
    return header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


def pipe(name):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def link(name, target):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def index(weight_map):
    def spoil(folder):
        (folder / WEIGHTS).unlink()
        keys(f"{WEIGHTS}.index.json", weight_map=weight_map)(folder)

    return spoil


def sparse(name, size):
    def spoil(folder):
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return spoil


def sparse_tensors(folder):
    """A model of a petabyte, in a file that takes no room on the disk."""
    V, D = 1 << 24, 1 << 20
    config(vocab_size=V, hidden_size=D, tie_word_embeddings=True)(folder)
    entry = {"dtype": "F32", "shape": [V, D], "data_offsets": [0, 4 * V * D]}
    header({"model.embed_tokens.weight": entry})(folder)


def tensors(change):
    def spoil(folder):
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


DEEP = b"[" * 200_000
NESTED = b'{"a":' * 300 + b"1" + b"}" * 300
SPOILT = {
    "config that is empty": text("config.json", b""),
    "config that is a list": text("config.json", b"[]"),
    "config that is deep": text("config.json", DEEP),
    "config with objects within objects": text("config.json", NESTED),
    "config of bytes": text("config.json", b"\xff\xfe\x00"),
    "config with a number of 10,000 digits": text("config.json", b'{"a": ' + b"9" * 10_000 + b"}"),
    "config that is a pipe": pipe("config.json"),
    "config that is a device": link("config.json", "/dev/zero"),
    "config that is a folder": lambda f: (
        (f / "config.json").unlink(),
        (f / "config.json").mkdir(),
    ),
    "config that links to itself": link("config.json", "config.json"),
    "config that links to nothing": link("config.json", "nothing"),
    "config of a terabyte": sparse("config.json", 1 << 40),
    "model_type of a list": config(model_type=["qwen3"]),
    "model_type of an object": config(model_type={"a": 1}),
    "architectures of a number": config(architectures=3),
    "architectures of an object": config(architectures={"a": 1}),
    "text_config of a list": config(model_type="gemma3", text_config=[1], architectures=None),
    "a key without a name": config(**{"": 1}),
    "a key with a long value": config(surplus="x" * 10**6),
    "layers beyond any machine": config(num_hidden_layers=10**12),
    "a vocabulary beyond any machine": config(vocab_size=10**15),
    "a width beyond any machine": config(hidden_size=10**18),
    "an mlp beyond any machine": config(intermediate_size=1 << 70),
    "heads beyond any machine": config(num_attention_heads=10**9, num_key_value_heads=10**9),
    "head_dim beyond any machine": config(head_dim=10**12),
    "sizes that multiply beyond any machine": config(
        hidden_size=1 << 20, intermediate_size=1 << 22, num_hidden_layers=10_000
    ),
    "a window beyond any machine": config(
        use_sliding_window=True, sliding_window=10**20, max_window_layers=0
    ),
    "a size of 0": config(hidden_size=0),
    "a size below 0": config(num_hidden_layers=-1),
    "a size of a list": config(hidden_size=[16]),
    "a size that is true": config(num_hidden_layers=True),
    "a size that is a fraction": config(vocab_size=1.5),
    "key and value heads of 0": config(num_key_value_heads=0),
    "rope_theta of null": config(rope_theta=None),
    "rope_theta of text": config(rope_theta="10000"),
    "rope_theta of 0": config(rope_theta=0),
    "rope_theta that is no number": text(
        "config.json", b'{"model_type": "qwen3", "rope_theta": NaN}'
    ),
    "rope_scaling of a list": config(rope_scaling=[1]),
    "rope_scaling with a type of a list": config(rope_scaling={"rope_type": [1]}),
    "rope_scaling with a factor of text": config(rope_scaling={"type": "linear", "factor": "2"}),
    "rope_scaling with a factor of 0": config(rope_scaling={"type": "yarn", "factor": 0}),
    "rms_norm_eps of null": config(rms_norm_eps=None),
    "rms_norm_eps of text": config(rms_norm_eps="small"),
    "initializer_range of a list": config(initializer_range=[0.02]),
    "tie_word_embeddings of text": config(tie_word_embeddings="no"),
    "attention_bias of a list": config(attention_bias=[1]),
    "hidden_act of a list": config(hidden_act=["silu"]),
    "hidden_act of null": config(hidden_act=None),
    "layer_types of a number": config(layer_types=5),
    "layer_types of numbers": config(layer_types=[1]),
    "layer_types of lists": config(layer_types=[["full_attention"]]),
    "max_position_embeddings of text": config(max_position_embeddings="long"),
    "max_window_layers of text": config(
        use_sliding_window=True, sliding_window=4, max_window_layers="all"
    ),
    "eos of text": keys("generation_config.json", eos_token_id="</s>"),
    "eos of an object": keys("generation_config.json", eos_token_id={"a": 1}),
    "eos of nested lists": keys("generation_config.json", eos_token_id=[[1], 2]),
    "eos that is true": keys("generation_config.json", eos_token_id=True),
    "eos below 0": keys("generation_config.json", eos_token_id=-1),
    "eos beyond the vocabulary": keys("generation_config.json", eos_token_id=10**6),
    "eos beyond any number": keys("generation_config.json", eos_token_id=10**30),
    "generation config that is deep": text("generation_config.json", DEEP),
    "generation config that is a pipe": pipe("generation_config.json"),
    "weights that are empty": text(WEIGHTS, b""),
    "weights that are a pipe": pipe(WEIGHTS),
    "weights that are a device": link(WEIGHTS, "/dev/zero"),
    "weights that link to themselves": link(WEIGHTS, WEIGHTS),
    "a header of an exabyte": text(WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}"),
    "a header of a gigabyte": lambda f: (
        (f / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 30) + b"{}"),
        sparse(WEIGHTS, 2 << 30)(f),
    ),
    "a header that is deep": header(DEEP),
    "a header of a list": header([1]),
    "a header of bytes": header(b"\xff" * 8),
    "a tensor that is a list": header({"w": [1]}),
    "a dtype of a list": tensor(dtype=["F32"]),
    "a dtype of a number": tensor(dtype=4),
    "a shape of text": tensor(shape="22"),
    "a shape of text inside": tensor(shape=["2"]),
    "a shape below 0": tensor(shape=[-2, -1]),
    "a shape beyond any number": tensor(shape=[1 << 200]),
    "a shape of a number": tensor(shape=2),
    "a shape with a fraction": tensor(shape=[2.0]),
    "a shape of 100,000 dimensions": tensor(shape=[1] * 100_000),
    "offsets of fractions": tensor(data_offsets=[0.0, 8.0]),
    "offsets that are true": tensor(data_offsets=[False, True]),
    "three offsets": tensor(data_offsets=[0, 4, 8]),
    "offsets of null": tensor(data_offsets=None),
    "offsets beyond any number": tensor(data_offsets=[1 << 70, 1 << 71]),
    "offsets that overlap": header(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
    ),
    "a model of a petabyte in a sparse file": sparse_tensors,
    "a tensor of NaN": tensors(lambda t: t.update({k: v * np.nan for k, v in t.items()})),
    "a tensor with escapes in its name": tensors(
        lambda t: t.update({"\x1b[2J": np.zeros(2, np.float32)})
    ),
    "weight_map to nothing": index({"w": ""}),
    "weight_map to the folder itself": index({"w": "."}),
    "weight_map to a number": index({"w": 3}),
    "weight_map to null": index({"w": None}),
    "weight_map with a NUL": index({"w": "a\0b"}),
    "weight_map with a long name": index({"w": "x" * 5000}),
    "weight_map with half a character": index({"w": "\ud800"}),
    "weight_map of a list": index(["w"]),
    "weight_map to a folder": lambda f: (index({"w": "sub"})(f), (f / "sub").mkdir()),
    "an index that is deep": lambda f: (
        (f / WEIGHTS).unlink(),
        text(f"{WEIGHTS}.index.json", DEEP)(f),
    ),
    "a tokenizer that is a pipe": pipe("tokenizer.json"),
    "a tokenizer that is a device": link("tokenizer.json", "/dev/zero"),
    "a tokenizer that links to itself": link("tokenizer.json", "tokenizer.json"),
    "a tokenizer of a terabyte": sparse("tokenizer.json", 1 << 40),
    "a tokenizer that is deep": text("tokenizer.json", DEEP),
    "a tokenizer of a list": text("tokenizer.json", b"[]"),
    "a tokenizer of a number": text("tokenizer.json", b"1"),
    "a tokenizer without a model": keys("tokenizer.json", model=None),
    "a vocabulary of a pipe": pipe("vocab.json"),
    "a tokenizer config that is deep": text("tokenizer_config.json", DEEP),
    "a tokenizer config that is a list": text("tokenizer_config.json", b"[]"),
    "a tokenizer class of a list": keys("tokenizer_config.json", tokenizer_class=[1]),
    "an end of a list": keys("tokenizer_config.json", eos_token=[1]),
    "an end of an object": keys("tokenizer_config.json", eos_token={"a": 1}),
    "a chat template that is a pipe": pipe("chat_template.jinja"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_malformed_folder_is_refused_in_one_sentence(case, folder):
    SPOILT[case](folder)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"\w") as refusal:
            read(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20
    message = str(refusal.value)
    assert type(refusal.value) in (ValueError, json.JSONDecodeError)
    assert len(message) < 1500, message[:300]


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 5000, "~nobody-of-this-name/model", "loop", "./nothing"]
)
def test_a_name_that_no_folder_has_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"there is no folder|is a link"):
        read(name)


@pytest.mark.parametrize(
    "changes",
    [{"r": "8"}, {"r": 10**9}, {"r": True}, {"lora_alpha": None}, {"lora_alpha": [1]}],
    ids=str,
)
def test_an_adapter_of_a_wrong_size_is_refused_before_anything_is_made(changes, tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.zeros((2, 16), np.float32)}, tmp_path / adapters.WEIGHTS)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | changes
    (tmp_path / adapters.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"adapter_config.json: (r|lora_alpha) is a"):
        adapters.find(tmp_path)


def test_the_command_line_says_it_in_one_line_and_exits_with_2(folder):
    """A pipe, and a template that never ends, in a process that must end by itself."""
    (folder / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    pipe("config.json")(folder)
    command = [sys.executable, "-m", "adpo_jax.main", f"--config={ROOT / 'configs/arithmetic.py'}"]
    command += [f"--config.actor_rollout_ref.model.path={folder}", f"--workdir={folder / 'run'}"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 2, result.stderr
    assert "config.json is no regular file" in result.stderr
    assert "Traceback" not in result.stderr


NESTED = {"a list": "[" * 200_000, "an object": '{"a":' * 100_000}


@pytest.mark.parametrize("how", ["a pipe", "an endless device", *NESTED])
def test_whoever_loads_a_model_is_told_of_its_config_in_one_sentence(how, folder):
    config = folder / "config.json"
    config.unlink()
    if how == "a pipe":
        os.mkfifo(config)
    elif how == "an endless device":
        config.symlink_to("/dev/zero")
    else:
        config.write_text(NESTED[how])
    with pytest.raises(ValueError, match=r"config\.json (is no regular file|has more than 64)"):
        pretrained.load(folder)


# --- folders that are good and were refused, or read in part


def source_of(folder: Path, **model):
    c = default_config()
    c.actor_rollout_ref.model.path = str(folder)
    with c.unlocked(), c.ignore_type():
        c.actor_rollout_ref.model.update(model)
    return c, loading.find_model(c)


def test_keys_that_no_forward_reads_are_passed_over(folder):
    """SmolLM2's published config has the first two, others have the rest."""
    config(
        is_llama_config=True,
        model_max_length=8192,
        attn_implementation="sdpa",
        output_attentions=True,
        num_labels=3,
        problem_type="regression",
        decoder_start_token_id=1,
    )(folder)
    read(folder)


def test_a_key_that_is_not_known_is_passed_over_by_an_override(folder):
    config(use_qk_clip=True, rms_norm_eps=None)(folder)
    with pytest.raises(
        ValueError, match=r"use_qk_clip = True.*override_config.*'use_qk_clip': None"
    ):
        read(folder)
    override = {"use_qk_clip": None, "rms_norm_eps": 1e-5}
    c, source = source_of(folder, override_config=override)
    policy = loading.make_policy(c, source, None)
    loading.initial_params(c, source, None)
    assert policy.config.norm_eps == 1e-5
    assert "use_qk_clip" not in policy.hf_config
    found, _ = Policy.from_pretrained(folder, override_config=override)
    assert found.config == policy.config


@pytest.mark.parametrize("option", ["override_config", "hf_config"])
def test_the_config_overrides_the_language_model_beside_a_vision_tower(option, folder):
    path = folder / "config.json"
    inner = json.loads(path.read_text()) | {"model_type": "mistral", "sliding_window": 8}
    architectures = ["Mistral3ForConditionalGeneration"]
    outer = {"model_type": "mistral3", "architectures": architectures, "text_config": inner}
    path.write_text(json.dumps(outer))
    override = {"rms_norm_eps": 1e-3, "sliding_window": None}
    c, source = source_of(folder, random_init=option == "hf_config", **{option: override})
    for found in (source, loading.find_architecture(c)):
        text = found.hf_config["text_config"]
        assert text["rms_norm_eps"] == 1e-3
        # A null of hf_config is a value, which turns the window off.
        assert text.get("sliding_window", "left out") == (
            None if option == "hf_config" else "left out"
        )
        assert loading.make_policy(c, found, None).config.norm_eps == 1e-3


@pytest.mark.parametrize(
    ("generation", "inner", "wanted"),
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 9}, {5, 7}),
        (None, {"eos_token_id": [9, 11]}, {9, 11}),
        ({"top_k": 3}, {"eos_token_id": 9}, {9}),
        (None, {}, set()),
    ],
)
def test_every_end_that_a_folder_names_stops_a_completion(generation, inner, wanted, folder):
    (folder / "generation_config.json").unlink()
    if generation is not None:
        keys("generation_config.json", **generation)(folder)
    config(**{"eos_token_id": None} | inner)(folder)
    _, source = source_of(folder)
    assert set(source.stop_token_ids) == wanted | {source.tokenizer.eos_token_id}


def test_an_added_token_beyond_the_embeddings_is_refused_where_a_prompt_has_it(folder):
    """As `<image_soft_token>` of Gemma 3, whose text models embed one token less."""
    _, source = source_of(folder)
    source.tokenizer.add_tokens(["<image>"] * 1)
    number = source.tokenizer.convert_tokens_to_ids("<image>")
    c = default_config()
    source.hf_config["vocab_size"] = number
    policy = loading.make_policy(c, source, None)
    prompts = source.tokenizer(["one", "an <image>"])["input_ids"]
    loading.check_embedded(policy, prompts[:1], "prompt")
    with pytest.raises(ValueError, match=f"prompt 2 has token {number}, and the model embeds"):
        loading.check_embedded(policy, prompts, "prompt")
    rows = [{"question": "one", "completion": text} for text in ("two", "an <image>")]
    demonstrations = folder / "shown.jsonl"
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c.data.prompt_key, c.sft.train_files, c.sft.steps = "question", str(demonstrations), 2
    c.data.apply_chat_template = False
    learner = types.SimpleNamespace(policy=policy)
    with pytest.raises(ValueError, match="sft.train_files: completion 2 has token"):
        setup.make_cold_start(c, source, learner)


def test_frozen_weights_that_are_narrower_than_their_folder_are_told_of(folder, caplog):
    c, source = source_of(folder, lora_rank=2)
    c.trainer.bf16 = True
    loading.initial_params(c, source, None)
    assert "the adapters are trained beside the rounded weights" in caplog.text
    caplog.clear()
    c.trainer.bf16 = False
    loading.initial_params(c, source, None)
    assert not caplog.text


@pytest.mark.parametrize(
    ("positions", "rope", "told"),
    [
        (40, None, False),
        (39, None, True),
        (20, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}, False),
        (20, {"rope_type": "yarn", "factor": 3.9, "original_max_position_embeddings": 10}, True),
    ],
)
def test_sequences_that_may_exceed_the_positions_of_the_model_are_told_of(
    folder, caplog, positions, rope, told
):
    c, source = source_of(folder)
    c.data.max_prompt_length, c.data.max_response_length, c.eval.max_tokens = 10, 20, 30
    source.hf_config["max_position_embeddings"] = positions
    source.hf_config["rope_scaling"] = rope
    loading.make_policy(c, source, None)
    words = "may have 40 tokens together, and the model is made for 39 positions"
    assert (words in caplog.text) == bool(caplog.text) == told
