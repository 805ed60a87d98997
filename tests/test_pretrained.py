"""One name for a model: a Hugging Face folder, a run, a checkpoint; and what is made of it."""

import errno
import functools
import json
import os
import re
import resource
import shutil
from pathlib import Path

import huggingface_hub.errors
import jax
import numpy as np
import pytest
from parsing import parse
from safetensors import SafetensorError

from adpo_jax import export, generate, pretrained
from adpo_jax.data import arithmetic
from adpo_jax.engine.text_stream import TextStream
from adpo_jax.hf import folders, weights
from adpo_jax.log.printable import LastingStream, printable
from adpo_jax.model import lora
from adpo_jax.policy import Policy
from adpo_jax.records import Completion
from adpo_jax.run import setup
from adpo_jax.run.checkpoint_files import CheckpointError
from adpo_jax.run.checkpoints import Checkpoints
from adpo_jax.run.config_checks import finalized
from adpo_jax.run.folder import RunFolder
from adpo_jax.run.identity import as_json

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the embedded task with checkpoints after 1 and 2 iterations, and no export yet."""
    config = finalized(parse(f"--config.actor_rollout_ref.model.hf_config={SMALL}"))
    root = tmp_path_factory.mktemp("runs") / "small"
    return root, checkpointed(root, config, steps=(1, 2))


def checkpointed(root, config, steps):
    """Makes a run whose parameters at a step are the first ones times the step; returns those."""
    folder = RunFolder(root)
    folder.claim(config)
    parts = setup.build(config)
    state = parts.learner.init_state(parts.initial_params())
    with folder, Checkpoints(folder.checkpoints, save_freq=1, keep=3) as checkpoints:
        for step in steps:
            checkpoints.save(step, state.replace(params=scaled(state.params, step)))
    return jax.device_get(state.params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    policy, params = Policy.from_config(arithmetic.MODEL_CONFIG | SMALL, jax.random.key(9))
    policy.save_pretrained(folder, params, arithmetic.make_tokenizer())
    return folder


def scaled(params, by):
    return jax.tree.map(lambda x: x * by, params)


def assert_params(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)


def test_a_run_is_its_newest_checkpoint_and_a_step_is_that_one(run):
    root, params = run
    for name in (root, root / "checkpoints", root / "checkpoints" / "2"):
        assert_params(pretrained.load(name).params, scaled(params, 2))
    first = pretrained.load(root / "checkpoints" / "1")
    assert_params(first.params, params)
    assert first.prompt_format.prompt_template == "{prompt}\n"
    # Its prompts are those it was trained on.
    expected = first.tokenizer("2 + 2?\n")["input_ids"]
    assert first.prompts(["2 + 2?"], max_length=99) == [expected]
    assert first.stop_token_ids == (first.tokenizer.eos_token_id,)
    with pytest.raises(ValueError, match=r"has the checkpoints \[1, 2\]; given '3'"):
        pretrained.load(root / "checkpoints" / "3")


def test_a_checkpoint_is_found_from_within_its_folder(run, monkeypatch):
    root, params = run
    for here, name, by in (
        ("checkpoints", "1", 1),
        ("checkpoints", ".", 2),
        ("checkpoints/1", ".", 1),
    ):
        monkeypatch.chdir(root / here)
        assert_params(pretrained.load(name).params, scaled(params, by))


def test_a_relative_path_of_a_run_starts_where_the_run_started(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    config = finalized(parse("--config.actor_rollout_ref.model.path=hf"))
    params = checkpointed(tmp_path / "run", config, steps=(2,))
    monkeypatch.chdir(tmp_path)
    assert_params(pretrained.load("run").params, scaled(params, 2))
    monkeypatch.chdir(folder.parent)
    assert not RunFolder(tmp_path / "run").changes(config)


def test_a_folder_that_is_filled_meanwhile_stays_and_a_link_is_followed(tmp_path):
    out = tmp_path / "out"

    def write(beside: str) -> None:
        with folders.new_folder(out, overwrite=False) as temporary:
            (temporary / "mine").touch()
            out.mkdir()
            (out / beside).touch()

    with pytest.raises(ValueError, match="out is not empty; give another folder"):
        write("theirs")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]
    (tmp_path / "link").symlink_to(out)
    for name in ("one", "two"):
        with folders.new_folder(tmp_path / "link", overwrite=True) as temporary:
            (temporary / name).touch()
    assert [path.name for path in out.iterdir()] == ["two"]
    assert (tmp_path / "link").is_symlink()


def test_an_export_is_read_unless_a_checkpoint_is_newer(run, tmp_path):
    root, params = run
    copy = tmp_path / "run"
    shutil.copytree(root, copy)
    model = pretrained.load(root)
    model.policy.save_pretrained(copy / "export", scaled(params, 7), model.tokenizer)
    for step, expected in ((1, 2), (2, 7)):
        RunFolder(copy).note_export(step, "")
        assert_params(pretrained.load(copy).params, scaled(params, expected))
    assert pretrained.load(copy).prompt_format.prompt_template == "{prompt}\n"


def test_a_checkpoint_that_is_not_what_was_saved_is_refused_by_name(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    newest = copy / "checkpoints" / "2"
    shutil.rmtree(newest / "state")
    shutil.copytree(copy / "checkpoints" / "1" / "state", newest / "state")
    other = re.escape(str(copy / "checkpoints" / "1"))
    message = rf"checkpoint 2 is damaged: bits have changed in \.params\[.*; load {other}$"
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(CheckpointError, match=message):
            pretrained.load(copy, dtype=dtype)
    shutil.rmtree(newest / "description")
    with pytest.raises(CheckpointError, match=f"checkpoint 2 is damaged: .*; load {other}$"):
        pretrained.load(newest)
    shutil.rmtree(copy / "checkpoints" / "1")
    with pytest.raises(CheckpointError, match="checkpoint 2 is damaged: .*; the run has no other$"):
        pretrained.load(copy)


def test_a_checkpoint_of_another_model_than_the_config_says_is_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    written = json.loads((copy / "config.json").read_text())
    written["actor_rollout_ref"]["model"]["hf_config"]["intermediate_size"] = 64
    (copy / "config.json").write_text(json.dumps(written))
    wanted = r"gate'\]: \[\[1, 16, 32\], 'float32'\] there, \[\[1, 16, 64\], 'float32'\] wanted"
    with pytest.raises(CheckpointError, match=wanted):
        pretrained.load(copy)


@pytest.mark.parametrize(
    ("override", "kind", "factor"),
    [
        (None, "yarn", 4.0),
        ({"rope_scaling": {"factor": 2.0}}, "yarn", 2.0),
        ({"rope_scaling": None, "a.dotted.key": None}, "default", 1.0),
    ],
)
def test_overrides_are_put_over_those_of_the_run(run, folder, override, kind, factor, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    written = json.loads((copy / "config.json").read_text())
    written["actor_rollout_ref"]["model"] |= {
        "path": str(folder),
        "hf_config": {},
        "override_config": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    }
    (copy / "config.json").write_text(json.dumps(written))
    (rope,) = pretrained.load(copy, override_config=override).policy.config.ropes
    assert (rope.kind, rope.factor) == (kind, factor)


def test_the_dtype_is_that_asked_for(run):
    model = pretrained.load(run[0], dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {"bfloat16"}


@pytest.mark.long
def test_adapters_are_merged_into_the_weights_that_they_were_trained_beside(tmp_path):
    """In float32 the frozen weights of a run in bfloat16 stay in it where the caller says so."""
    model = "--config.actor_rollout_ref.model"
    overrides = [f"{model}.hf_config={SMALL}", f"{model}.lora_rank=2", "--config.trainer.bf16=true"]
    config = finalized(parse(*overrides))
    folder = RunFolder(tmp_path / "adapted")
    folder.claim(config)
    parts = setup.build(config)
    state = parts.learner.init_state(parts.initial_params())
    with folder, Checkpoints(folder.checkpoints, save_freq=1, keep=1) as checkpoints:
        checkpoints.save(1, state.saved)
    kept = pretrained.load(folder.root, keep_base_dtype=True)
    wide = pretrained.load(folder.root)
    (trained, frozen), (_, widened) = lora.split(kept.params), lora.split(wide.params)

    def dtypes(tree):
        return {x.dtype.name for x in jax.tree.leaves(tree)}

    assert dtypes(trained) == {"float32"}
    assert dtypes(wide.params) == {"float32"}
    assert "bfloat16" in dtypes(frozen)
    assert kept.policy.param_dtype == "bfloat16"
    # Both hold what the run trained beside, in one width or the other.
    assert_params(jax.tree.map(lambda x: x.astype("float32"), frozen), jax.device_get(widened))


def test_generate_shows_all_text_and_writes_each_completion_once(folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    # U+2028 ends a line of text, not of JSON lines.
    rows = [{"prompt": "Ann has 3\u2028apples.", "id": 7}, {"prompt": "Ben"}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "in.jsonl").write_text("".join(lines), encoding="utf-8")
    command = ["--model", str(folder), "--prompts", str(tmp_path / "in.jsonl"), "--n", "3"]
    command += ["--max-tokens", "12", "--out", str(out)]
    generate.generate(generate.arguments(command))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((r["prompt_index"], r["sample"]) for r in lines) == [
        (p, s) for p in range(2) for s in range(3)
    ]
    assert all(row["id"] == 7 for row in lines if row["prompt_index"] == 0)
    shown = capsys.readouterr().out
    ordered = sorted(lines, key=lambda r: (r["prompt_index"], r["sample"]))
    place = 0
    for row in ordered:
        place = shown.index(f"--- prompt {row['prompt_index']}, completion {row['sample']}", place)
        assert printable(row["completion"]) in shown[place:]
    with pytest.raises(ValueError, match="is there already"):
        generate.generate(generate.arguments(command))


def test_generate_takes_no_more_tokens_than_the_model_has_positions_for(folder, tmp_path, capsys):
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    config = json.loads((short / "config.json").read_text())
    config["max_position_embeddings"] = 16
    (short / "config.json").write_text(json.dumps(config))
    command = ["--model", str(short), "--prompt", "3 apples", "--ignore-eos", "--n", "1"]
    generate.generate(generate.arguments(command))
    assert "cut off at --max-tokens" in capsys.readouterr().out
    command += ["--max-tokens", "16"]
    with pytest.raises(ValueError, match="more than the 16 positions"):
        generate.generate(generate.arguments(command))
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    (short / "config.json").write_text(json.dumps(config))
    generate.generate(generate.arguments(command))


def test_generate_ends_a_text_before_its_stop_string(folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    command = ["--model", str(folder), "--prompt", "a", "--n", "8", "--max-tokens", "12"]
    command += ["--stop", "e", "--stop", "a", "--out", str(out)]
    generate.generate(generate.arguments(command))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    stopped = [row for row in rows if row["finish_reason"] == "stop"]
    assert stopped
    assert not any(mark in row["completion"] for row in rows for mark in "ea")
    texts = re.split(r"--- prompt 0, completion \d\n", capsys.readouterr().out)[1:]
    for shown, row in zip(texts, rows, strict=True):
        end = "\n" if row in stopped else " [cut off"
        assert shown.startswith(printable(row["completion"]) + end)
    with pytest.raises(ValueError, match="--quiet shows nothing: give a file"):
        generate.generate(generate.arguments(["--model=x", "--prompt=a", "--quiet"]))


@pytest.mark.parametrize(("slots", "taken"), [(None, None), (10**7, 6), (4, 4)])
def test_generate_has_no_more_slots_than_completions(folder, slots, taken, monkeypatch):
    def engine(policy, **settings):
        raise RuntimeError(f"{settings['num_slots']} slots")

    monkeypatch.setattr("adpo_jax.engine.engine.Engine", engine)
    command = ["--model", str(folder), "--prompt", "a", "--prompt", "b", "--n", "3"]
    command += [] if slots is None else ["--slots", str(slots)]
    with pytest.raises(RuntimeError, match=f"^{taken} slots"):
        generate.generate(generate.arguments(command))


def test_generate_shows_the_first_unfinished_completion_as_it_is_sampled(folder, capsys):
    model = pretrained.load(folder)
    decode = functools.partial(model.tokenizer.decode, skip_special_tokens=True)
    screen = generate.Screen(functools.partial(TextStream, decode), 1, 2)
    text = "3 apples and 4 pens"
    ids = model.tokenizer(text)["input_ids"]
    screen.push(0, 1, ids)  # the second waits for the first
    assert "apples" not in capsys.readouterr().out
    screen.push(0, 0, ids[:3])
    assert model.tokenizer.decode(ids[:3]) in capsys.readouterr().out
    screen.end(0, 0, Completion.sampled(ids[:3], [0.0] * 3, "stop"))
    assert capsys.readouterr().out == f"\n--- prompt 0, completion 1\n{text}"


def test_generate_passes_over_what_the_command_line_says(folder, tmp_path, monkeypatch, capsys):
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    config = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps(config | {"note_of_its_maker": "v2"}))
    command = ["generate", "--model", str(newer), "--prompt", "3", "--max-tokens", "1"]
    monkeypatch.setattr("sys.argv", command)
    assert generate.main() == 2
    cure = re.search(r"--override-config of .* as in ({.*?})", capsys.readouterr().err)[1]
    monkeypatch.setattr("sys.argv", [*command, "--override-config", cure])
    assert generate.main() == 0


@pytest.mark.parametrize("to_file", [False, True])
def test_generate_ends_when_nobody_reads_it_unless_it_writes_to_a_file(
    folder, to_file, tmp_path, monkeypatch
):
    out, pushes = tmp_path / "out.jsonl", []
    push = generate.Screen.push
    monkeypatch.setattr(
        generate.Screen, "push", lambda *given: pushes.append(given) or push(*given)
    )
    command = ["--model", str(folder), "--prompt", "x", "--max-tokens", "48", "--ignore-eos"]
    command += ["--out", str(out)] if to_file else []
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr("sys.stdout", LastingStream(stream))
        monkeypatch.setattr("sys.argv", ["generate.py", *command])
        assert generate.main() == 0
    assert len(pushes) == (6 if to_file else 1)
    assert out.exists() == to_file
    if to_file:
        assert json.loads(out.read_text())["num_tokens"] == 48


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "nothing to complete"),
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", ""], "empty"),
        (
            ["--prompt", "x", "--max-tokens", "100000"],
            "positions of this model: lower --max-tokens",
        ),
        (["--prompt", "a " * 50_000], "which leaves no place for a completion in the"),
        (["--prompt", "x", "--dtype", "fp16"], "did you mean float16?"),
        (["--prompt", "x", "--seed", "99999999999999999999"], "--seed is a whole number from 0"),
    ],
)
def test_generate_tells_a_mistake_in_one_line(folder, command, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate.py", "--model", str(folder), *command])
    assert generate.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": }', r"line 3 is no JSON: Expecting value at column 12$"),
        ('{"question": "x"}', r'line 3 has no key "prompt"; wanted .*, given .*question'),
        ("[" * 100_000, r"line 3 cannot be read as JSON: .*recursion"),
        (
            '{"prompt": "x", "completion": "y"}',
            r"line 3 has the key 'completion', which the output has for itself: rename it",
        ),
    ],
)
def test_generate_names_the_line_of_the_prompts_that_cannot_be_used(tmp_path, line, message):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    command = ["--model", "m", "--prompt", "x", "--prompts", str(prompts)]
    with pytest.raises(ValueError, match=rf"^--prompts .*prompts\.jsonl: {message}"):
        generate.read_rows(generate.arguments(command))


def test_generate_takes_a_file_of_prompts_with_a_byte_order_mark(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n', encoding="utf-8-sig")
    command = ["--model", "m", "--prompts", str(prompts)]
    assert generate.read_rows(generate.arguments(command)) == [{"prompt": "a"}]


def test_a_run_whose_prompts_lost_a_part_for_a_secret_is_exported_and_not_prompted(run, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(run[0], root)
    given = "The password: swordfish."
    config = finalized(
        parse(
            f"--config.actor_rollout_ref.model.hf_config={SMALL}",
            f"--config.data.system_prompt={given}",
        )
    )
    content = as_json(config, None, {})
    RunFolder(root).config.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"data.system_prompt of the run held .* put the text back"
    ):
        pretrained.load(root)
    export.export(export.arguments(["--model", str(root), "--out", str(tmp_path / "out")]))
    content["data"]["system_prompt"] = given
    RunFolder(root).config.write_text(json.dumps(content))
    assert pretrained.load(root).prompt_format.system_prompt == given
    RunFolder(root).check(config)


def test_export_writes_the_parameters_of_a_checkpoint_and_overwrites_nothing(run, tmp_path):
    out = tmp_path / "out"
    root, params = run
    command = ["--model", str(root / "checkpoints" / "1"), "--out", str(out)]
    export.export(export.arguments(command))
    read = pretrained.load(out)
    assert_params(read.params, params)
    assert read.tokenizer.get_vocab() == pretrained.load(root).tokenizer.get_vocab()
    with pytest.raises(ValueError, match="is there already"):
        export.export(export.arguments(command))


def test_an_export_does_not_take_the_place_of_the_one_that_a_run_writes(run):
    root, _ = run
    for out in ("export", "checkpoints/7"):
        command = ["--model", str(root), "--out", str(root / out)]
        with pytest.raises(ValueError, match=rf"{out} is a folder that the run in .* itself; give"):
            export.export(export.arguments(command))


def test_a_disk_that_fails_is_an_error_of_the_system_whichever_library_writes(tmp_path):
    """A limit on the size of files stands for a full disk: the real writers meet a real error."""
    writers = {
        "weights": lambda path: weights.save_file({"x": np.zeros(5000)}, path / "x.safetensors"),
        "tokenizer": arithmetic.make_tokenizer().save_pretrained,
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in writers.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with (
                pytest.raises(OSError, match=rf"File too large: '.*/{name}'$") as raised,
                folders.new_folder(tmp_path / name, overwrite=False) as temporary,
            ):
                write(temporary)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_an_export_to_a_full_disk_says_what_to_do(folder, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["export", "--model", str(folder), "--out", str(out)])
    assert export.main() == 2
    assert capsys.readouterr().err == (
        f"error: [Errno 28] No space left on device: '{out}'; make room for {out}, and the same "
        "command writes it\n"
    )


class Hub:
    """Stands in for the client of the hub."""

    def __init__(self):
        self.calls = []

    def create_repo(self, name, **kwargs):
        if name == "someone/else":
            raise OSError("403 Forbidden\nmore")
        if name == "out/of-reach":  # the error of the client's own HTTP library
            raise huggingface_hub.errors.HTTPError("[Errno -2] Name or service not known")
        self.calls.append(("create", name, kwargs))

    def upload_folder(self, *, folder_path, repo_id):
        files = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, files))


def test_an_export_is_uploaded_privately_by_flag(folder, tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    command = ["--model", str(folder), "--out", str(tmp_path / "a"), "--push-to-hub", "me/it"]
    export.export(export.arguments(command))
    (_, name, kwargs), (_, uploaded_to, files) = hub.calls
    assert (name, uploaded_to) == ("me/it", "me/it")
    assert kwargs == {"private": True, "exist_ok": True}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/it\n")
    command = ["--model", str(folder), "--out", str(tmp_path / "b"), "--push-to-hub"]
    with pytest.raises(ValueError, match=r"not uploaded to 'someone/else': 403 Forbidden$"):
        export.export(export.arguments([*command, "someone/else"]))
    command[3] = str(tmp_path / "c")
    with pytest.raises(ValueError, match=r"not uploaded to 'out/of-reach': \[Errno -2\] Name or"):
        export.export(export.arguments([*command, "out/of-reach"]))
