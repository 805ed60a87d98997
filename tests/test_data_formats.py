"""Data as other trainers write it, named validation sets, and large files."""

import dataclasses
import datetime
import gzip
import json
import re
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fakes import FakeEngine, FakeLearner, vars_of
from test_prompts import CHAT_TEMPLATE, make_tokenizer

import adpo_jax
from adpo_jax.config import default_config
from adpo_jax.data import arithmetic, due, files, readers
from adpo_jax.data.dataset import Dataset
from adpo_jax.data.files import load_rows
from adpo_jax.data.order import prompt_indices
from adpo_jax.data.prompts import render_prompts
from adpo_jax.log.metrics import read_jsonl
from adpo_jax.run import datasets, loading, setup
from adpo_jax.run.config_checks import finalized

DOCS = (Path(__file__).resolve().parents[1] / "docs" / "coming_from.md").read_text()

KEYS = {
    "verl.jsonl": ("data.prompt_key=prompt", "data.answer_key=reward_model.ground_truth"),
    "trl.jsonl": ("data.prompt_key=prompt", "data.answer_key=completion"),
    "prompts.jsonl": ("data.prompt_key=prompt", "custom_reward_function.name=format_reward"),
    "table.csv": (),
    "columns.json": (),
}


def documented(name: str, folder: Path) -> Path:
    """The file of this name in docs/coming_from.md."""
    content = re.search(rf"^`{re.escape(name)}`.*?^```\w+\n(.*?)^```", DOCS, re.M | re.S)[1]
    (folder / name).write_text(content)
    return folder / name


def build(config):
    parts = setup.build(config, jax.devices()[:1])
    learner = FakeLearner(**vars_of(parts.learner))
    return dataclasses.replace(parts, engine=FakeEngine(), learner=learner)


