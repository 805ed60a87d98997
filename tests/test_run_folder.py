import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_config import parse

from adpo_jax.checkpoints import Checkpoints
from adpo_jax.clu_without_tensorflow import metric_writers
from adpo_jax.metrics import JsonlWriter, make_writer, read_jsonl
from adpo_jax.progress import Progress
from adpo_jax.run_folder import RunFolder


def test_a_new_folder_is_claimed_and_the_same_config_finds_it_again(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run")
    folder.check(parse())
    assert not folder.root.exists()
    folder.claim(parse())
    folder.claim(parse())
    assert not folder.has_checkpoint
    saved = json.loads(folder.config.read_text())
    assert saved["algorithm"]["num_generations"] == 8


def test_another_config_is_refused_with_every_difference(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    with pytest.raises(ValueError, match=r"data.train_batch_size: 32 -> 8\n  trainer.seed: 0 -> 1"):
        folder.check(parse("--config.trainer.seed=1", "--config.data.train_batch_size=8"))


def test_a_config_older_than_a_key_had_its_default(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(parse())
    saved = json.loads(folder.config.read_text())
    del saved["anchor"]["ema_alpha"], saved["sft"], saved["replay"]
    folder.config.write_text(json.dumps(saved))
    as_default = ("--config.sft.lr=1e-3", "--config.sft.betas=(0.9, 0.999)")
    with pytest.raises(ValueError, match=r"\n  sft.train_files: '' -> 'embedded:arithmetic'$"):
        folder.check(parse("--config.sft.steps=0", *as_default))


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
