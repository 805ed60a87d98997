"""What goes wrong in the middle of a run: updates that are not sound, full disks, changed configs,
recordings replayed."""

import dataclasses
import json
import resource
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from parsing import parse
from test_bad_input import ARITHMETIC, model, outcome, workplace  # noqa: F401  (fixtures)
from test_train import TINY, scalars, train

from adpo_jax.log import metrics
from adpo_jax.records import Completion, Completions, GradedGroups, Prompts
from adpo_jax.rewards import RewardError, Scores
from adpo_jax.rollouts import recording
from adpo_jax.run import checkpoints as checkpoints_lib
from adpo_jax.run import setup
from adpo_jax.run.checkpoints import Checkpoints, SaveError
from adpo_jax.run.exit_codes import DISK_ERROR
from adpo_jax.run.guard import Guard, TrainingStopped
from adpo_jax.update import SKIPPED

SHORT = (
    *TINY,
    "--config.sft.steps=0",
    "--config.trainer.save_freq=1",
    "--config.data.val_files=",
    "--config.data.max_val_samples=0",
)
REWARD = """
from pathlib import Path

CALLS = []

def even_length(completions, solution, **columns):
    CALLS.append(len(completions))
    value = {values}.get(len(CALLS))
    texts = [completion[0]["content"] for completion in completions]
    return [float(len(text) % 2) if value is None or i else value for i, text in enumerate(texts)]
"""


def with_reward(folder, values):
    """A reward function that gives the first completion of some iterations another reward."""
    path = folder / "reward.py"
    path.write_text(REWARD.replace("{values}", values))
    return (
        f"--config.custom_reward_function.path={path}",
        "--config.custom_reward_function.name=even_length",
    )


def digests(run, step):
    path = run / "checkpoints" / str(step) / "description" / "metadata"
    return json.loads(json.loads(path.read_text())["content"])["digests"]


# --- updates that are not sound

HUGE = "{2: 1e39}"  # finite where it is given, infinite as a float32
NAN = "{2: float('nan')}"


