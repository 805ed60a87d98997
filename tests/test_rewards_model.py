"""RewardModel in this process: weights, components, custom functions and their failures."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from adpo_jax.rewards import RewardError, RewardFunction, RewardModel, loop

SOURCE = """
import asyncio
import dataclasses
import time

@dataclasses.dataclass
class Length:
    value: int

def length(completions, solution, **columns):
    assert completions[0][0]["role"] == "assistant"
    return [float(Length(len(c[-1]["content"])).value) for c in completions]

def scaled(completions, solution, factor=1.0):
    return [factor] * len(completions)

async def waits(completions, solution):
    await asyncio.sleep(0.01)
    return [0.25] * len(completions)

# What belongs to the loop in which it was first used.
ONE_AT_A_TIME, CLIENT = asyncio.Semaphore(1), []

async def keeps_a_client(completions, **columns):
    loop = asyncio.get_running_loop()
    CLIENT.append(loop)

    async def ask():
        async with ONE_AT_A_TIME:
            await asyncio.sleep(0.001)
        return float(CLIENT[0] is loop)

    return list(await asyncio.gather(*(ask() for _ in completions)))

async def keeps_a_client_a_sample(data_source, solution_str, ground_truth, extra_info=None):
    return (await keeps_a_client([solution_str]))[0]

def parts(completions, solution, **columns):
    return {"even": [float(i % 2 == 0) for i, _ in enumerate(completions)],
            "level": [float(x) for x in columns["level"]]}

def skips(completions, solution):
    return [None if "skip" in c[0]["content"] else 1.0 for c in completions]

def raises(completions, solution):
    for c in completions:
        if c[0]["content"] == "bad":
            raise KeyError("no such thing")
    return [1.0] * len(completions)

CALLS = []

def fails_once(completions, solution):
    CALLS.append(len(completions))
    if len(CALLS) == 1:
        raise ConnectionError("the judge is down for a moment")
    time.sleep(0.02)
    return [1.0] * len(completions)

def too_few(completions, solution):
    return [1.0] * (len(completions) - 1)

def not_a_number(completions, solution):
    return [float("nan") if c[0]["content"] == "bad" else 1.0 for c in completions]

def a_word(completions, solution):
    return ["high"] * len(completions)

def no_list(completions, solution):
    return 1.0
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return str(path)


def score(functions, completions, **columns):
    columns.setdefault("solution", ["5"] * len(completions))
    with RewardModel(functions) as model:
        return model.score(completions, columns)


@pytest.mark.parametrize("keeps_tasks", [False, True])
def test_what_an_async_call_leaves_running_is_cancelled_unless_it_is_kept(keeps_tasks):
    ended = []

    async def leaves(seconds):
        async def rest():
            try:
                await asyncio.sleep(seconds)
            finally:
                ended.append(seconds)

        running.append(asyncio.create_task(rest()))
        await asyncio.sleep(0)

    running = []
    loop.run(leaves(0.01), keeps_tasks=keeps_tasks)
    assert ended == ([] if keeps_tasks else [0.01])
    loop.run(asyncio.sleep(0.05))
    assert ended == [0.01]
    assert running[0].cancelled() == (not keeps_tasks)


def test_the_total_is_the_weighted_sum_and_every_function_is_reported(file):
    functions = [
        RewardFunction(),
        RewardFunction(file, "length", weight=0.5),
        RewardFunction(file, "scaled", weight=2.0, kwargs={"factor": 3.0}),
        RewardFunction(file, "waits"),
    ]
    scores = score(functions, ["\\boxed{5}", "none"])
    np.testing.assert_allclose(scores.total, [1 + 4.5 + 6 + 0.25, 0 + 2 + 6 + 0.25])
    assert scores.total.dtype == np.float32
    assert list(scores.components) == ["good_accuracy", "length", "scaled", "waits"]
    np.testing.assert_array_equal(scores.components["length"], [9, 4])
    assert scores.counts == {"timeouts": 0, "crashes": 0, "unparsed": 1, "grader_faults": 0}


def test_named_parts_are_summed_and_reported(file):
    scores = score([RewardFunction(file, "parts", weight=2.0)], ["a", "b"], level=[3, 4])
    np.testing.assert_array_equal(scores.total, [8, 8])
    np.testing.assert_array_equal(scores.components["parts"], [4, 4])
    np.testing.assert_array_equal(scores.components["parts/level"], [3, 4])


def test_none_skips_a_sample_in_that_function_alone(file):
    functions = [RewardFunction(file, "skips"), RewardFunction(file, "scaled")]
    scores = score(functions, ["a", "skip"])
    np.testing.assert_array_equal(scores.total, [2, 1])
    np.testing.assert_array_equal(scores.components["skips"], [1, np.nan])


def test_a_sample_without_any_reward_stops_the_run(file):
    with pytest.raises(RewardError, match="None for sample 1") as caught:
        score([RewardFunction(file, "skips")], ["a", "skip"])
    assert caught.value.sample["completion"] == "skip"


def test_the_same_function_twice_is_told_apart(file):
    functions = [RewardFunction(file, "scaled", kwargs={"factor": f}) for f in (1.0, 2.0)]
    assert list(score(functions, ["a"]).components) == ["scaled", "scaled_2"]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", ["keeps_a_client", "keeps_a_client_a_sample"])