def config_of(*overrides):
    """The default config of a tiny model with `key=value` overrides."""
    config = default_config()
    model = config.actor_rollout_ref.model
    model.hf_config = {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    flat = {"trainer.total_training_steps": 1, "data.train_batch_size": 2}
    for override in overrides:
        key, value = override.split("=", 1)
        flat[key] = json.loads(value) if re.fullmatch(r"\d+|true|false", value) else value
    config.update_from_flattened_dict(flat)
    return finalized(config)


@pytest.fixture
def large(monkeypatch):
    """Every file is a large one."""
    monkeypatch.setattr(files, "LARGE_BYTES", 0)


@pytest.mark.parametrize("name", KEYS)
def test_a_documented_file_trains_as_it_stands(name, tmp_path):
    path = documented(name, tmp_path)
    for key in KEYS[name]:
        assert f"--config.{key}" in DOCS.replace("\n", " ")
    config = config_of(*KEYS[name], f"data.train_files={path}", "data.shuffle=false")
    seen = []
    adpo_jax.train(config, tmp_path / "run", build=build, callbacks=[lambda i: seen.append(i)])
    prompts = seen[0].groups.prompts
    tokenizer = arithmetic.make_tokenizer()
    assert tokenizer.batch_decode(prompts.token_ids) == ["2 plus 3?", "4 plus 3?"]
    assert prompts.columns.get("solution") == (None if name == "prompts.jsonl" else ["5", "7"])


def test_prompts_alone_are_refused_in_a_sentence_where_the_grader_needs_solutions(tmp_path):
    path = documented("prompts.jsonl", tmp_path)
    config = config_of("data.prompt_key=prompt", f"data.train_files={path}")
    with pytest.raises(
        ValueError,
        match=r"no column 'answer'.*good_accuracy compares with it: .* needs no solution",
    ):
        datasets.load_prompts(config, arithmetic.make_tokenizer(), str(path), split="train")


def test_completions_of_trl_are_demonstrations_of_the_supervised_stage(tmp_path):
    path = documented("trl.jsonl", tmp_path)
    config = config_of("data.prompt_key=prompt", f"sft.train_files={path}")
    found = datasets.load_demonstrations(config, loading.find_model(config))
    decode = arithmetic.make_tokenizer().decode
    assert [decode(ids[:-1]) for ids in found.completions] == ["5", "7"]


def demonstrations(path, completions):
    """The texts of the demonstrations of a file with these completions."""
    rows = [{"prompt": "2+3?", "completion": completion} for completion in completions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of("data.prompt_key=prompt", f"sft.train_files={path}")
    found = datasets.load_demonstrations(config, loading.find_model(config))
    return [arithmetic.make_tokenizer().decode(ids[:-1]) for ids in found.completions]


def said(content, **fields):
    return {"role": "assistant", "content": content} | fields


def test_a_completion_to_imitate_is_text_a_number_or_one_message_of_text(tmp_path, monkeypatch):
    completions = [
        *("5", 5, 2.5, "", said("5"), [said("5")], [said("")]),
        [said([{"type": "text", "text": "5"}], tool_calls=None, reasoning_content="")],
    ]
    for limit in (2**20, 0):
        monkeypatch.setattr(files, "LARGE_BYTES", limit)
        texts = demonstrations(tmp_path / f"rows_{limit}.jsonl", completions)
        assert texts == ["5", "5", "2.5", "", "5", "5", "", "5"]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "completion",
    [
        [said("", tool_calls=[CALL])],
        said("Let me see.", tool_calls=[CALL]),
        [said("5", reasoning_content="two and three")],
        [said("Hm?"), {"role": "user", "content": "2+3"}, said("5")],
        [{"role": "user", "content": "5"}],
        [said(None)],
        [said([{"type": "image"}])],
        [],
        ["5"],
        {"answer": "5"},
    ],
    ids=str,
)
def test_a_completion_of_anything_else_is_refused_with_file_row_and_cure(tmp_path, completion):
    with pytest.raises(ValueError, match=r"rows\.jsonl: row 2: the completion .* into one text"):
        demonstrations(tmp_path / "rows.jsonl", ["5", completion])


def test_gzip_is_read_and_what_is_wrong_has_its_line(tmp_path):
    row = '{"question": "q", "answer": "a"}\n'
    for name, content in (("a.jsonl.gz", row * 2), ("a.csv.gz", "question,answer\nq,a\nq,a\n")):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        rows = load_rows(str(tmp_path / name), prompt_key="question", answer_key="answer")
        assert rows.columns == {"question": ["q", "q"], "answer": ["a", "a"]}
    whole = gzip.compress(row.encode() * 99)
    wrong = {
        "cut.jsonl.gz": (whole[:-9], "not a whole gzip file"),
        "no.jsonl.gz": (b"plain", "not a whole gzip file"),
        "bad.jsonl.gz": (gzip.compress(row.encode() + b"{"), r"bad\.jsonl\.gz:2:\d+: not JSON"),
        "few.csv": (b'question,answer\n"a\nb",c\nd\n', r"few\.csv:4: the row has 1 values"),
        "open.csv": (b'question,answer\n"a', r"open\.csv:2: not CSV"),
        "uneven.json": (b'{"question": ["a", "b"], "answer": ["c"]}', "columns of one length"),
    }
    for name, (content, text) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=text):
            load_rows(str(tmp_path / name), prompt_key="question", answer_key="answer")


