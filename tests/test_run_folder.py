import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parsing import parse

from adpo_jax import pretrained
from adpo_jax.log.clu_without_tensorflow import metric_writers
from adpo_jax.log.metrics import JsonlWriter, make_writer, read_jsonl
from adpo_jax.log.progress import Progress
from adpo_jax.run.checkpoints import Checkpoints
from adpo_jax.run.folder import NAMES, RunFolder


def test_a_new_folder_is_claimed_and_the_same_config_finds_it_again(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run")
    folder.check(parse())
    assert not folder.root.exists()
    folder.claim(parse())
    folder.claim(parse())
    assert not folder.has_checkpoint
    saved = json.loads(folder.config.read_text())
    assert saved["algorithm"]["num_generations"] == 8


def test_a_folder_is_claimed_that_is_a_mount_point_or_the_working_one(tmp_path, monkeypatch):
    root = tmp_path / "disk"
    (root / "lost+found").mkdir(parents=True)
    (root / ".config.json.tmp").write_text("{")  # a claim was killed here
    monkeypatch.chdir(root)
    for folder in (RunFolder("."), RunFolder(root)):
        folder.check(parse())
        folder.claim(parse())
        folder.release()
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]
    assert {path.name for path in root.iterdir()} == {"config.json", "lost+found", "samples"}
    (tmp_path / "another" / "lost+found").mkdir(parents=True)
    (tmp_path / "another" / "notes").write_text("")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        RunFolder(tmp_path / "another").check(parse())


def test_a_claim_writes_on_the_file_system_of_its_folder(tmp_path, monkeypatch):
    renamed = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (renamed.append(a), real(*a)))
    RunFolder(tmp_path / "run").claim(parse())
    assert renamed
    assert all(before.parent == after.parent for before, after in renamed)


