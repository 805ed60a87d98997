"""Generated tasks as data, and their own scorers as a reward."""

import json
import re

import pytest
from parsing import parse

from adpo_jax.data import arithmetic, files, generated
from adpo_jax.rewards import RewardFunction, RewardModel
from adpo_jax.rewards import generated as scorers
from adpo_jax.run import datasets


@pytest.fixture
def package():
    return pytest.importorskip(
        "reasoning_gym", reason="needs the extra [reasoning-gym]", exc_type=ImportError
    )


def rows(source, split="train"):
    return files.load_rows(
        source.split(","), prompt_key="question", answer_key="answer", split=split
    ).columns


# --- without the package


def test_a_value_comes_back_from_json_as_it_was():
    value = {"a": [1, (2.5, "x", None)], 3: {(1, 2): True}, "tuple": {"dict": []}}
    assert scorers.decoded(json.loads(json.dumps(generated.encoded(value)))) == value


def test_the_answer_is_what_a_completion_marks_as_such():
    for text, answer in {
        "<answer>1</answer> so <answer> 2\n3 </answer>.": "2\n3",
        "I add. #### 5": "5",
        " 7 ": "7",
        "<answer>8": "<answer>8",
        "</answer> #### 9 <answer>": "9 <answer>",
    }.items():
        assert scorers.answer_of(text) == answer


HOSTILE = [
    "__import__('os').system('touch /tmp/taken')",
    "[x for x in (1,)]",
    "open('/etc/passwd')",
    "().__class__",
    "x.real",
    "f'{1}'",
    "(lambda: 1)()",
    "'a' * 9",
    "E.__class__",
    "Function('f')(x)",
    "sin(x, evaluate=False)",
    "sin.__call__(x)",
    "'1'",
    "[1][0]",
    "(" * 500 + ")" * 500,
    "-" * 100_000 + "1",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
def test_the_evaluators_read_no_program(text):
    with pytest.raises((ValueError, SyntaxError, RecursionError, MemoryError)):
        scorers.parsed(text)
    if text != "'1'":  # which is a literal
        with pytest.raises((ValueError, SyntaxError, RecursionError, MemoryError)):
            scorers.evaluated(text)


def test_the_evaluators_agree_with_those_that_they_stand_for():
    import sympy

    for text in ("[['Q', '_'], ['_', 'Q']]", "(1, -2.5, {3: {'x'}})", "0x1f & ~3 | 1 << 4", "7//2"):
        assert scorers.evaluated(text) == eval(text)
    x = sympy.Symbol("x")
    for text in ("x**2/2 + 3*x - C", "exp(-x)*sin(2*x) + sqrt(pi)*log(x)", "0.5*x**(1/2)"):
        names = {"x": x, "C": sympy.Symbol("C")}
        assert scorers.parsed(text, local_dict=names) == sympy.parse_expr(text, local_dict=names)


def test_a_task_whose_column_is_broken_is_refused_in_words(package):
    good = rows("reasoning_gym:chain_sum?size=1")["reasoning_gym"][0]
    task = json.loads(good)
    bad = [
        "x",
        "[]",
        "{}",
        None,
        "[" * 100_000,
        json.dumps(task | {"task": "nothing"}),
        json.dumps(task | {"options": {"dict": [["x", 1]]}}),
        json.dumps(task | {"entry": {"list": [1]}}),
        json.dumps(task | {"entry": {"dict": []}}),
    ]
    for column in bad:
        with pytest.raises(ValueError, match="holds no task of this package"):
            scorers.reasoning_gym(["1"], reasoning_gym=[column])


# --- data


def test_a_source_that_there_is_not_is_named_in_the_refusal(package):
    source = "reasoning_gym:chain_sums"
    with pytest.raises(ValueError, match=f"{source}: there is no task 'chain_sums'"):
        rows(source)


def test_a_source_gives_the_same_rows_everywhere_and_others_to_an_evaluation(package):
    source = "reasoning_gym:isomorphic_strings?size=8"
    # Its words depend on the order of a set, which differs from process to process.
    twice = rows(f"{source},{source}&seed=1")["question"]
    assert twice[8:15] == twice[1:8]
    assert len(set(twice)) == 9
    assert not set(twice) & set(rows(source, "test")["question"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("chain_sums", r"no task 'chain_sums'; there are, among others, chain_sum,"),
        ("chain_sum?max_term=3", r"no option 'max_term' \(the nearest is 'max_terms'\)"),
        ("chain_sum?max_terms=few", "max_terms is like 6; given 'few'"),
        ("chain_sum?max_terms=1&max_terms=2", "max_terms is like 6; given '1, 2'"),
        ("chain_sum?allow_negation=maybe", "allow_negation is like False; given 'maybe'"),
        ("chain_sum?min_terms=9", "refuses these options: max_terms must be"),
        ("chain_sum?size=0", "size is 1 to 1000000; given 0"),
        ("chain_sum?size", "options are name=value; given 'size'"),
        ("codeio", "runs the programs of its data"),
        ("composite", "with commas"),
    ],
)
def test_sources_that_there_are_not_are_refused(package, source, message):
    name, _, query = source.partition("?")

    def generate():
        texts = generated.options_of(source, query)
        return list(generated._generate(name, {"size": ["1"], "seed": ["0"]} | texts))

    with pytest.raises(ValueError, match=message):
        generate()


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    absent = "raise ModuleNotFoundError('absent', name='reasoning_gym')"
    (tmp_path / "reasoning_gym.py").write_text(absent)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"reasoning_gym is missing: pip install 'adpo-jax\["):
        generated.rows("reasoning_gym:chain_sum?size=1", "train")