def test_a_bad_update_stops_the_run_with_its_batch_saved_and_the_checkpoint_before(tmp_path):
    config = parse(*SHORT, *with_reward(tmp_path, HUGE))
    with pytest.raises(TrainingStopped, match=r"iteration 2 is not sound .*000002.parquet"):
        train(config, tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints", save_freq=1, keep=3) as checkpoints:
        assert checkpoints.latest_step == 1
    graded = recording.read(tmp_path / "run" / "bad_batches", 2)
    assert len(graded) == 8
    assert not np.isfinite(graded.scores.total).all()


@pytest.mark.parametrize("values", [HUGE, NAN])
def test_a_bad_update_is_skipped_where_the_config_says_so(tmp_path, values):
    config = parse(
        *SHORT, *with_reward(tmp_path, values), "--config.trainer.on_bad_update=skip",
        "--config.trainer.save_total_limit=5",
    )  # fmt: skip
    train(config, tmp_path / "run")
    rows = scalars(tmp_path / "run")
    assert [row[SKIPPED] for row in rows] == [0.0, 1.0, 0.0, 0.0]
    run = tmp_path / "run"
    names = [name for name in digests(run, 2) if "params" in name]
    before, after = digests(run, 1), digests(run, 2)
    assert [before[name] for name in names] == [after[name] for name in names]
    assert digests(run, 3) != after
    assert recording.path_of(run / "bad_batches", 2).exists()


def test_a_reward_that_is_no_number_stops_the_run_with_the_sample(tmp_path):
    with pytest.raises(RewardError, match="the reward of sample 0 is nan"):
        train(parse(*SHORT, *with_reward(tmp_path, NAN)), tmp_path / "run")
    samples = tmp_path / "run" / "samples" / "reward_error_000002.jsonl"
    assert "completion" in json.loads(samples.read_text())


@pytest.mark.long
def test_an_anchor_that_is_too_far_away_is_a_bad_update(tmp_path):
    config = parse(
        *SHORT,
        "--config.anchor.mode=fixed",
        "--config.trainer.max_anchor_kl=1e-9",
        "--config.actor_rollout_ref.actor.optim.lr=0.1",
        "--config.trainer.on_bad_update=skip",
        "--config.trainer.max_bad_updates=2",
    )
    with pytest.raises(TrainingStopped, match=r"2 iterations in a row.*max_bad_updates is 2"):
        train(config, tmp_path / "run")


def test_the_guard_counts_over_a_resume_as_without():
    def rows(*flags):
        return [{"step": 0, "eval/accuracy": 0.0}] + [{SKIPPED: flag} for flag in flags]

    for flags, expected in (((), 0), ((1, 0), 0), ((0, 1, 1), 2), ((0.5,), 1)):
        guard = Guard("skip", limit=3)
        guard.resume(rows(*flags))
        assert guard.in_a_row == expected
    guard.check(9, {SKIPPED: 0.25}, "there")
    guard.watched = ("adpo/loss", "adpo/anchor_kl")
    with pytest.raises(TrainingStopped, match=r"\(adpo/loss nan\).*3 iterations in a row"):
        guard.check(10, {SKIPPED: 1.0, "adpo/loss": float("nan")}, "there")


def test_a_sound_update_between_bad_ones_begins_the_count_anew():
    guard = Guard("skip", limit=2)
    for flag in (1.0, 0.0, 1.0, 0.0, 1.0):
        guard.check(1, {SKIPPED: flag}, "there")
    with pytest.raises(TrainingStopped, match="2 iterations in a row"):
        guard.check(6, {SKIPPED: 1.0}, "there")


# --- the disk


def test_a_save_that_fails_costs_nothing_and_is_counted_in_the_metrics(tmp_path, monkeypatch):
    train(parse(*SHORT), tmp_path / "whole")
    original, calls = checkpoints_lib.ocp.AsyncCheckpointer.save, []

    def save(self, path, **kwargs):
        calls.append(path)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        return original(self, path, **kwargs)

    monkeypatch.setattr(checkpoints_lib.ocp.AsyncCheckpointer, "save", save)
    train(parse(*SHORT), tmp_path / "run")
    assert digests(tmp_path / "run", 4) == digests(tmp_path / "whole", 4)
    counts = [row.get("checkpoint/failures", 0) for row in scalars(tmp_path / "run")]
    assert counts == [0, 1, 2, 2]


@pytest.mark.long
def test_a_disk_that_stays_full_stops_the_run_which_goes_on_when_there_is_room(
    tmp_path, monkeypatch
):
    train(parse(*SHORT), tmp_path / "whole")
    with monkeypatch.context() as patch:
        original, calls = checkpoints_lib.ocp.AsyncCheckpointer.save, []

        def save(self, path, **kwargs):
            calls.append(path)
            if len(calls) > 2:
                raise OSError(28, "No space left on device")
            return original(self, path, **kwargs)

        patch.setattr(checkpoints_lib.ocp.AsyncCheckpointer, "save", save)
        with pytest.raises(SaveError, match=r"No space left on device; the newest whole .* is 1"):
            train(parse(*SHORT), tmp_path / "run")
    train(parse(*SHORT), tmp_path / "run")
    assert digests(tmp_path / "run", 4) == digests(tmp_path / "whole", 4)
    assert scalars(tmp_path / "run") == scalars(tmp_path / "whole")


@pytest.fixture
def small_files():
    """As on a full disk, no file can grow beyond a few pages."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failure_of_the_disk_is_one_line_and_no_traceback(tmp_path, small_files, capfd, caplog):
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=20_000) for name in "abc"}
    with Checkpoints(tmp_path / "c", save_freq=1, keep=1, max_failures=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state)
            checkpoints.wait()
        assert checkpoints.num_failures == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" could")[0] for line in lines] == [
        "WARNING: checkpoint 1",
        "WARNING: checkpoint 2",
    ]
    assert caplog.records == []


WITHOUT_CHECKPOINTS = ("--config.sft.steps=0", "--config.trainer.save_freq=-1")


@pytest.mark.parametrize(
    ("more", "outcome_then"), [((), "goes on"), (WITHOUT_CHECKPOINTS, "starts again")]
)
def test_a_full_disk_ends_the_run_with_one_line_that_says_what_to_do(
    more, outcome_then, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.JsonlWriter, "write_scalars", full)
    code, err = outcome([ARITHMETIC, *SHORT, *more, "--workdir=run"], monkeypatch, capsys)
    assert code == DISK_ERROR
    (line,) = err.splitlines()
    assert line == (
        "error: [Errno 28] No space left on device; make room for run, and the same command "
        f"{outcome_then}"
    )


# --- another config, another mesh


def test_steps_and_learning_rate_may_change_and_the_change_is_noted(tmp_path):
    run = tmp_path / "run"
    train(parse(*SHORT, "--config.trainer.total_training_steps=2"), run)
    first = (run / "export" / "model.safetensors").read_bytes()
    train(parse(*SHORT, "--config.actor_rollout_ref.actor.optim.lr=0.01"), run)
    assert (run / "export" / "model.safetensors").read_bytes() != first
    assert [row["step"] for row in scalars(run)] == [1, 2, 3, 4]
    noted = json.loads((run / "config_changes.jsonl").read_text())
    assert noted["after_iteration"] == 2
    assert set(noted["changed"]) == {
        "actor_rollout_ref.actor.optim.lr",
        "trainer.total_training_steps",
    }
    assert json.loads((run / "config.json").read_text())["trainer"]["total_training_steps"] == 4
    # As many iterations again, from the checkpoint before: the export is not taken for that policy.
    older = (run / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "4")
    train(parse(*SHORT, "--config.actor_rollout_ref.actor.optim.lr=0.1"), run)
    assert (run / "export" / "model.safetensors").read_bytes() != older


@pytest.mark.long
def test_what_the_run_is_may_not_change_unless_it_is_meant(tmp_path):
    run = tmp_path / "run"
    short = (*SHORT, "--config.trainer.total_training_steps=1")
    train(parse(*short), run)
    changed = parse(*SHORT, "--config.algorithm.tau=0.5", "--config.trainer.seed=1")
    with pytest.raises(ValueError, match=r"tau: 0.8 -> 0.5\n  trainer.seed: 0 -> 1$") as error:
        train(changed, run)
    assert "--allow_config_change" in str(error.value)
    assert "total_training_steps" not in str(error.value)
    train(changed, run, allow_config_change=True)
    assert [row["step"] for row in scalars(run)] == [1, 2, 3, 4]


@pytest.mark.long
def test_a_change_that_the_state_does_not_fit_is_refused_in_words_and_nothing_is_lost(tmp_path):
    run = tmp_path / "run"
    train(parse(*SHORT, "--config.trainer.total_training_steps=1"), run)
    changed = parse(*SHORT, "--config.anchor.mode=fixed")
    with pytest.raises(ValueError, match="another model, optimizer or anchor"):
        train(changed, run, allow_config_change=True)
    assert not (run / "damaged_checkpoints").exists()
    train(parse(*SHORT), run, allow_config_change=True)


def test_resume_never_must_and_auto(tmp_path):
    run = tmp_path / "run"
    config = parse(*SHORT, "--config.trainer.total_training_steps=1")
    with pytest.raises(ValueError, match="has no checkpoint"):
        train(config, run, resume="must")
    assert not run.exists()
    train(config, run, resume="never")
    with pytest.raises(ValueError, match="holds a run"):
        train(config, run, resume="never")
    train(config, run, resume="must")
    with pytest.raises(ValueError, match="--resume is one of auto, never, must"):
        train(config, run, resume="yes")


@pytest.mark.long
def test_another_mesh_goes_on_with_the_same_results(tmp_path):
    optim = "--config.actor_rollout_ref.actor.optim"
    constant = (
        f"{optim}.lr_scheduler_type=constant",
        f"{optim}.min_lr_ratio=0.0",
        *with_reward(tmp_path, "{}"),
    )
    run = tmp_path / "run"
    train(parse(*SHORT, *constant), tmp_path / "whole")
    train(parse(*SHORT, *constant, "--config.trainer.total_training_steps=2"), run)
    on_eight = parse(*SHORT, *constant, "--config.mesh.tensor=2")
    train(on_eight, run, build=setup.build)
    for here, there in zip(scalars(run), scalars(tmp_path / "whole"), strict=True):
        assert there["update/grad_norm"] > 0
        for row in (here, there):
            # Four streams are padded to the longest, in a program of their own.
            del row["update/padding_frac"], row["update/compiles"]
        assert here == pytest.approx(there, rel=1e-5, abs=1e-5)


# --- recordings


def test_a_replay_of_a_recording_gives_the_same_bits_without_a_sampler(tmp_path, monkeypatch):
    varied = with_reward(tmp_path, "{}")
    recorded = parse(*SHORT, *varied, "--config.trainer.rollout_data_dir=rollouts")
    train(recorded, tmp_path / "run")
    folder = tmp_path / "run" / "rollouts"
    assert sorted(p.name for p in folder.iterdir()) == [f"00000{n}.parquet" for n in range(1, 5)]
    monkeypatch.setattr("adpo_jax.rollouts.sampler.generate_and_grade", None)
    train(parse(*SHORT, *varied), tmp_path / "replayed", replay=folder)
    assert digests(tmp_path / "replayed", 4) == digests(tmp_path / "run", 4)
    assert scalars(tmp_path / "replayed") == scalars(tmp_path / "run")
    # Another loss on the same data: the same rewards, other parameters.
    other = parse(*SHORT, *varied, "--config.algorithm.adv_estimator=grpo")
    train(other, tmp_path / "grpo", replay=folder)
    assert digests(tmp_path / "grpo", 4) != digests(tmp_path / "run", 4)
    rewards = [[row["reward/mean"] for row in scalars(tmp_path / n)] for n in ("grpo", "run")]
    assert rewards[0] == rewards[1]
    # A run that replays goes on as one.
    with pytest.raises(ValueError, match="replay: "):
        train(parse(*SHORT, *varied), tmp_path / "replayed")


def test_a_recording_keeps_all_that_completions_have(tmp_path):
    """Log-probs of the whole distribution, holes, turns and the weights of each token."""
    groups = random_groups(np.random.default_rng(0))
    odd = groups.completions.map(
        lambda c: dataclasses.replace(
            c,
            trained=np.arange(len(c)) % 3 != 1,
            versions=np.arange(len(c), dtype=np.int32),
            turns=np.arange(len(c), dtype=np.int16) // 2,
            full_log_probs=c.log_probs - 0.5,
        )
    )
    recording.write(tmp_path, 1, dataclasses.replace(groups, completions=odd))
    assert_same_completions(recording.read(tmp_path, 1).completions, odd)


def assert_same_completions(found: Completions, wanted: Completions):
    for one, other in zip(found.flat, wanted.flat, strict=True):
        for field in dataclasses.fields(Completion):
            value, expected = getattr(one, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(value, expected, err_msg=field.name, strict=True)


def test_a_recording_of_version_1_is_read_as_completions_of_one_turn(tmp_path):
    groups = random_groups(np.random.default_rng(0))
    path = recording.write(tmp_path, 3, groups)
    table = pq.read_table(path).drop_columns(["trained", "versions", "turns"])
    names = ["token_ids" if name == "tokens" else name for name in table.column_names]
    info = json.loads(table.schema.metadata[b"adpo_jax"]) | {"version": 1, "max_tokens": 6}
    table = table.rename_columns(names).replace_schema_metadata({"adpo_jax": json.dumps(info)})
    pq.write_table(table, path, write_page_checksum=True)
    wanted = groups.completions.map(
        lambda c: dataclasses.replace(c, versions=np.full(len(c), 2, np.int32))
    )
    assert_same_completions(recording.read(tmp_path, 3).completions, wanted)


def test_a_recording_is_never_overwritten(tmp_path):
    config = parse(*SHORT, "--config.trainer.rollout_data_dir=r", "--config.trainer.save_freq=0")
    train(config, tmp_path / "run")
    folder = tmp_path / "run" / "r"
    graded = recording.read(folder, 1)
    before = recording.path_of(folder, 1).read_bytes()
    recording.write(folder, 1, graded)
    assert recording.path_of(folder, 1).read_bytes() == before
    graded.texts[0] += "!"
    recording.write(folder, 1, graded)
    superseded = [folder / f"000001.superseded-{number}.parquet" for number in range(2)]
    assert superseded[0].read_bytes() == before
    assert recording.read(folder, 1).texts == graded.texts
    graded.texts[0] += "!"
    recording.write(folder, 1, graded)
    second = superseded[1].read_bytes()
    superseded[0].unlink()
    graded.texts[0] += "!"
    recording.write(folder, 1, graded)
    assert superseded[1].read_bytes() == second != superseded[0].read_bytes()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "000003.parquet").unlink(), "no recording of iteration 3 .1 of this"),
        (lambda f: (f / "000003.parquet").write_bytes(b"PAR1"), "no readable recording"),
        (lambda f: [p.unlink() for p in f.iterdir()], "there: none"),
    ],
)
def test_a_recording_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, damage, words, folder_of_recordings
):
    damage(folder_of_recordings)
    with pytest.raises(ValueError, match=words):
        train(parse(*SHORT), tmp_path / "replayed", replay=folder_of_recordings)
    assert not (tmp_path / "replayed").exists()


def test_a_recording_without_rewards_that_the_loss_needs_is_refused(tmp_path, folder_of_recordings):
    each = "--config.algorithm.multi_objective_aggregation=normalize_then_sum"
    config = parse(*SHORT, "--config.algorithm.adv_estimator=grpo", each)
    with pytest.raises(ValueError, match="has no rewards of good_accuracy, which .* needs; replay"):
        train(config, tmp_path / "replayed", replay=folder_of_recordings)


LIMITS = {
    "num_prompts": 8,
    "num_samples": 2,
    "max_response_length": 6,
    "max_prompt_length": 3,
    "prompt_key": "question",
    "vocab_size": 90,
}


def test_tokens_that_the_model_does_not_embed_are_told_before_a_replay(tmp_path):
    groups = random_groups(np.random.default_rng(0))
    recording.write(tmp_path, 1, groups)
    recording.check(tmp_path, [1], **LIMITS)
    beyond = groups.completions.map(
        lambda c: dataclasses.replace(c, tokens=np.where(np.arange(len(c)) == 0, 90, c.tokens))
    )
    recording.write(tmp_path, 2, dataclasses.replace(groups, completions=beyond))
    groups.prompts.token_ids[3][1] = 95
    recording.write(tmp_path, 3, groups)
    for step, what in ((2, "completion with token 90"), (3, "prompt with token 95")):
        with pytest.raises(ValueError, match=rf"{step}.parquet has a {what}, and .* embeds 90 to"):
            recording.check(tmp_path, [1, step], **LIMITS)


def test_experts_of_a_recording_are_replayed_where_that_is_asked_for(tmp_path):
    groups = random_groups(np.random.default_rng(0))
    routed = groups.completions.map(
        lambda c: dataclasses.replace(c, experts=np.ones((len(c), 3, 2), np.uint16))
    )
    recording.write(tmp_path, 1, dataclasses.replace(groups, completions=routed))
    replayed = recording.Replay(tmp_path, 1, experts=(3, 2), **LIMITS)
    replayed.check(0)
    assert_same_completions(replayed.next(0, None).completions, routed)
    left_out = recording.Replay(tmp_path, 1, **LIMITS)
    left_out.check(0)
    assert_same_completions(left_out.next(0, None).completions, groups.completions)
    with pytest.raises(ValueError, match=r"says \[3, 2\] of .*, which are \[4, 2\] in this model"):
        recording.Replay(tmp_path, 1, experts=(4, 2), **LIMITS).check(0)
    recording.write(tmp_path, 2, groups)
    with pytest.raises(ValueError, match=r"says nothing of .*router_replay=false"):
        recording.check(tmp_path, [2], experts=(3, 2), **LIMITS)


@pytest.fixture
def folder_of_recordings(tmp_path):
    rng = np.random.default_rng(0)
    for step in range(1, 5):
        recording.write(tmp_path / "r", step, random_groups(rng))
    return tmp_path / "r"


def random_groups(rng, P=8, G=2, T=6) -> GradedGroups:
    def completion():
        length = rng.integers(1, T + 1)
        log_probs = rng.normal(-3, 1, length)
        return Completion.sampled(rng.integers(0, 90, length), log_probs, "stop")

    scores = Scores(
        rng.normal(size=P * G).astype(np.float32),
        {"a": np.where(np.arange(P * G) % 3, 1.0, np.nan).astype(np.float32)},
        {"timeouts": 0, "crashes": 0, "unparsed": 1},
    )
    texts = [f"text \u2028 {i} \ud800" for i in range(P * G)]
    prompts = Prompts(
        [rng.integers(0, 90, 3).tolist() for _ in range(P)],
        {"question": [f"q{i}" for i in range(P)], "solution": [str(i) for i in range(P)]},
    )
    completions = Completions([[completion() for _ in range(G)] for _ in range(P)])
    return GradedGroups(prompts, completions, texts, scores, (1.0, 1.0))


def test_every_bit_of_a_rollout_survives_its_recording(tmp_path):
    groups = random_groups(np.random.default_rng(1))
    recording.write(tmp_path, 7, groups)
    read = recording.read(tmp_path, 7)
    assert read.prompts == groups.prompts
    assert_same_completions(read.completions, groups.completions)
    np.testing.assert_array_equal(read.scores.total, groups.scores.total)
    np.testing.assert_array_equal(read.scores.components["a"], groups.scores.components["a"])
    assert read.scores.counts == groups.scores.counts
    assert read.texts[1] == "text \u2028 1 ?"
    assert sys.getsizeof(recording.path_of(tmp_path, 7).read_bytes()) < 20_000