def test_another_config_is_refused_with_every_difference(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    with pytest.raises(ValueError, match=r"data.train_batch_size: 32 -> 8\n  trainer.seed: 0 -> 1"):
        folder.check(parse("--config.trainer.seed=1", "--config.data.train_batch_size=8"))


def test_the_type_of_the_optimizers_moments_says_what_the_run_is(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    optim = "--config.actor_rollout_ref.actor.optim"
    folder.check(parse(f"{optim}.lr=0.5", f"{optim}.betas=(0.5, 0.9)"))
    with pytest.raises(ValueError, match=r"optim.mu_dtype: 'float32' -> 'bfloat16'$"):
        folder.check(parse(f"{optim}.mu_dtype=bfloat16"))


def test_recordings_lie_beside_all_that_a_run_writes(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for name in (*NAMES, "metrics.jsonl/x", "surplus/deep", ".", "./", ".hidden", "./export"):
        with pytest.raises(ValueError, match="rollout_data_dir is a folder of its own"):
            folder.check(parse(f"--config.trainer.rollout_data_dir={name}"))
    for name in ("rollouts", "samples_of_rollouts", "a/export"):
        folder.check(parse(f"--config.trainer.rollout_data_dir={name}"))
    assert not folder.root.exists()


CONTENTS = {"train_prompts": "3 prompts, sha256 a", "reward_files": "r.py: sha256 b"}
DEMONSTRATIONS = {"demonstrations": "9 prompts, sha256 c"}


def test_other_contents_of_the_same_files_are_refused_once_they_have_been_used(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse(), contents=CONTENTS | DEMONSTRATIONS)
    grown = CONTENTS | {"train_prompts": "4 prompts, sha256 d"}
    other = DEMONSTRATIONS | {"demonstrations": "8 prompts, sha256 e"}
    refused = {-1: [other], 0: [], 1: [grown]}
    for step in (-1, 0, 1):
        (folder.checkpoints / str(step)).mkdir(parents=True)
        for contents in (grown, other):
            if contents in refused[step]:
                with pytest.raises(ValueError, match=r"prompts, sha256 .' -> '. prompts, sha256"):
                    folder.check(parse(), contents=contents)
                folder.check(parse(), contents=contents, allow_config_change=True)
            else:
                folder.check(parse(), contents=contents)
    before = folder.config.read_bytes()
    with pytest.raises(ValueError, match=r"\n  contents.train_prompts: '3 .*' -> '4 prompts, sh"):
        folder.claim(parse(), contents=grown)
    assert folder.config.read_bytes() == before
    folder.claim(parse(), contents=grown, allow_config_change=True)
    assert json.loads(folder.config.read_text())["contents"] == grown
    noted = json.loads((folder.root / "config_changes.jsonl").read_text())
    assert list(noted["changed"]) == ["contents.train_prompts"]


def test_adapters_that_were_trained_go_on_under_their_own_alpha(tmp_path):
    folder = RunFolder(tmp_path / "run")
    ours, other = ({"adapters": json.dumps({"rank": 2, "alpha": a})} for a in (8.0, 64.0))
    folder.claim(parse(), contents=ours)
    folder.check(parse(), contents=other)
    for step in (-50, 0):  # a cold start has trained them too
        (folder.checkpoints / str(step)).mkdir(parents=True)
        folder.check(parse(), contents=ours)
        with pytest.raises(ValueError, match=r"contents\.adapters"):
            folder.check(parse(), contents=other)


def test_what_a_killed_export_left_goes_with_the_next_claim(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    for name in ("export", "adapter"):
        for state in ("writing", "replaced"):
            (folder.root / f".{name}.{state}-1").mkdir()
    folder.claim(parse())
    assert not list(folder.root.glob(".[ea]*"))


def test_a_run_older_than_its_digests_goes_on_and_gets_them(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    saved = json.loads(folder.config.read_text())
    del saved["contents"]
    folder.config.write_text(json.dumps(saved))
    (folder.checkpoints / "1").mkdir(parents=True)
    folder.claim(parse(), contents=CONTENTS)
    assert json.loads(folder.config.read_text())["contents"] == CONTENTS
    assert not (folder.root / "config_changes.jsonl").exists()


def test_an_environment_may_move_to_another_address_and_neither_come_nor_go(tmp_path):
    alone, there, moved = (
        parse(*(f"--config.environment.url=http://me:secret@{at}/" for at in addresses))
        for addresses in ((), ("a:9000",), ("b:9000",))
    )
    for name, first, other in (("gone", there, alone), ("come", alone, there)):
        folder = RunFolder(tmp_path / name)
        folder.claim(first)
        with pytest.raises(ValueError, match=r"\n  environment.url: '.*' -> '") as error:
            folder.check(other)
        assert "secret" not in str(error.value)
        folder.check(other, allow_config_change=True)
    folder = RunFolder(tmp_path / "moved")
    folder.claim(there)
    folder.claim(moved)
    noted = json.loads((folder.root / "config_changes.jsonl").read_text())
    assert list(noted["changed"]) == ["environment.url"]
    # One that is older than the key had no environment elsewhere.
    folder = RunFolder(tmp_path / "older")
    folder.claim(alone)
    saved = json.loads(folder.config.read_text())
    del saved["environment"]["url"]
    folder.config.write_text(json.dumps(saved))
    folder.check(alone)
    with pytest.raises(ValueError, match="environment.url: '' -> 'http"):
        folder.check(there)


def test_a_run_goes_on_whose_config_lacks_what_is_no_secret_any_more(tmp_path):
    path = "/hub/models--a--b/snapshots/" + "0a1b2c3d" * 5
    here = parse(f"--config.actor_rollout_ref.model.path={path}")
    folder = RunFolder(tmp_path / "run")
    folder.claim(here)
    text = folder.config.read_text()
    assert path in text
    folder.config.write_text(text.replace("0a1b2c3d" * 5, "<redacted>"))
    folder.claim(here)
    assert folder.config.read_text() == text
    with pytest.raises(ValueError, match=r"model.path: '.*3d' -> '.*4e'"):
        folder.check(parse(f"--config.actor_rollout_ref.model.path={path[:-2]}4e"))


def edited(folder, **values):
    """The folder of a run with other values in its config."""
    folder.claim(parse())
    folder.config.write_text(json.dumps(json.loads(folder.config.read_text()) | values))
    return folder


@pytest.mark.parametrize("contents", [None, [], "x"])
def test_digests_that_are_none_are_taken_as_unknown(tmp_path, contents):
    folder = edited(RunFolder(tmp_path / "run"), contents=contents)
    folder.claim(parse())
    folder.claim(parse(), contents=CONTENTS)
    assert json.loads(folder.config.read_text())["contents"] == CONTENTS


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": None}, "data must be a section, given None"),
        ({"trainer": "x"}, "trainer must be a section, given 'x'"),
        ({"data": {"prompt_template": 5}}, "data.prompt_template must be a text, given 5"),
        ({"actor_rollout_ref": []}, r"actor_rollout_ref must be a section, given \[\]"),
    ],
)
def test_a_model_of_a_run_whose_config_was_edited_is_refused_in_a_sentence(tmp_path, values, words):
    folder = edited(RunFolder(tmp_path / "run"), **values)
    with pytest.raises(ValueError, match=rf"config\.json: {words}; put back"):
        pretrained.load(folder.root)
    with pytest.raises(ValueError, match="holds a run with another config"):
        folder.check(parse())


@pytest.mark.parametrize("note", ["[]", "5", '{"iterations": "x", "state": 5}', "null"])
def test_a_note_of_an_export_that_is_none_is_no_note(tmp_path, note):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    folder.export.mkdir()
    (folder.export / "adpo_jax.json").write_text(note)
    assert (folder.exported_step, folder.exported_state) == (None, None)
    folder.check(parse())


def test_a_config_older_than_a_key_had_its_default(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    saved = json.loads(folder.config.read_text())
    del saved["anchor"]["ema_alpha"], saved["sft"], saved["replay"]
    folder.config.write_text(json.dumps(saved))
    as_default = ("--config.sft.lr=1e-3", "--config.sft.betas=(0.9, 0.999)")
    with pytest.raises(ValueError, match=r"\n  sft.train_files: '' -> 'embedded:arithmetic'$"):
        folder.check(parse("--config.sft.steps=0", *as_default))


@pytest.mark.parametrize("name", ["adpo", "dapo", "dr_grpo"])
def test_a_config_older_than_a_derived_default_had_what_its_other_keys_derive(tmp_path, name):
    config = parse(f"--config.algorithm.adv_estimator={name}")
    folder = RunFolder(tmp_path / "run")
    folder.claim(config)
    saved = json.loads(folder.config.read_text())
    common = ("adv_estimator", "num_generations")
    saved["algorithm"] = {key: saved["algorithm"][key] for key in common}
    del saved["actor_rollout_ref"]["actor"]["ppo_mini_batch_size"]
    folder.config.write_text(json.dumps(saved))
    folder.check(config)
    folder.claim(config)
    with pytest.raises(ValueError, match=r"algorithm.sampler_correction: 'none' -> 'truncate'"):
        folder.check(
            parse(
                f"--config.algorithm.adv_estimator={name}",
                "--config.actor_rollout_ref.rollout.cache_dtype=int8",
            )
        )


LOSSES = {
    "the checkpoints were damaged": (
        lambda root: (
            (root / "damaged_checkpoints" / "4-0").mkdir(parents=True),
            (root / "checkpoints").mkdir(),
        ),
        "all its checkpoints were damaged and lie in",
    ),
    "the checkpoints were removed": (
        lambda root: shutil.rmtree(saved(root / "checkpoints")),
        "it has had checkpoints",
    ),
    "the folder of the checkpoints was emptied": (
        lambda root: [shutil.rmtree(p) for p in saved(root / "checkpoints").iterdir()],
        "it has had checkpoints",
    ),
    "the export alone is left": (
        lambda root: (RunFolder(root).export.mkdir(), RunFolder(root).note_export(4, "")),
        "it has exported its policy",
    ),
}


def saved(folder):
    with Checkpoints(folder, save_freq=1, keep=1) as checkpoints:
        checkpoints.save(0, state(0))
    return folder


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_whose_state_is_lost_does_not_start_again_silently(tmp_path, loss):
    lose, words = LOSSES[loss]
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    folder.check(parse())
    lose(folder.root)
    for resume in ("auto", "must"):
        with pytest.raises(ValueError, match=f"{words}.* remove the folder"):
            folder.check(parse(), resume=resume)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    writer = JsonlWriter(folder.metrics)
    writer.write_scalars(3, {"a": 1.0})
    writer.close()
    (folder.checkpoints / "0.orbax-checkpoint-tmp").mkdir(parents=True)
    folder.check(parse())


def test_a_run_older_than_the_note_of_its_first_checkpoint_gets_it_when_it_goes_on(tmp_path):
    note = saved(tmp_path / "checkpoints").with_name("first_checkpoint.json")
    note.unlink()
    with Checkpoints(tmp_path / "checkpoints", save_freq=1, keep=1) as checkpoints:
        checkpoints.restore_latest(lambda _: state(0))
    assert json.loads(note.read_text()) == {"step": 0}


def test_samples_hold_whatever_a_model_wrote(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    hostile = ["\ud800 lone surrogate", "\x00", 'quote " and \\', "line\nbreak\u2028"]
    folder.write_samples("train_000001", [{"completion": text} for text in hostile])
    lines = (folder.samples / "train_000001.jsonl").read_bytes().split(b"\n")[:-1]
    assert len(lines) == len(hostile)
    assert [json.loads(line)["completion"] for line in lines][1:] == hostile[1:]


def test_metrics_rows_beyond_a_resume_are_taken_back_and_a_torn_line_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(4):
        writer.write_scalars(step, {"a": np.float32(step / 2), "bad": float("nan")})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 4, "a"')
    writer = JsonlWriter(path, purge_step=2)
    writer.write_scalars(2, {"a": 9})
    writer.close()
    rows = read_jsonl(path)
    assert [(row["step"], row["a"]) for row in rows] == [(0, 0.0), (1, 0.5), (2, 9)]
    assert rows[0]["bad"] is None


def test_metrics_touched_by_hand_are_read_but_for_the_lines_that_hold_no_row(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "a": step}).encode() for step in range(4)]
    bad = [b"", b'{"step": 1, "a', b'{"step": "\xff"}', b"[1]", b'{"a": 5}', b'{"step": null}']
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([*rows[:1], *bad, *rows[1:], b""]))
    JsonlWriter(path, purge_step=2).close()
    assert [(row["step"], row["a"]) for row in read_jsonl(path)] == [(0, 0), (1, 1)]
    for number in range(2, 6):
        assert f"metrics.jsonl: line {number} holds no JSON object" in caplog.text
    assert "metrics.jsonl: 2 rows without a step are left out" in caplog.text


def test_the_writer_is_clus_and_writes_both_kinds(tmp_path):
    writer = make_writer(tmp_path)
    assert isinstance(writer, metric_writers.MetricWriter)
    writer.write_scalars(1, {"reward/mean": jnp.float32(0.5)})
    writer.write_texts(1, {"sample": "text"})
    writer.write_histograms(1, {"lengths": np.arange(5)})
    writer.write_images(1, {"picture": np.zeros((4, 4, 3), np.uint8)})
    writer.write_hparams({"tau": 0.8})
    writer.close()
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["reward/mean"] == 0.5
    events = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    for name in (b"reward/mean", b"sample", b"lengths", b"picture"):
        assert name in events


def test_progress_prints_plain_lines_with_what_is_left_and_markup_as_it_is(capsys):
    with Progress("iteration", total=4, done=2) as progress:
        progress.update(3, "reward 0.5")
        progress.print("[bold]not markup[/bold]")
    out = capsys.readouterr().out
    assert "iteration 3/4  reward 0.5  eta 0:0" in out
    assert "[bold]not markup[/bold]" in out


def state(value):
    return {"params": jnp.full((4,), value), "step": jnp.int32(value)}


def test_checkpoints_keep_the_newest_and_restore_it(tmp_path):
    with Checkpoints(tmp_path, save_freq=2, keep=2) as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(ValueError, match="no checkpoint in"):
            checkpoints.restore_latest(lambda _: state(0))
        due = [checkpoints.is_due(step) for step in range(1, 7)]
        assert due == [False, True, False, True, False, True]
        for step in (2, 4, 6):
            assert checkpoints.save(step, state(step))
        assert not checkpoints.save(6, state(0))  # never overwritten
    with Checkpoints(tmp_path, save_freq=2, keep=2) as checkpoints:
        assert checkpoints.latest_step == 6
        restored = checkpoints.restore_latest(lambda _: state(0))
        np.testing.assert_array_equal(restored.state["params"], 6.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "6"]


def test_a_saved_state_outlives_the_donation_of_its_buffers(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    current = state(1)
    with Checkpoints(tmp_path, save_freq=1, keep=5) as checkpoints:
        for step in range(3):
            checkpoints.save(step, current)
            current = advance(current)
    with Checkpoints(tmp_path, save_freq=1, keep=5) as checkpoints:
        np.testing.assert_array_equal(
            checkpoints.restore_latest(lambda _: state(0)).state["params"], 3.0
        )
