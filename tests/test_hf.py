"""Hugging Face folders: round trips, sharding, and what is refused."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from golden_models import FAMILIES, GOLDEN, config_of, drawn_model, model
from safetensors.numpy import load_file, save_file

from adpo_jax import Policy
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.hf import safetensors_files, weights


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: array for path in files for name, array in load_file(path).items()}


def edited(name: str, folder: Path, tensors=None, **config) -> Path:
    """A copy of a golden model with other tensors or settings."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config_of(name), **config}))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def assert_trees_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- round trips


@pytest.mark.parametrize("name", FAMILIES)
def test_load_save_load_is_bit_identical(name, tmp_path):
    policy, params = model(name)
    policy.save_pretrained(tmp_path / "out", params, dtype="bfloat16")
    original, written = load_file(GOLDEN / name / "model.safetensors"), tensors_of(tmp_path / "out")
    assert written.keys() == original.keys()
    for key, array in original.items():
        if key.endswith("e_score_correction_bias"):  # float32, whatever the others are
            array = array.astype(np.float32)
        assert written[key].dtype == array.dtype
        assert written[key].tobytes() == array.tobytes(), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == config_of(name) | {"torch_dtype": "bfloat16"}


def test_shards_a_mesh_and_another_mesh_change_no_bit(tmp_path):
    policy, params = Policy.from_pretrained(GOLDEN / "llama", mesh=make_mesh(2, 2, 2))
    policy.save_pretrained(tmp_path / "out", params, max_shard_size=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * sum(p.size for p in jax.tree.leaves(params))
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(path)
        assert sum(array.nbytes for array in tensors.values()) <= 10_000
        assert {index["weight_map"][name] for name in tensors} == {path.name}
    _, loaded = Policy.from_pretrained(tmp_path / "out", mesh=make_mesh(1, 4, 2))
    assert_trees_equal(loaded, model("llama")[1])


def test_the_dtype_on_disk_is_that_of_the_parameters_or_as_asked(tmp_path):
    policy, params = model("qwen2")
    for dtype, folder in ((None, "float32"), ("float16", "float16")):
        policy.save_pretrained(tmp_path / folder, params, dtype=dtype)
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == folder
        assert {a.dtype for a in tensors_of(tmp_path / folder).values()} == {np.dtype(folder)}


def test_a_model_made_here_is_saved_and_read_back(tmp_path):
    config = {k: v for k, v in config_of("gemma2").items() if k not in ("architectures", "dtype")}
    own_code = {"auto_map": {"AutoConfig": "configuration_mine.Mine"}, "torch_dtype": "bfloat16"}
    policy = Policy.abstract_from_config({**config, **own_code})
    params = model("gemma2")[1]
    policy.save_pretrained(tmp_path / "out", params)
    loaded_policy, loaded = Policy.from_pretrained(str(tmp_path / "out"))
    assert loaded_policy.config == policy.config
    assert_trees_equal(loaded, params)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["Gemma2ForCausalLM"]
    assert "auto_map" not in written  # whose files are not there
    assert written["dtype"] == written["torch_dtype"] == "float32"  # for transformers 5 and 4
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.items() <= generation.items()


def test_the_generation_config_and_the_tokenizer_travel_along(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    source = edited("qwen2", tmp_path / "in")
    (source / "generation_config.json").write_text('{"top_k": 7}')
    policy, params = Policy.from_pretrained(source)
    policy.save_pretrained(tmp_path / "out", params, Tokenizer())
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"top_k": 7}
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_tokenizer_that_its_files_would_not_make_beside_the_export_is_written_anew(tmp_path):
    """The files of Qwen3.5 name Qwen2's, which transformers mends for its whole models alone."""
    qwen = pytest.importorskip(
        "transformers.models.qwen3_5.tokenization_qwen3_5",
        reason="this transformers has no Qwen3.5",
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.Regex(qwen.PRETOKENIZE_REGEX)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(split, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator(
        ["हिन्दी में गणित के प्रश्न हल करो"] * 9,
        tokenizers.trainers.BpeTrainer(
            special_tokens=["<|endoftext|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    source = tmp_path / "in"
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "qwen3_5", "text_config": config_of("qwen3_5_text")}
    (source / "config.json").write_text(json.dumps(config))
    read = transformers.AutoTokenizer.from_pretrained(source)
    policy, params = drawn_model("qwen3_5_text")
    policy.save_pretrained(tmp_path / "out", params, read)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    question = "गणित में"
    assert again(question)["input_ids"] == read(question)["input_ids"]


@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5"])
def test_a_gemma3_with_vision_gives_its_language_model(layout, tmp_path):
    def outer_name(name):
        if layout == "transformers 4":
            return "language_model." + name
        return name.replace("model.", "model.language_model.", 1)

    inner = config_of("gemma3_text")
    tensors = {outer_name(k): v for k, v in tensors_of(GOLDEN / "gemma3_text").items()}
    vision = "" if layout == "transformers 4" else "model."
    tensors[vision + "vision_tower.vision_model.embeddings.weight"] = np.ones(3, np.float32)
    tensors[vision + "multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(3, np.float32)
    tmp_path.joinpath("config.json").write_text(
        json.dumps(
            {
                "model_type": "gemma3",
                "architectures": ["Gemma3ForConditionalGeneration"],
                "eos_token_id": [1, 106],
                "text_config": {k: v for k, v in inner.items() if k != "architectures"},
                "vision_config": {"hidden_size": 3},
            }
        )
    )
    save_file(tensors, tmp_path / "model.safetensors")
    policy, params = Policy.from_pretrained(tmp_path)
    expected_policy, expected = model("gemma3_text")
    assert policy.config == expected_policy.config
    assert_trees_equal(params, expected)
    assert policy.hf_config["model_type"] == "gemma3_text"
    assert policy.hf_config["architectures"] == ["Gemma3ForCausalLM"]
    assert policy.hf_config["eos_token_id"] == [1, 106]


def test_loading_holds_no_whole_model_on_the_host(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 16, "head_dim": 64}
    config = {**config_of("qwen3"), **sizes, "layer_types": None}
    policy = Policy.abstract_from_config(config)
    params = jax.tree.map(lambda s: jnp.ones(s.shape), policy.abstract_params())
    policy.save_pretrained(tmp_path / "out", params)
    sizes = [p.nbytes for p in jax.tree.leaves(params)]
    Policy.from_pretrained(tmp_path / "out")
    tracemalloc.start()
    try:
        Policy.from_pretrained(tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) > 5 * max(sizes)
    # Twice the largest, since the device may give a buffer back while the next is filled.
    assert max(sizes) < peak < 2.5 * max(sizes)


def test_only_the_slices_of_the_mesh_are_copied(monkeypatch):
    copied = []
    empty = np.empty

    def counting(shape, *args, **kwargs):
        copied.append(tuple(np.atleast_1d(shape).tolist()))
        return empty(shape, *args, **kwargs)

    monkeypatch.setattr(weights.np, "empty", counting)
    Policy.from_pretrained(GOLDEN / "llama", mesh=make_mesh(1, 2, 4))
    # gate on disk: [3 layers, F 24 over 4, D 16 over 2].
    assert (3, 24 // 4, 16 // 2) in copied
    assert (3, 24, 16) not in copied


# --- what is in the weights must be what the config asks for


def test_missing_unexpected_and_misshapen_tensors_are_named_together(tmp_path):
    tensors = tensors_of(GOLDEN / "qwen2")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].copy()
    with pytest.raises(ValueError) as error:
        Policy.from_pretrained(edited("qwen2", tmp_path, tensors))
    assert str(error.value) == (
        "the weights do not fit config.json; "
        "missing tensors: model.layers.1.mlp.up_proj.weight; "
        "unexpected tensors: model.layers.0.self_attn.q_norm.weight; "
        "tensors of a wrong shape: lm_head.weight (wanted [64, 16], got [64, 15])"
    )


def test_where_the_head_alone_is_missing_the_error_says_how_to_tie_it(tmp_path):
    tensors = tensors_of(GOLDEN / "qwen2")
    del tensors["lm_head.weight"]
    message = r"missing tensors: lm_head.weight; if .*, set tie_word_embeddings to true$"
    with pytest.raises(ValueError, match=message):
        Policy.from_pretrained(edited("qwen2", tmp_path, tensors))


def test_a_long_list_of_tensors_is_cut(tmp_path):
    shorter = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    with pytest.raises(ValueError, match=r"unexpected tensors: model.layers.1.* and 16 more$"):
        Policy.from_pretrained(edited("qwen2", tmp_path, **shorter))


def test_harmless_tensors_are_left_out(tmp_path):
    tensors = tensors_of(GOLDEN / "qwen3")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    _, params = Policy.from_pretrained(edited("qwen3", tmp_path, tensors))
    assert_trees_equal(params, model("qwen3")[1])


def test_a_tied_head_that_differs_from_the_embeddings_is_refused(tmp_path):
    tensors = tensors_of(GOLDEN / "qwen3")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    with pytest.raises(ValueError, match=r"differs from .*set tie_word_embeddings to false"):
        Policy.from_pretrained(edited("qwen3", tmp_path, tensors))


def test_weights_with_nan_are_refused_by_name(tmp_path):
    tensors = tensors_of(GOLDEN / "qwen2")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan
    tensors["model.norm.weight"][0] = np.inf
    folder = edited("qwen2", tmp_path, tensors)
    for mesh in (None, make_mesh(2, 2, 2)):
        with pytest.raises(ValueError) as error:
            Policy.from_pretrained(folder, mesh=mesh)
        assert str(error.value) == (
            "weights with NaN or infinity: model.norm.weight, model.layers.2.mlp.up_proj.weight"
        )


def test_mixed_dtypes_are_read(tmp_path):
    tensors = tensors_of(GOLDEN / "qwen2")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    _, params = Policy.from_pretrained(edited("qwen2", tmp_path, tensors))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), params, model("qwen2")[1]
    )


def test_quantised_tensors_are_refused(tmp_path):
    tensors = tensors_of(GOLDEN / "qwen2")
    tensors["model.norm.weight"] = np.ones(16, np.int8)
    with pytest.raises(ValueError, match=r"norm.weight in .* has dtype I8; supported: F32, F16"):
        Policy.from_pretrained(edited("qwen2", tmp_path, tensors))


# --- broken folders


def with_index(tmp_path: Path, *, second: str = "model-00002-of-00002.safetensors") -> Path:
    folder = edited("qwen2", tmp_path / "sharded")
    tensors = sorted(tensors_of(folder).items())
    (folder / "model.safetensors").unlink()
    first = "model-00001-of-00002.safetensors"
    save_file(dict(tensors[:9]), folder / first)
    save_file(dict(tensors[9:]), folder / "model-00002-of-00002.safetensors")
    weight_map = {name: first if i < 9 else second for i, (name, _) in enumerate(tensors)}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_an_index_is_followed(tmp_path):
    _, params = Policy.from_pretrained(with_index(tmp_path))
    assert_trees_equal(params, model("qwen2")[1])


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_may_not_leave_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match="names files outside its folder"):
        Policy.from_pretrained(with_index(tmp_path, second=name))


def test_an_index_to_missing_or_repeated_tensors_is_refused(tmp_path):
    folder = with_index(tmp_path)
    shutil.copy(
        folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(ValueError, match=r"is both in .*00001-of.* and in .*00002-of"):
        Policy.from_pretrained(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"files that are missing: \['model-00002"):
        Policy.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json has no weight_map"):
        Policy.from_pretrained(folder)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (slice(0, 4), "is no safetensors file, or is cut short .4 bytes"),
        (slice(0, 100), "is no safetensors file, or is cut short"),
        (slice(0, -1), r"is cut short: \d+ bytes of \d+; download it again"),
    ],
)
def test_a_truncated_file_is_named(keep, message, tmp_path):
    folder = edited("qwen2", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[keep])
    with pytest.raises(ValueError, match=f"model.safetensors {message}"):
        Policy.from_pretrained(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"w": {"dtype": "F32", "shape": [1]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": ["a", 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    ],
)
def test_a_broken_header_is_refused(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match=r"model.safetensors has no valid safetensors header"):
        safetensors_files.read_header(path)


def test_a_header_that_contradicts_itself_is_refused(tmp_path):
    header = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match="shape and extent disagree"):
        safetensors_files.Checkpoint([path]).array("w")


def test_pickles_are_refused_with_the_cure(tmp_path):
    folder = edited("qwen2", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights .pytorch_model.bin.*writes safetensors"):
        Policy.from_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        Policy.from_pretrained(folder)


def test_a_missing_or_broken_config_is_named(tmp_path):
    folder = edited("qwen2", tmp_path)
    (folder / "config.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"config.json is no valid JSON"):
        Policy.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds no JSON object"):
        Policy.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json; is it a Hugging Face model"):
        Policy.from_pretrained(folder)


# --- names


def test_a_hub_name_is_downloaded_without_pickles(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(GOLDEN / "qwen2")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    Policy.from_pretrained("someone/a-model")
    assert asked["name"] == "someone/a-model"
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    files += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"]
    files += ["additional_chat_templates/tool_use.jinja"]
    files += ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"]
    kept = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["patterns"])
    assert list(kept) == files[:-3]


def test_names_that_are_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*/nowhere"):
        Policy.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no folder 'someone/nothing', and the Hugging Face hub"):
        Policy.from_pretrained("someone/nothing")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        Policy.from_pretrained(GOLDEN / "qwen2" / "config.json")


# --- saving whole or not at all


def test_a_folder_with_content_is_not_overwritten_unless_asked(tmp_path):
    policy, params = model("qwen2")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty; give another folder, or overwrite=True"):
        policy.save_pretrained(tmp_path, params)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match=r"mine.txt is a file"):
        policy.save_pretrained(tmp_path / "mine.txt", params)

    policy.save_pretrained(tmp_path / "out", params)
    (tmp_path / "out" / "old.txt").write_text("x")
    policy.save_pretrained(tmp_path / "out", params, overwrite=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "out"]
    (tmp_path / "empty").mkdir()
    policy.save_pretrained(tmp_path / "empty", params)
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_failed_save_leaves_nothing_new_and_the_old_in_place(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise RuntimeError("disk full")

    policy, params = model("qwen2")
    policy.save_pretrained(tmp_path / "out", params)
    before = tensors_of(tmp_path / "out")
    with pytest.raises(RuntimeError, match="disk full"):
        policy.save_pretrained(tmp_path / "out", params, Tokenizer(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tensors_of(tmp_path / "out").keys() == before.keys()
    with pytest.raises(RuntimeError, match="disk full"):
        policy.save_pretrained(tmp_path / "new", params, Tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    policy, params = model("qwen2")
    policy.save_pretrained(tmp_path / "out", params)
    (tmp_path / "out" / "old.txt").write_text("x")
    stale = tmp_path / f".out.writing-{os.getpid()}"
    stale.mkdir()
    rename = Path.rename

    def failing(self, target):
        if self == stale:
            raise OSError("no permission")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no permission"):
        policy.save_pretrained(tmp_path / "out", params, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "old.txt").exists()


def test_foreign_parameters_and_a_policy_without_a_config_are_refused(tmp_path):
    policy, params = model("qwen2")
    with pytest.raises(ValueError, match="other names or shapes"):
        policy.save_pretrained(tmp_path / "out", model("qwen3")[1])
    with pytest.raises(ValueError, match="has no hf_config"):
        Policy(policy.config).save_pretrained(tmp_path / "out", params)
    assert not list(tmp_path.iterdir())


def test_saving_over_the_folder_just_loaded_keeps_the_parameters(tmp_path):
    folder = edited("qwen2", tmp_path / "in")
    policy, params = Policy.from_pretrained(folder)
    doubled = jax.tree.map(lambda x: jnp.asarray(x) * 2, params)
    policy.save_pretrained(folder, doubled, overwrite=True)
    assert_trees_equal(params, model("qwen2")[1])
    assert_trees_equal(Policy.from_pretrained(folder)[1], doubled)
