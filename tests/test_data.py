import json
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from adpo_jax import pretrained
from adpo_jax.data import folders, readers
from adpo_jax.data.dataset import Dataset
from adpo_jax.data.files import load_rows
from adpo_jax.data.order import prompt_indices
from adpo_jax.data.solutions import extract_solution

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"

ROWS = [
    {"question": "1+1?", "answer": "2", "level": 1},
    {"question": "Größe von „π“?", "answer": "3.14", "level": 2},
]


def load(source, **kwargs):
    keys = {"prompt_key": "question", "answer_key": "answer"}
    return load_rows(source if isinstance(source, list) else str(source), **keys | kwargs)


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_parquet(path, rows=ROWS):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# Sources.


def test_the_same_rows_come_from_jsonl_json_and_parquet(tmp_path):
    array = tmp_path / "array.json"
    array.write_text(json.dumps(ROWS, indent=2), "utf-8")
    files = [
        write_jsonl(tmp_path / "rows.jsonl"),
        write_jsonl(tmp_path / "lines.json"),
        write_parquet(tmp_path / "rows.parquet"),
        array,
    ]
    for file in files:
        dataset = load(file)
        assert [dataset.row(i) for i in range(len(dataset))] == ROWS, file.name


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_accepted(tmp_path):
    text = "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n\r\n  \n"
    for name, content in (("rows.jsonl", text), ("rows.json", json.dumps(ROWS))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert load(tmp_path / name).columns["answer"] == ["2", "3.14"]


def test_a_csv_may_have_blanks_in_its_header_and_any_line_ends(tmp_path):
    path = tmp_path / "rows.csv"
    for end in ("\r", "\n", "\r\n"):
        path.write_bytes(end.join(["question, answer", '"a\rb",2', "3?,4", ""]).encode())
        assert load(path).columns == {"question": ["a\rb", "3?"], "answer": ["2", "4"]}


def test_several_sources_follow_each_other_and_missing_columns_are_none(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl")
    second = write_parquet(tmp_path / "b.parquet", [{"question": "q", "answer": "a", "hint": "h"}])
    dataset = load([str(first), f" {second}"])
    assert dataset.columns["level"] == [1, 2, None]
    assert dataset.columns["hint"] == [None, None, "h"]
    assert len(dataset) == 3


def test_a_folder_gives_all_its_files_in_order_unless_they_are_named_after_splits(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name, [{"question": name, "answer": "1"}])
    (tmp_path / "README.md").write_text("no data")
    assert load(tmp_path, split="train").columns["question"] == ["a.jsonl", "b.jsonl"]

    names = ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "val.jsonl", "test.jsonl")
    splits = tmp_path / "splits"
    splits.mkdir()
    for name in names:
        write_jsonl(splits / name, [{"question": name, "answer": "1"}])
    assert load(splits, split="train").columns["question"] == list(names[:2])
    assert load(splits, split="validation").columns["question"] == ["val.jsonl"]
    assert load(splits, split="test").columns["question"] == ["test.jsonl"]
    assert len(load(splits)) == 4
    with pytest.raises(ValueError, match=r"named after the split 'extra'"):
        load(splits, split="extra")


SPLITS = {
    "gsm8k_train.jsonl": "train",
    "gsm8kTrain2.jsonl": "train",
    "train-00000-of-00002.parquet": "train",
    "test.v2.jsonl": "test",
    "MATH-TEST.jsonl": "test",
    "my dev set.jsonl": "validation",
    "constrained_latest.jsonl": None,
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_word_anywhere_in_a_files_name_says_its_split(tmp_path, name):
    others = ("z_train.jsonl", "z_test.jsonl", "z_validation.jsonl")
    for file in (name, *others):
        (tmp_path / file).touch()
    for other in others:
        split = other.removeprefix("z_").removesuffix(".jsonl")
        found = {path.name for path in folders.files_of(tmp_path, split)}
        assert found == {other} | ({name} if split == SPLITS[name] else set())


# Folders as they are laid out: the files, those of training, and those of the test.
LAYOUTS = {
    "folders of splits": (("train/part-0.jsonl", "test/part-0.jsonl"), 0, 1),
    "the Hub's data": (("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"), 0, 1),
    "one configuration": (("main/train.jsonl", "main/test.jsonl", "dataset_infos.json"), 0, 1),
    "folders in a configuration": (("main/train/0.jsonl", "main/eval/0.jsonl"), 0, 1),
    "hidden files": (("a_train.jsonl", "a_test.jsonl", "._train.jsonl", ".x/train.jsonl"), 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_read_as_the_hub_lays_it_out(tmp_path, layout):
    names, train, test = LAYOUTS[layout]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert folders.files_of(tmp_path, "train") == [tmp_path / names[train]]
    assert folders.files_of(tmp_path, "test") == [tmp_path / names[test]]


def test_a_folder_that_does_not_say_what_is_meant_is_refused(tmp_path):
    for name in (
        "c/main/train.jsonl",
        "c/socratic/train.jsonl",
        "two/train_test.jsonl",
        "no/x.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="folders main, socratic in it all have data.*c/main"):
        folders.files_of(tmp_path / "c", "train")
    with pytest.raises(ValueError, match=r"train_test.jsonl says the splits test, train; name the"):
        folders.files_of(tmp_path / "two", "train")
    (tmp_path / "no" / "linked").symlink_to(tmp_path / "c")
    with pytest.raises(ValueError, match="no/linked is a link that leaves it"):
        folders.files_of(tmp_path / "no", None)


def test_the_real_gsm8k_is_read_and_every_answer_is_a_number():
    if not GSM8K.exists():
        pytest.skip(
            "GSM8K is not part of the repository: it would be shared/data/gsm8k beside the checkout"
        )
    train, test = load(GSM8K, split="train"), load(GSM8K / "test.jsonl")
    assert (len(train), len(test)) == (7473, 1319)
    assert train.columns["question"][0].startswith("Natalia sold clips")
    for answer in train.columns["answer"] + test.columns["answer"]:
        float(extract_solution(answer))


# Hugging Face names.


def test_a_hugging_face_name_goes_to_the_datasets_package(monkeypatch):
    calls = []

    def load_dataset(name, configuration, *, split):
        calls.append((name, configuration, split))
        return iter(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load("openai/gsm8k:main").columns["answer"] == ["2", "3.14"]
    load("owner/name", split="test")
    assert calls == [("openai/gsm8k", "main", "train"), ("owner/name", None, "test")]


def test_without_the_datasets_package_the_error_gives_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "adpo-jax\[hub\]"'):
        load("openai/gsm8k")


def test_what_the_hub_says_is_passed_on(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to the Hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"owner/name is no file here.*no route to the Hub"):
        load("owner/name")


def test_local_files_do_not_import_the_datasets_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would raise
    assert len(load(write_jsonl(tmp_path / "rows.jsonl"))) == 2


# Refusals.

GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("rows.jsonl", "", r"rows\.jsonl: there are no rows"),
        ("rows.jsonl", "\n\n", r"there are no rows"),
        ("rows.json", "[]", r"there are no rows"),
        ("rows.jsonl", f"{GOOD}\n{{'a': 1}}\n", r"rows\.jsonl:2:2: not JSON: Expecting property"),
        ("rows.jsonl", f'{GOOD}\n{GOOD[:-1]}\n{GOOD}"', r"rows\.jsonl:2:\d+: not JSON"),
        ("rows.jsonl", f"{GOOD} {GOOD}", r"rows\.jsonl:1:\d+: not JSON: Extra data"),
        ("rows.jsonl", f"{GOOD}\n[1, 2]", r"rows\.jsonl:2: a row must be a JSON object.*list \[1"),
        ("rows.json", "[\n" + GOOD + ",\n" + GOOD[:-1], r"rows\.json:3:\d+: not JSON"),
        ("rows.json", f"[{GOOD}, 7]", r"rows\.json: row 2: a row must be .* got int 7"),
        ("rows.jsonl", f'{GOOD}\n{{"question": "q"}}', r":2: no column 'answer'.*data\.answer_key"),
        ("rows.jsonl", '{"prompt": "q"}', r":1: no column 'question'; the columns are 'prompt'"),
        ("rows.jsonl", '{"question": "q", "answer": null}', r":1: the column 'answer' .* is null"),
        ("rows.jsonl", '{"question": 5, "answer": "a"}', r":1: the prompt in column 'question'"),
        ("rows.jsonl", '{"question": "\\ud83d", "answer": 1}', r":1: .*half a surrogate .*ud83d"),
        ("rows.jsonl", f'{{"answer": {"9" * 5000}}}', r":1: .*than 4,300 digits; write it as text"),
        ("rows.jsonl", "[" * 200_000, r":1: not usable JSON: .*recursion"),
        ("rows.jsonl", b'\xff\xfe{\x00"\x00', r"rows\.jsonl:1:1: byte 0xff is not UTF-8"),
        ("rows.jsonl", GOOD.encode() + b'\n{"question": "\xe9"}', r"rows\.jsonl:2:15: byte 0xe9"),
        ("rows.json", b"[\n\n  \xe9]", r"rows\.json:3:3: byte 0xe9 is not UTF-8"),
        (
            "rows.jsonl",
            f'{GOOD}\n{{"answer": 1, "answer": 2}}',
            r":2: .* has the key 'answer' twice",
        ),
        ("rows.json", '[\n{"x": {"a": 1, "a": 2}}]', r"json: the object .* the key 'a' twice"),
        ("rows.json", '{"question": ["q"],\n"question": ["r"]}', r"the key 'question' twice"),
        ("rows.csv", "question, question\n1,2", r"csv:1: the header names a column twice"),
        ("rows.csv", "question;answer\n1;2", r"csv:1: .* are separated by ';'; separate them by"),
        ("rows.csv", "question\tanswer\n1\t2", r"separated by '\\t'"),
        ("rows.parquet", "no parquet", r"rows\.parquet: not a readable Parquet file"),
        ("rows.txt", "question,answer", r"rows\.txt: data files end in \.jsonl, \.json"),
    ],
)
def test_bad_files_are_refused_with_file_line_and_column(tmp_path, name, content, text):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=text):
        load(path)


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "\n" + "x" * 101)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the line is longer than 100 bytes"):
        load(path)


def test_a_missing_column_in_parquet_names_the_file_and_the_columns_there(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.parquet: row 1: no column 'solution'.*'level'"):
        load(write_parquet(tmp_path / "rows.parquet"), answer_key="solution")


def test_missing_files_empty_folders_and_no_source_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: there is no such file or folder"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"the folder has no \.jsonl, \.json, \.csv, "):
        load(tmp_path)
    with pytest.raises(ValueError, match="there are no rows"):
        load([])


def test_the_home_folder_of_nobody_is_refused():
    for source in ("~nosuchuser/rows.jsonl", "~nosuchuser/rows"):
        with pytest.raises(ValueError, match="there is no home folder ~nosuchuser here; write"):
            load(source)
        with pytest.raises(ValueError, match="there is no home folder"):
            folders.unsplit_files(source)
    with pytest.raises(ValueError, match="there is no folder '~nosuchuser/model'"):
        pretrained.load("~nosuchuser/model")


@pytest.mark.parametrize("names", ["", "rows.jsonl,", " ,rows.jsonl"])
def test_an_empty_name_is_not_the_working_folder(tmp_path, monkeypatch, names):
    write_jsonl(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="has an empty name: name a file or a folder"):
        load(names.split(","))


def test_columns_of_different_lengths_are_no_data_set():
    with pytest.raises(ValueError, match="columns of one length"):
        Dataset({"a": [1], "b": [1, 2]})
    dataset = Dataset({"a": [1, 2, 3]}).with_column("b", "xyz")
    assert dataset.select([2, 0]).columns == {"a": [3, 1], "b": ["z", "x"]}
    for name in ("c", "c.d"):
        with pytest.raises(KeyError, match=f"no column '{name}'; there are a, b"):
            dataset.column(name)


# Solutions.


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        ("She sold 48/2 = <<48/2=24>>24.\n#### 72", "72"),
        ("So much.\n#### 1,234,567", "1234567"),
        ("#### -3.5\n", "-3.5"),
        ("#### 12,34", "12,34"),
        ("#### 10\nno, wait:\n#### 11", "11"),
        ("  \\frac{1}{2} ", "\\frac{1}{2}"),
        ("#### Step 1\nAdd them.\nThe sum is 1,000.", "#### Step 1\nAdd them.\nThe sum is 1,000."),
        ("nothing follows ####", "nothing follows ####"),
        ("The point.\n#### (3,100)", "(3,100)"),
        ("#### (0,100), (0,200]", "(0,100), (0,200]"),
        ("#### \\$1,234,567 (in all)", "\\$1234567 (in all)"),
        ("1,000", "1,000"),
        (42, "42"),
        (42.0, "42"),
        (0.25, "0.25"),
        (True, "True"),
        ({"inputs": [1]}, {"inputs": [1]}),
    ],
)
def test_the_solution_of_an_answer(answer, solution):
    assert extract_solution(answer) == solution


# Order.


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 4), (7, 7), (5, 12), (1, 3), (12, 3)])
def test_every_row_comes_once_an_epoch_and_batches_run_on_into_the_next(num_rows, batch_size):
    dealt = np.concatenate(
        [prompt_indices(s, seed=3, num_rows=num_rows, batch_size=batch_size) for s in range(20)]
    )
    epochs = len(dealt) // num_rows
    for epoch in dealt[: epochs * num_rows].reshape(epochs, num_rows):
        assert Counter(epoch.tolist()) == Counter(range(num_rows))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_before():
    def order(seed, epoch):
        return prompt_indices(epoch, seed=seed, num_rows=50, batch_size=50).tolist()

    late = order(0, 1000)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(-1, 0), late]
    assert len({tuple(o) for o in orders}) == 5
    assert order(0, 1000) == late
    assert sorted(late) == list(range(50))


def test_the_order_is_the_same_on_every_machine():
    first = prompt_indices(0, seed=0, num_rows=10, batch_size=8)
    second = prompt_indices(1, seed=0, num_rows=10, batch_size=8)
    assert first.dtype == np.int64
    assert first.tolist() == [0, 2, 9, 1, 8, 5, 4, 3]
    assert second.tolist() == [6, 7, 5, 3, 7, 8, 2, 4]


def test_changing_a_returned_batch_does_not_change_the_order():
    arguments = {"seed": 0, "num_rows": 6, "batch_size": 6}
    batch = prompt_indices(0, **arguments)
    expected = batch.tolist()
    batch[:] = 0
    assert prompt_indices(0, **arguments).tolist() == expected


@pytest.mark.parametrize("bad", [{"step": -1}, {"num_rows": 0}, {"batch_size": 0}])
def test_an_impossible_order_is_refused(bad):
    arguments = {"step": 0, "num_rows": 4, "batch_size": 2} | bad
    with pytest.raises(ValueError, match="step must be at least 0"):
        prompt_indices(arguments.pop("step"), seed=0, **arguments)