def test_an_async_function_keeps_its_loop_from_call_to_call(file, name, num_workers):
    data = {"solution": ["5"] * 8, "data_source": ["a"] * 8}

    async def asked_where_a_loop_runs(model):
        return model.score(["a"] * 8, data)

    for _ in range(2):  # two models, whose functions share a module in this process
        with RewardModel([RewardFunction(file, name)], num_workers=num_workers) as model:
            scores = [model.score(["a"] * 8, data) for _ in range(3)]
            with ThreadPoolExecutor(1) as thread:
                scores.append(thread.submit(model.score, ["a"] * 8, data).result())
            scores.append(asyncio.run(asked_where_a_loop_runs(model)))
        assert [s.total.tolist() for s in scores] == [[1.0] * 8] * 5


def test_a_function_that_raises_stops_the_run_with_its_traceback_and_the_sample(file):
    with pytest.raises(RewardError) as caught:
        score([RewardFunction(file, "raises")], ["good", "bad"], level=[1, 2])
    error = caught.value
    assert (error.function, error.path) == ("raises", file)
    assert error.sample == {
        "index": 1,
        "completion": "bad",
        "columns": {"level": 2, "solution": "5"},
    }
    assert 'raise KeyError("no such thing")' in error.traceback_text
    assert file in str(error)


def test_a_failure_that_passes_is_told_without_grading_everything_again(file, monkeypatch):
    monkeypatch.setattr("adpo_jax.rewards.backends._SEARCH_S", 0.1)
    started = time.monotonic()
    with pytest.raises(RewardError, match="down for a moment") as caught:
        score([RewardFunction(file, "fails_once")], ["a"] * 500)
    assert caught.value.sample is None
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "wanted a list of 2 rewards, got 1"),
        ("not_a_number", "the reward of sample 1 is nan"),
        ("a_word", "the reward of sample 0 is 'high'"),
        ("no_list", "wanted a list of 2 rewards, got no list"),
    ],
)
def test_what_is_no_reward_stops_the_run_with_the_function_name(file, name, message):
    with pytest.raises(RewardError, match=message) as caught:
        score([RewardFunction(file, name)], ["good", "bad"])
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ({"name": "nothing"}, "no built-in reward function 'nothing'; there are good_accuracy"),
        ({"path": "nowhere.py", "name": "f"}, "no file nowhere.py"),
        ({"path": "FILE", "name": "f"}, "defines no function of that name; it defines length"),
        ({"path": "FILE", "name": "scaled", "kwargs": {"factr": 1}}, "takes no keyword factr"),
        ({"path": "BROKEN", "name": "f"}, "importing .* failed: ZeroDivisionError"),
        ({"name": "good_accuracy", "kwargs": {"ngram": 1}}, "takes no keyword ngram"),
        ({"name": "good_accuracy", "kwargs": {"max_penalty": 1}}, "max_penalty <= 0"),
        ({"name": "format_reward", "kwargs": {"pattern": "(?=a)"}}, "linear time"),
        ({"weight": float("nan")}, "its weight is a finite number; given nan"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_function_that_cannot_work_is_refused_before_anything_runs(
    file, tmp_path, function, message, num_workers
):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    paths = {"FILE": file, "BROKEN": str(broken)}
    function = function | {"path": paths.get(function.get("path"), function.get("path"))}
    with pytest.raises(ValueError, match=message):
        RewardModel([RewardFunction(**function)], num_workers=num_workers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"functions": []}, "at least one"),
        ({"on_timeout": "ignore"}, "wanted 'zero' or 'stop'"),
        ({"num_workers": -1}, "wanted 0 or more"),
        ({"num_workers": 1, "timeout_s": 0.0}, "timeout_s > 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardModel(**({"functions": [RewardFunction()]} | settings))


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        ("good_accuracy", r"a built-in one is RewardFunction\(name='good_accuracy'\)$"),
        (sum, r"one of your own is RewardFunction\(path='its file.py', name='sum'\)$"),
        (3, r"given 3 in it$"),
    ],
)
def test_what_is_no_reward_function_is_refused_with_the_one_to_give(given, cure):
    with pytest.raises(ValueError, match=f"^RewardModel: functions is a list of .*{cure}"):
        RewardModel([given])


def test_columns_of_another_length_are_refused():
    with RewardModel([RewardFunction()]) as model, pytest.raises(ValueError, match="'solution'"):
        model.score(["a", "b"], {"solution": ["1"]})


def test_a_keyword_that_is_also_a_column_is_refused(file):
    function = RewardFunction(file, "scaled", kwargs={"factor": 2.0})
    with pytest.raises(RewardError, match="factor is a data column and a reward keyword"):
        score([function], ["a"], factor=[1.0])


def test_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_rewards.py").write_text("VALUE = 0.75\n")
    main = tmp_path / "uses_neighbour.py"
    main.write_text(
        "from neighbour_of_rewards import VALUE\n"
        "def f(completions, solution):\n    return [VALUE] * len(completions)\n"
    )
    np.testing.assert_array_equal(score([RewardFunction(str(main), "f")], ["a"]).total, [0.75])


def test_an_empty_batch_gives_no_rewards():
    assert score([RewardFunction()], []).total.shape == (0,)