# --- reward


def test_the_reward_is_that_of_the_tasks_own_scorer(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["chain_sum?max_digits=1&", "countdown?", "spiral_matrix?", "arc_agi?"]
    data = rows(",".join(f"reasoning_gym:{name}size=2" for name in names))
    assert all(len(term) == 1 for term in re.findall(r"\d+", data["question"][0]))
    columns = {"reasoning_gym": data["reasoning_gym"]}
    right = [f"I think. <answer>{answer}</answer>" for answer in data["answer"]]
    marker = "__import__('pathlib').Path('taken').touch()"
    with pytest.raises(ValueError, match="num_workers above 0"):
        RewardModel([RewardFunction(name="reasoning_gym")])
    with RewardModel([RewardFunction(name="reasoning_gym")], num_workers=1, timeout_s=60) as model:
        model.check_columns([*data, "solution"])
        assert model.score(right, columns).total.tolist() == [1.0] * len(right)
        wrong = model.score([f"<answer>{marker}</answer>"] * len(right), columns)
    assert max(wrong.total) < 0.1
    assert list(tmp_path.iterdir()) == []  # what the model wrote did not run
    one = package.create_dataset("chain_sum", size=1, seed=0, max_digits=1)
    assert one[0]["question"] == data["question"][0]


def test_a_config_names_tasks_for_training_and_evaluation(package):
    config = parse(
        "--config.data.train_files=reasoning_gym:chain_sum?size=6&max_terms=2",
        "--config.data.val_files=sums=reasoning_gym:chain_sum?size=3,own=reasoning_gym:lcm?size=2",
        "--config.data.max_prompt_length=200",
    )
    tokenizer = arithmetic.make_tokenizer()
    source = config.data.train_files
    prompts = datasets.load_prompts(config, tokenizer, source, split="train")
    assert len(prompts) == 6
    assert prompts.columns["solution"] == prompts.columns["answer"]
    val = datasets.load_val_prompts(config, tokenizer)
    assert len(val) == 5
    assert set(prompts.columns["question"]).isdisjoint(val.columns["question"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the package leaves files open
def test_every_task_scores_its_own_answer_and_runs_no_answer(package, tmp_path, monkeypatch):
    from reasoning_gym.factory import DATASETS

    monkeypatch.chdir(tmp_path)
    names = sorted(DATASETS.keys() - generated.REFUSED.keys())
    assert len(names) >= 100
    marker = "__import__('pathlib').Path('taken').touch()"
    unsolved = []
    for name in names:
        (row,) = generated.rows(f"reasoning_gym:{name}?size=1", "train")
        column = [row["reasoning_gym"]]
        (score,) = scorers.reasoning_gym([f"<answer>{row['answer']}</answer>"], column)
        if score != 1.0:
            unsolved.append(name)
        assert row["question"]
        for hostile in (marker, f"[{marker}]", f"[[{marker}]]", f"({marker})"):
            (score,) = scorers.reasoning_gym([hostile], column)
            if name != "game_of_life_halting":  # whose scorer takes any text
                assert score < 0.5, name
    assert list(tmp_path.iterdir()) == []
    # Where any answer that keeps the rules is right, none is given.
    assert set(unsolved) <= {"boxnet", "graph_color", "propositional_logic", "rubiks_cube",
                             "rush_hour"}  # fmt: skip