def test_two_files_may_number_their_rows_from_0_and_one_may_not_twice(tmp_path, monkeypatch):
    rows = [{"id": n, "question": f"{n}?", "answer": "1"} for n in range(3)]
    for name, part in (("a", rows), ("b", rows), ("c", [*rows, rows[1]])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    for limit in (files.LARGE_BYTES, 0):
        monkeypatch.setattr(files, "LARGE_BYTES", limit)
        keys = {"prompt_key": "question", "answer_key": "answer", "cache_dir": str(tmp_path / "x")}
        assert list(load_rows([a, b], **keys).columns["id"]) == [0, 1, 2, 0, 1, 2]
        with pytest.raises(ValueError, match="rows 2 and 4 have the same id 1"):
            load_rows(c, **keys)


def test_every_named_validation_set_has_scores_of_its_own(tmp_path):
    for name, answer in (("a", 1), ("b", 2)):
        row = {"question": "1?", "answer": answer}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    sets = f"one={tmp_path}/a.jsonl,{tmp_path}/b.jsonl,two={tmp_path}/b.jsonl"
    config = config_of(f"data.val_files={sets}", "trainer.val_before_train=false")
    metrics = adpo_jax.train(config, tmp_path / "run", build=build)
    assert [metrics[f"eval/{name}/num_prompts"] for name in ("one", "two")] == [2.0, 1.0]
    assert {"eval/accuracy", "eval/one/accuracy", "eval/two/accuracy"} <= metrics.keys()
    evaluated = [row["step"] for row in read_jsonl(tmp_path / "run/metrics.jsonl") if
                 "eval/accuracy" in row]  # fmt: skip
    assert evaluated == [1]
    with pytest.raises(ValueError, match="name all of the sets"):
        datasets.named_sources("a.jsonl,two=b.jsonl")


def test_a_folder_that_does_not_say_its_splits_is_not_trained_and_evaluated_on(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"question": "1?", "answer": 1}\n')
    tokenizer = arithmetic.make_tokenizer()
    for train, val in ((".", tmp_path), (".", "one=a.jsonl"), ("b.jsonl,a.jsonl", ".")):
        config = config_of(f"data.train_files={train}", f"data.val_files={val}")
        with pytest.raises(
            ValueError, match=r"both read .*a\.jsonl: no name in the folder .* says"
        ):
            datasets.load_val_prompts(config, tokenizer)
    named = config_of("data.train_files=a.jsonl", "data.val_files=a.jsonl")
    assert len(datasets.load_val_prompts(named, tokenizer)) == 1

    Path("a.jsonl").rename("my_train.jsonl")
    Path("my_test.jsonl").write_text('{"question": "2?", "answer": 2}\n')
    config = config_of("data.train_files=.", "data.val_files=.")
    assert datasets.load_val_prompts(config, tokenizer).columns["question"] == ["2?"]
    train = datasets.load_prompts(config, tokenizer, ".", split="train")
    assert train.columns["question"] == ["1?"]


def test_rows_come_in_the_order_of_the_data_without_shuffle():
    dealt = [
        prompt_indices(s, seed=1, num_rows=3, batch_size=2, shuffle=False).tolist() for s in (0, 1)
    ]
    assert dealt == [[0, 1], [2, 0]]


def test_training_takes_the_first_samples_and_says_when_a_batch_is_larger(caplog):
    config = config_of("data.train_max_samples=3", "data.train_batch_size=8")
    tokenizer = arithmetic.make_tokenizer()
    prompts = datasets.load_prompts(config, tokenizer, config.data.train_files, split="train")
    assert len(prompts) == 3
    assert "data.train_batch_size is 8, and there are 3 training prompts" in caplog.text


# Large files.

MIXED = [
    {"question": "1+1?", "answer": "2"},
    {"question": [{"role": "user", "content": "Größe?"}], "answer": 3.5, "level": {"a": [1]}},
    {"question": "x" * 90, "answer": "#### 1,000", "level": None},
]


def large_prompts(path, tmp_path, tokenizer, **data):
    config = default_config()
    config.data.update(cache_dir=str(tmp_path / "cache"), max_prompt_length=60, **data)
    return datasets.load_prompts(config, tokenizer, str(path), split="train")


def test_large_files_give_the_same_prompts_as_small_ones(tmp_path, monkeypatch, caplog):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) + "\n" for row in MIXED))
    parquet = tmp_path / "rows.parquet"
    texts = [MIXED[0], MIXED[2] | {"level": 4}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), parquet)
    for file, options in ((path, {}), (parquet, {}), (path, {"overlong_prompts": "truncate"})):
        monkeypatch.setattr(files, "LARGE_BYTES", 2**20)
        caplog.clear()
        small = large_prompts(file, tmp_path, tokenizer, **options)
        warnings = list(caplog.messages)
        assert file == parquet or "1 of 3 prompts are longer than data.max" in warnings[0]
        monkeypatch.setattr(files, "LARGE_BYTES", 0)
        for _ in range(2):  # the second time from the cache
            caplog.clear()
            stored = large_prompts(file, tmp_path, tokenizer, **options)
            assert caplog.messages == warnings
            assert stored.files_digest
            rows = range(len(stored))
            assert (stored.select(rows).token_ids, stored.select(rows).columns) == (
                small.token_ids,
                small.columns,
            )


