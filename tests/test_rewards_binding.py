"""Reward functions as TRL and verl write them, in this process and in a worker."""

import numpy as np
import pytest

from adpo_jax.rewards import RewardError, RewardFunction, RewardModel, TrainerState

SOURCE = '''
import asyncio

def of_trl(prompts, completions, completion_ids, level, trainer_state, log_metric, log_extra):
    """Has no **kwargs, and prompts first."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    log_metric("length", sum(map(len, texts)) / len(texts))
    log_extra("kind", [type(p).__name__ for p in prompts])
    return [len(t) + 10 * len(ids) + 100 * x + 1000 * trainer_state.global_step
            for t, ids, x in zip(texts, completion_ids, level)]

def of_text(completions, **kwargs):
    """TRL's for plain prompts."""
    return [float(c.lower().startswith("a") and c[0] == "A") for c in completions]

def of_chats(completions, **kwargs):
    """TRL's for conversational prompts."""
    return [float(c[0]["role"] == "assistant" and c[-1]["content"] == "Aha") for c in completions]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """verl's, as it stands."""
    assert isinstance(solution_str, str) and isinstance(extra_info, dict)
    right = solution_str == ground_truth
    more = {"source": data_source, "split": extra_info["split"]}
    return {"score": float(right), "acc": right} | more

def compute_other(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.0, "acc": "no"}

def compute_number(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert data_source == "" and extra_info == {}
    return 1 if solution_str == ground_truth else 0

async def compute_slowly(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.2)
    return float(solution_str == ground_truth)

async def slow(completions):
    await asyncio.sleep(0.2)
    return [2.0 for _ in completions]

def no_score(solution_str, ground_truth):
    return {"reward": 1.0}

def picky(completions, level, subject, threshold, tone="kind"):
    return [1.0 for _ in completions]

def of_numpy(solution_str, ground_truth):
    import numpy as np
    return {"score": np.float32(1), "a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)}

def any_of_verl(solution_str, **kwargs):
    return float(kwargs["data_source"] == "one") + len(kwargs["extra_info"])

def starred(*args, completions, **kwargs):
    return [1.0 for _ in completions]

def huge(solution_str, ground_truth):
    return {"score": 1.0, "seen": 7**1000}

def texts(completions):
    return "12"

def beyond(completions):
    return [10**400 for _ in completions]

def by_position(completions, /, **columns):
    return [1.0 for _ in completions]
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(SOURCE)
    return str(path)


both = pytest.mark.parametrize("num_workers", [0, 1])
CHAT = [{"role": "user", "content": "Say aha."}]


@both
def test_functions_of_trl_and_verl_work_as_they_stand(file, num_workers):
    names = ("of_trl", "of_text", "of_chats", "compute_score", "slow")
    columns = {
        "prompts": ["Say aha.", "Say aha."],
        "completion_ids": [[1, 2], [3]],
        "completion_tokens": [2, 1],
        "level": [1, 2],
        "solution": ["Aha", "oh"],
        "data_source": ["one", "two"],
        "extra_info": [{"split": "train"}, {"split": "test"}],
        "reward_model": [{"ground_truth": "Aha"}, {"ground_truth": "No"}],
    }
    functions = [RewardFunction(file, name) for name in names]
    with RewardModel(functions, num_workers=num_workers) as model:
        model.check_columns([c for c in columns if c not in ("prompts", "completion_ids",
                                                              "completion_tokens")])  # fmt: skip
        scores = model.score(["Aha", "Oh no"], columns, TrainerState(global_step=3, max_steps=9))
    found = {name: values.tolist() for name, values in scores.components.items()}
    assert found == {
        "of_trl": [3123.0, 3215.0],
        "of_text": [1.0, 0.0],
        "of_chats": [1.0, 0.0],
        "compute_score": [1.0, 0.0],
        "slow": [2.0, 2.0],
    }
    np.testing.assert_array_equal(scores.total, np.sum(list(found.values()), axis=0))
    assert np.mean(scores.logged["of_trl/length"]) == 4.0
    assert np.mean(scores.logged["compute_score/acc"]) == 0.5
    assert scores.extras == {
        "kind": ["str", "str"],
        "acc": [True, False],
        "source": ["one", "two"],
        "split": ["train", "test"],
    }


@both
def test_extras_of_two_functions_under_one_name_are_told_apart(file, num_workers):
    columns = {"data_source": ["one"], "extra_info": [{"split": "a"}], "solution": ["Aha"]}
    names = ("compute_score", "compute_score", "compute_other")
    functions = [RewardFunction(file, name) for name in names]
    with RewardModel(functions, num_workers=num_workers) as model:
        extras = model.score(["Aha"], columns).extras
    assert [extras[f"{prefix}acc"] for prefix in ("", "compute_score_2/")] == [[True], [True]]
    assert extras["compute_other/acc"] == ["no"]


@both
def test_numbers_of_numpy_in_a_dict_are_logged(file, num_workers):
    with RewardModel([RewardFunction(file, "of_numpy")], num_workers=num_workers) as model:
        logged = model.score(["Aha"], {"solution": ["Aha"]}).logged
    assert logged == {"of_numpy/a": [0.5], "of_numpy/b": [3.0], "of_numpy/c": [1.0]}


def test_completions_are_messages_where_prompts_are(file):
    with RewardModel([RewardFunction(file, "of_chats"), RewardFunction(file, "of_trl")]) as model:
        columns = {"prompts": [CHAT], "completion_ids": [[7]], "level": [0]}
        scores = model.score(["Aha"], columns)
    assert scores.total.tolist() == [1 + 13]
    assert scores.extras == {"kind": ["list"]}
    with RewardModel([RewardFunction(file, "of_text")]) as model, pytest.raises(RewardError):
        model.score(["Aha"], {"prompts": [CHAT]})  # messages have no lower()


@both
def test_verls_functions_grade_data_of_another_kind(file, num_workers):
    functions = [RewardFunction(file, "compute_number"), RewardFunction(file, "compute_slowly")]
    with RewardModel(functions, num_workers=num_workers) as model:
        model.check_columns(["question", "solution"])
        scores = model.score(["5", "6"], {"question": ["a", "b"], "solution": ["5", "5"]})
    assert scores.total.tolist() == [2.0, 0.0]


@both
def test_a_function_with_kwargs_gets_what_verl_gives_and_large_integers_are_no_fault(
    file, num_workers
):
    names = ("any_of_verl", "starred", "huge")
    columns = {"data_source": ["one"], "extra_info": [{"a": 1}], "solution": ["5"]}
    functions = [RewardFunction(file, name) for name in names]
    with RewardModel(functions, num_workers=num_workers) as model:
        scores = model.score(["5"], columns)
    assert {k: v.tolist() for k, v in scores.components.items()} == {
        "any_of_verl": [2.0],
        "starred": [1.0],
        "huge": [1.0],
    }
    assert scores.extras == {"seen": [hex(7**1000)]}


@both
@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("texts", 2, "texts.* wanted a list of . rewards, got no list"),
        ("beyond", 1, "reward of sample 0 is inf"),
    ],
)
def test_what_is_no_number_is_no_reward(file, num_workers, name, count, message):
    with (
        RewardModel([RewardFunction(file, name)], num_workers=num_workers) as model,
        pytest.raises(RewardError, match=message),
    ):
        model.score(["5"] * count, {"solution": ["5"] * count})


def test_a_dict_without_a_score_stops_the_run(file):
    with (
        RewardModel([RewardFunction(file, "no_score")]) as model,
        pytest.raises(RewardError, match='sample 0 has no "score", but reward'),
    ):
        model.score(["5"], {"solution": ["5"]})


@both
def test_a_column_that_a_function_needs_is_named_before_anything_is_sampled(file, num_workers):
    functions = [RewardFunction(file, "picky", kwargs={"threshold": 2})]
    with RewardModel(functions, num_workers=num_workers) as model:
        model.check_columns(["level", "subject", "solution"])
        with pytest.raises(
            ValueError, match=r"picky .*needs 'subject'.* there are level, solution"
        ):
            model.check_columns(["level", "solution"])
        with pytest.raises(ValueError, match="threshold is a column of the data and a keyword"):
            model.check_columns(["level", "subject", "threshold"])
        with pytest.raises(ValueError, match="has the column 'completions'.* rename the column"):
            model.check_columns(["level", "subject", "completions"])


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("by_position", {}, "completions can only be given by position"),
        ("of_text", {"prompts": []}, "prompts cannot be set in its kwargs"),
    ],
)
def test_a_function_that_cannot_be_called_by_name_is_refused(file, name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        RewardModel([RewardFunction(file, name, kwargs=kwargs)])