def test_empty_cells_of_a_csv_file_are_no_ids(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,question,answer\n,a,1\n,b,2\n7,c,3\n")
    keys = {"prompt_key": "question", "answer_key": "answer"}
    assert len(load_rows(str(path), **keys)) == 3
    path.write_text(path.read_text() + "7,d,4\n")
    with pytest.raises(ValueError, match="rows . and . have the same id '7'"):
        load_rows(str(path), **keys)


@pytest.mark.usefixtures("large")
def test_a_large_parquet_file_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = [f"{n} " * 400 for n in range(2000)]
    table = pyarrow.table({"question": texts, "answer": texts})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[200:4000] = bytes(3800)
    path.write_bytes(raw)
    keys = {"prompt_key": "question", "answer_key": "answer", "cache_dir": str(tmp_path / "c")}
    with pytest.raises(ValueError, match=r"rows\.parquet: not a readable Parquet file"):
        load_rows(str(path), **keys)


@pytest.mark.parametrize("shape", ["last", "false", "first"])
def test_a_prefix_needs_no_chat_template_where_it_is_at_the_end(shape):
    user = {"role": "user", "content": "1+1?", "prefix": shape == "first"}
    said = {"role": "assistant", "content": "It is", "prefix": shape == "last"}
    options = {"prompt_key": "prompt", "max_prompt_length": 99}
    dataset = Dataset({"prompt": [[user, said]]})
    if shape == "first":
        with pytest.raises(ValueError, match="no place for 'prefix'"):
            render_prompts(dataset, make_tokenizer(None), **options)
    else:
        assert len(render_prompts(dataset, make_tokenizer(None), **options).token_ids) == 1


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("shapes", ["uusu", "ttu", "ssus"])
def test_a_large_file_may_have_prompts_of_another_shape_in_any_row(tmp_path, shapes):
    user, system = {"role": "user", "content": "1+1?"}, {"role": "system", "content": "Add."}
    prompts = {"t": "1+1?", "u": [user], "s": [system, user]}
    path = tmp_path / "rows.jsonl"
    rows = [{"question": prompts[shape], "answer": "2"} for shape in shapes]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = large_prompts(path, tmp_path, make_tokenizer(CHAT_TEMPLATE))
    assert len(found.select(range(len(shapes))).token_ids) == len(shapes)


@pytest.mark.parametrize("limit", [2**25, 0], ids=["small", "large"])
def test_what_python_cannot_hold_is_refused_before_it_is_due(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(files, "LARGE_BYTES", limit)
    beyond = pyarrow.array([0, 2**62], pyarrow.int64())
    text = pyarrow.array([b"a", b"\xe9"]).view(pyarrow.utf8())
    columns = {
        "text": text,
        "at": beyond.cast(pyarrow.timestamp("us")),
        "took": pyarrow.array([None, 2**62], pyarrow.int64()).cast(pyarrow.duration("s")),
        "where": pyarrow.array([0, 1], pyarrow.timestamp("us", "Foo/Bar")),
    }
    for name, column in columns.items():
        path = tmp_path / f"{name}.parquet"
        table = {"question": ["a", "b"], "answer": ["1", "2"], name: column}
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        keys = {"prompt_key": "question", "answer_key": "answer", "cache_dir": str(tmp_path)}
        with pytest.raises(ValueError, match=rf"{name}\.parquet: column '{name}' has a value in"):
            load_rows(str(path), **keys)


@pytest.mark.usefixtures("large")
def test_large_files_are_filtered_by_the_tools_of_their_environments(tmp_path):
    """The tokens around a prompt are those of its own tools."""
    tokenizer = make_tokenizer("{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE)
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"{n}+1?", "environment": "ab"[n % 2], "answer": "1"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_rows(str(path), prompt_key="question", answer_key="answer", cache_dir="")
    options = {
        "prompt_key": "question",
        "prompt_template": "{prompt}",
        "max_prompt_length": 60,
        "overlong": "filter",
        "tools": {"a": [], "b": ["a tool that is described at length"] * 3},
    }
    cache = tmp_path / "cache"
    for _ in range(2):
        overlong = due.overlong_rows(dataset, tokenizer, options, str(cache))
        assert overlong.tolist() == [1, 3, 5, 7]
        (kept,) = cache.glob("overlong-*.npy")
        kept.write_bytes(b"")  # as after a loss of power


@pytest.mark.usefixtures("large")
def test_large_files_fill_in_columns_of_any_kind_and_leave_rows_alone_that_are_not_taken(tmp_path):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    rows = [{"question": "1+1?", "answer": "2", "choices": ["1", "2"]}] * 3
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"choices": None}])
    )
    data = {"prompt_template": "{prompt} {choices} {}"}
    prompts = large_prompts(
        tmp_path / "rows.jsonl", tmp_path, tokenizer, train_max_samples=3, **data
    )
    assert "['1', '2'] {}" in tokenizer.decode(prompts.token_ids[0])
    with pytest.raises(ValueError, match="row 4: .* the column 'choices', which is null"):
        large_prompts(tmp_path / "rows.jsonl", tmp_path, tokenizer, **data)


@pytest.mark.parametrize("limit", [0, 2**20])
def test_ids_of_bytes_and_times_to_the_nanosecond_are_read(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(files, "LARGE_BYTES", limit)
    times = pyarrow.array([1_000_001_001, None], pyarrow.int64())
    columns = {
        "question": ["q", "r"],
        "answer": ["1", "2"],
        "id": pyarrow.array([b"\xff" * 16, b"\xfe" * 16], pyarrow.binary(16)),
        "at": times.cast(pyarrow.timestamp("ns")),
        "took": pyarrow.array([[1_000_000_001], None], pyarrow.list_(pyarrow.duration("ns"))),
    }
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    dataset = load_rows(str(path), prompt_key="question", answer_key="answer")
    assert list(dataset.columns["at"]) == [datetime.datetime(1970, 1, 1, 0, 0, 1, 1), None]
    assert list(dataset.columns["took"]) == [[datetime.timedelta(seconds=1)], None]
    pyarrow.parquet.write_table(pyarrow.table(columns | {"id": [b"\xff", b"\xff"]}), path)
    with pytest.raises(ValueError, match="rows 1 and 2 have the same id"):
        load_rows(str(path), prompt_key="question", answer_key="answer")


NARROW = {
    "float16": ([0.1, 2.5, None, 65504.0], pyarrow.float16()),
    "float32": ([0.1, 2.99, None, 1e20], pyarrow.float32()),
    "list": ([[0.1, None], None, [], [0.3]], pyarrow.list_(pyarrow.float32())),
    "fixed": ([[0.1, 0.2], None, [None, 0.4]], pyarrow.list_(pyarrow.float32(), 2)),
    "struct": (
        [{"a": 0.1, "b": [{"c": 0.7}]}, None, {"a": None, "b": None}],
        pyarrow.struct(
            {"a": pyarrow.float32(), "b": pyarrow.list_(pyarrow.struct({"c": pyarrow.float16()}))}
        ),
    ),
}


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("limit", [0, 2**20])
def test_numbers_of_16_and_32_bits_are_read_as_they_are_written(tmp_path, monkeypatch, kind, limit):
    monkeypatch.setattr(files, "LARGE_BYTES", limit)
    values, arrow = NARROW[kind]
    columns = {"question": ["q"] * len(values), "answer": ["1"] * len(values)}
    table = pyarrow.table(columns | {"level": pyarrow.array(values, arrow)})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    dataset = load_rows(str(path), prompt_key="question", answer_key="answer")
    assert list(dataset.column("level")) == values


def test_a_solution_of_32_bits_is_what_a_model_writes(tmp_path):
    table = pyarrow.table({"question": ["q"], "answer": pyarrow.array([0.1], pyarrow.float32())})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    prompts = large_prompts(tmp_path / "rows.parquet", tmp_path, make_tokenizer(CHAT_TEMPLATE))
    assert list(prompts.columns["solution"]) == ["0.1"]


def test_mistakes_in_large_files_are_reported_with_their_line(tmp_path, large):
    good = json.dumps(MIXED[0])
    path = tmp_path / "rows.jsonl"
    for line, text in (
        ('{"question": "q"', r"rows\.jsonl:3:\d+: not JSON"),
        ('{"question": "q"}', r"rows\.jsonl:3: the column 'answer' .* is null"),
        ('{"question": 5, "answer": "a"}', r"rows\.jsonl:3: the prompt in column 'question' must"),
        ('{"question": [5], "answer": "a"}', "row 2: a prompt must be text or a list of messages"),
    ):
        path.write_text(f"{good}\n\n{line}\n")
        with pytest.raises(ValueError, match=text):
            large_prompts(path, tmp_path, make_tokenizer(CHAT_TEMPLATE))


def test_a_large_file_has_no_row_that_cannot_be_rendered_when_it_is_due(tmp_path, large):
    """The template has no place for the name."""
    message = {"role": "user", "content": "Why?"}
    rows = [{"question": [message], "answer": "a"} for _ in range(8)]
    rows[5]["question"] = [message | {"name": "bob"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for template in (CHAT_TEMPLATE, None):
        with pytest.raises(ValueError, match=r"rows\.jsonl: row 6: .*name"):
            large_prompts(path, tmp_path, make_tokenizer(template))


@pytest.mark.parametrize("limit", [0, 2**20])
def test_a_misspelt_column_in_the_template_is_told_of(tmp_path, monkeypatch, caplog, limit):
    monkeypatch.setattr(files, "LARGE_BYTES", limit)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "1", "level": "easy"}\n' * 3)
    quiet = r"{prompt} \boxed{answr} \frac{a}{b} x^{n} {} {0} {a b}"
    for template, told in (
        ("{prompt} Level {leve}, {leve}", ["has {leve}, which is no column .*write {level}$"]),
        (
            "{prompt} {zzzz}",
            ["{zzzz}, .* write {answer} or {level} or {prompt} or {question} or {solution}$"],
        ),
        (quiet, []),
    ):
        caplog.clear()
        large_prompts(path, tmp_path, make_tokenizer(), prompt_template=template)
        assert len(caplog.messages) == len(told) + 1  # the batch is larger than the data
        for text in told:
            assert any(re.search(rf"rows\.jsonl: .*{text}", line) for line in caplog.messages)


@pytest.mark.parametrize("limit", [0, 2**20])
def test_a_table_with_a_column_twice_is_refused(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(files, "LARGE_BYTES", limit)
    path = tmp_path / "rows.parquet"
    columns = [pyarrow.array([text]) for text in ("q", "1", "2")]
    table = pyarrow.Table.from_arrays(columns, ["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"rows\.parquet: .* the column 'answer' twice; rename"):
        large_prompts(path, tmp_path, make_tokenizer())


BYTES = {"bytes": pyarrow.binary(), "large": pyarrow.large_binary(), "fixed": pyarrow.binary(1)}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("limit", [0, 2**20])
def test_bytes_are_no_text(tmp_path, monkeypatch, kind, limit):
    """No completion is equal to them."""
    monkeypatch.setattr(files, "LARGE_BYTES", limit)
    path = tmp_path / "rows.parquet"
    answers = pyarrow.array([b"1", b"2"], BYTES[kind])
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a", "b"], "answer": answers}), path)
    with pytest.raises(ValueError, match=r"row 1: .*'answer' .* holds bytes.*cast the column to"):
        large_prompts(path, tmp_path, make_tokenizer())


@pytest.mark.parametrize("limit", [0, 2**20])
def test_a_missing_column_of_answers_is_named(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(files, "LARGE_BYTES", limit)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a"}\n{"question": "b"}\n')
    with pytest.raises(ValueError, match="rows.jsonl:1: no column 'answer'; the columns are 'q"):
        load_rows(str(path), prompt_key="question", answer_key="answer")


ODD_LINES = {
    "an escape by number": '{"question": "caf\\u00e9", "answer": "1"}',
    "both halves of a character": '{"question": "\\ud83d\\ude00 \\u0000", "answer": "1"}',
    "the second half of a character": '{"question": "\\ude00", "answer": "1"}',
    "half of a character": '{"question": "\\ud83d", "answer": "1"}',
    "a number": '{"question": "q", "answer": 7}',
    "messages": '{"question": [{"role": "user", "content": "q"}], "answer": "1"}',
    "a name more": '{"question": "q", "answer": "1", "kind": "odd"}',
    "a name less": '{"question": "q"}',
    "null": '{"question": "q", "answer": null}',
    "other order": '{"answer": "1", "question": "q"}',
    "twice the name": '{"question": "q", "answer": "1", "answer": "2"}',
    "an empty line": "",
    "space before": ' {"question": "q", "answer": "1"}',
    "space behind": '{"question": "q", "answer": "1"} \r',
    "two objects": '{"question": "q", "answer": "1"}{"question": "q", "answer": "1"}',
    "no object": "[1]",
    "half an object": '{"question": "q", ',
    "a raw control character": '{"question": "a\tb", "answer": "1"}',
    "no UTF-8": b'{"question": "\xff", "answer": "1"}',
    "deep": '{"question": ' + "[" * 100_000 + ', "answer": "1"}',
    "text in all letters": '{"question": "né 中 \\n\\" \\/ 😀", "answer": "1"}',
}


@pytest.mark.parametrize("odd", ODD_LINES)
@pytest.mark.parametrize("ends", ["\n", ""])
def test_a_large_file_says_of_an_odd_line_what_a_small_one_says(tmp_path, monkeypatch, odd, ends):
    """Arrow parses the lines before it, if they are many."""
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 2**12)
    path = tmp_path / "data.jsonl"
    line = ODD_LINES[odd].encode() if isinstance(ODD_LINES[odd], str) else ODD_LINES[odd]
    plain = [f'{{"question": "question {n}", "answer": "{n}"}}'.encode() for n in range(400)]
    path.write_bytes(b"\n".join([*plain[:300], line, *plain[300:]]) + ends.encode())

    def found(limit):
        monkeypatch.setattr(files, "LARGE_BYTES", limit)
        options = {"prompt_key": "question", "answer_key": "answer", "cache_dir": ""}
        try:
            dataset = files.load_rows([str(path)], needs_answer=False, **options)
        except ValueError as error:
            return str(error)
        return [dataset.row(index) for index in range(len(dataset))]

    stored, small = found(0), found(2**30)
    if isinstance(small, list):
        names = dict.fromkeys(name for row in small for name in row)
        small = [dict.fromkeys(names) | row for row in small]
    assert stored == small
    taken = sum(batch.num_rows for batch, _ in readers.text_batches(path))
    assert 0 < taken < 300 or (taken == 401 and isinstance(small, list))


def test_a_large_file_that_changed_has_another_digest_and_a_damaged_cache_is_made_anew(
    tmp_path, large
):
    tokenizer, path = make_tokenizer(), tmp_path / "rows.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n' * 300)
    first = large_prompts(path, tmp_path, tokenizer).digest()
    for file in (tmp_path / "cache").rglob("*.arrow"):
        file.write_bytes(b"damaged")
    assert large_prompts(path, tmp_path, tokenizer).digest() == first
    path.write_text(path.read_text()[:-4] + '3"}\n')
    assert large_prompts(path, tmp_path, tokenizer).digest() != first


def test_only_prompts_that_may_be_too_long_are_tokenised_before_they_are_due(tmp_path, large):
    tokenizer, path = make_tokenizer(CHAT_TEMPLATE), tmp_path / "rows.jsonl"
    rows = [{"question": "x" * (5 + n % 50), "answer": "2"} for n in range(500)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda chats, **k: seen.extend(chats) or apply(chats, **k)
    prompts = large_prompts(path, tmp_path, tokenizer)
    assert len(seen) < 400
    lengths = [len(ids) for ids in prompts.token_ids]
    assert max(lengths) <= 60
    whole = np.array([len(ids) for ids in apply([[{"role": "user", "content": r["question"]}]
                      for r in rows], tokenize=True, add_generation_prompt=True,
                      return_dict=False)])  # fmt: skip
    assert lengths == whole[whole <= 60].tolist()
