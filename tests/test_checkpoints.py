"""Checkpoints: whole or not there, the saved bits or known to be damaged, kept by age and value."""

import contextlib
import gc
import json
import os
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from adpo_jax.devices.sharding import make_mesh
from adpo_jax.run import checkpoint_files
from adpo_jax.run import checkpoints as checkpoints_lib
from adpo_jax.run.checkpoint_files import CheckpointError
from adpo_jax.run.checkpoints import Checkpoints, SaveError
from adpo_jax.run.digests import digests
from adpo_jax.update import TrainState

# orbax leaves the coroutines and event loops of a restore that failed to the garbage collector, in
# all versions up to 0.12.8; what Python then says differs from one collection to the next, so every
# exception that nobody can catch is let through in this file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()  # here, where it is ignored, not at the end of the session


def state(value):
    return {
        "params": jax.random.normal(jax.random.key(value), (64, 512)),
        "half": jnp.full((8,), value, jnp.bfloat16),
        "step": jnp.int32(value),
    }


def saved(folder, steps=(1, 2, 3), **options):
    with Checkpoints(folder, save_freq=1, keep=5, **options) as checkpoints:
        for step in steps:
            sizes = {"update": [[1, 64, 128 * step, 6]]}
            checkpoints.save(step, state(step), {"eval/accuracy": step / 10}, sizes)
    return folder


def restore(folder):
    with Checkpoints(folder, save_freq=1, keep=5) as checkpoints:
        return checkpoints.restore_latest(lambda _: state(0))


def data_files(folder):
    return sorted(
        (p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 0),
        key=lambda p: p.stat().st_size,
    )


def test_a_state_comes_back_with_its_step_metrics_and_sizes_of_streams(tmp_path):
    restored = restore(saved(tmp_path / "checkpoints"))
    assert json.loads((tmp_path / checkpoint_files.FIRST).read_text()) == {"step": 1}
    assert restored.step == 3
    assert restored.metrics == {"eval/accuracy": 0.3}
    assert restored.sizes == {"update": [[1, 64, 384, 6]]}
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(3))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGES = {
    "the largest file is cut short": lambda f: data_files(f)[-1].write_bytes(
        data_files(f)[-1].read_bytes()[:100]
    ),
    "a bit of the largest file flips": lambda f: flip(data_files(f)[-1]),
    "the largest file is missing": lambda f: data_files(f)[-1].unlink(),
    "the largest file is empty": lambda f: data_files(f)[-1].write_bytes(b""),
    "the state is missing": lambda f: shutil.rmtree(f / "state"),
    "the description is missing": lambda f: shutil.rmtree(f / "description"),
    "a bit of the description flips": lambda f: flip(f / "description" / "metadata"),
    "the manifest is missing": lambda f: (f / "state" / "manifest.ocdbt").unlink(),
    "the folder is empty": lambda f: [shutil.rmtree(p) for p in f.iterdir() if p.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_moved_aside_for_the_one_before(tmp_path, damage, capfd):
    folder = saved(tmp_path / "checkpoints")
    DAMAGES[damage](folder / "3")
    restored = restore(folder)
    assert restored.step == 2
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(2))
    assert "WARNING: checkpoint 3 is damaged" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "damaged_checkpoints").iterdir()] == ["3-0"]
    # Its place is free for the same step, done again.
    with Checkpoints(folder, save_freq=1, keep=5) as checkpoints:
        assert checkpoints.save(3, state(3))
    assert restore(folder).step == 3


def test_any_flipped_byte_is_survived(tmp_path):
    """A byte in every file of a checkpoint: the state is the saved one, or the one before."""
    source = saved(tmp_path / "source", steps=(1, 2))
    names = [p.relative_to(source / "2") for p in data_files(source / "2")]
    outcomes = []
    for number, name in enumerate(names):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(source, folder)
        flip(folder / "2" / name)
        restored = restore(folder)
        jax.tree.map(np.testing.assert_array_equal, restored.state, state(restored.step))
        outcomes.append(restored.step)
    assert set(outcomes) == {1, 2}


def test_with_all_checkpoints_damaged_nothing_is_started_silently(tmp_path):
    folder = saved(tmp_path / "checkpoints", steps=(1, 2))
    for step in ("1", "2"):
        flip(data_files(folder / step)[-1])
    with pytest.raises(CheckpointError, match="every checkpoint in .* was damaged"):
        restore(folder)


@contextlib.contextmanager
def few_files(spare: int):
    """So many more files can be opened, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 50, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.dup(opened[0]))
        for descriptor in opened[len(opened) - spare :]:
            os.close(descriptor)
        yield
    finally:
        for descriptor in opened[: len(opened) - spare]:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_what_cannot_be_read_now_is_not_taken_for_damage(tmp_path, spare):
    folder = saved(tmp_path / "checkpoints")
    with Checkpoints(folder, save_freq=1, keep=5) as checkpoints:
        with few_files(spare), pytest.raises(Exception, match="(?i)too many open") as raised:
            checkpoints.restore_latest(lambda _: state(0))
        assert not isinstance(raised.value, CheckpointError)
        assert checkpoints.restore_latest(lambda _: state(0)).step == 3
    assert not (tmp_path / "damaged_checkpoints").exists()


def wrapped(cause: Exception) -> Exception:
    error = Exception("Encountered error while reading")
    error.__cause__ = cause
    return error


def no_json() -> Exception:
    """What json raises while it handles a StopIteration, which it says not to look at."""
    with pytest.raises(ValueError, match="Expecting value") as raised:
        json.loads("[")
    return raised.value


@pytest.mark.parametrize(
    ("error", "is_damage"),
    [
        (FileNotFoundError(2, "No such file"), True),
        (AssertionError(), True),
        (no_json(), True),
        (ValueError("its checksum is wrong"), True),
        (
            ValueError('DATA_LOSS: Error reading "params": CRC-32C checksum verification failed'),
            True,
        ),
        (ValueError("NOT_FOUND: Error opening: [OS error 2: ENOENT No such file]"), True),
        (ValueError("UNKNOWN: Error opening: [OS error 24: EMFILE Too many open files]"), False),
        (ValueError("RESOURCE_EXHAUSTED: no room"), False),
        (PermissionError(13, "Permission denied"), False),
        (OSError(24, "Too many open files"), False),
        (RuntimeError("can't start new thread"), False),
        (MemoryError(), False),
        (wrapped(ValueError("DATA_LOSS: CRC-32C checksum verification failed")), True),
        (wrapped(OSError(24, "Too many open files")), False),
    ],
)
def test_damage_is_what_is_missing_or_wrong(error, is_damage):
    assert checkpoint_files.is_damage(error) is is_damage


def test_a_state_of_another_shape_is_refused_and_not_taken_for_damage(tmp_path):
    saved(tmp_path)
    with (
        Checkpoints(tmp_path, save_freq=1, keep=5) as checkpoints,
        pytest.raises(CheckpointError, match=r"another model.*\['params'\]"),
    ):
        checkpoints.restore_latest(lambda _: state(0) | {"params": jnp.zeros((3, 3))})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3"]


def test_a_digest_is_the_same_on_every_mesh_and_changes_with_every_element():
    x = jax.random.normal(jax.random.key(0), (16, 8))

    def digest(x):
        return digests([x])["[0]"]

    plain = digest(x)
    for sizes in ((8, 1, 1), (2, 2, 2)):
        sharding = NamedSharding(make_mesh(*sizes), PartitionSpec("fsdp", "tensor"))
        assert digest(jax.device_put(x, sharding)) == plain
    others = [digest(x.at[i, j].add(1e-6)) for i, j in ((0, 0), (15, 7))]
    assert len({plain, *others, digest(x[::-1])}) == 4


def test_a_state_saved_on_one_mesh_is_restored_on_another(tmp_path):
    def on(mesh):
        specs = {"params": PartitionSpec("fsdp", "tensor")}
        return {
            name: jax.device_put(x, NamedSharding(mesh, specs.get(name, PartitionSpec())))
            for name, x in state(1).items()
        }

    with Checkpoints(tmp_path, save_freq=1, keep=5) as checkpoints:
        checkpoints.save(1, on(make_mesh(1, 8, 1)))
    like = on(make_mesh(2, 2, 2))
    with Checkpoints(tmp_path, save_freq=1, keep=5) as checkpoints:
        restored = checkpoints.restore_latest(lambda _: like).state
    assert restored["params"].sharding == like["params"].sharding
    jax.tree.map(np.testing.assert_array_equal, restored, like)


def test_the_best_checkpoint_is_saved_at_once_and_kept_beside_the_newest(tmp_path):
    values = {1: 0.1, 2: 0.7, 3: 0.2, 4: 0.7, 5: 0.3, 6: float("nan"), 8: 0.3}
    with Checkpoints(tmp_path, save_freq=4, keep=2, best_metric="eval/accuracy") as checkpoints:
        tried = []
        for step, value in values.items():
            metrics = {"eval/accuracy": value}
            if checkpoints.is_due(step, metrics):
                checkpoints.save(step, state(step), metrics)
                checkpoints.wait()
                tried.append(step)
        assert tried == [1, 2, 4, 8]
        assert checkpoints.steps == [2, 4, 8]


def test_metrics_that_are_found_later_count_for_the_best_and_are_restored(tmp_path):
    with Checkpoints(tmp_path, save_freq=1, keep=1, best_metric="eval/accuracy") as checkpoints:
        checkpoints.save_now(1, state(1), {"loss": 2.0})
        checkpoints.complete(1, {"loss": 2.0, "eval/accuracy": 0.7})
        checkpoints.complete(2, {"eval/accuracy": 0.9})  # there is none
        checkpoints.save_now(3, state(3), {"eval/accuracy": 0.1})
        assert checkpoints.steps == [1, 3]
    shutil.rmtree(tmp_path / "3")
    assert restore(tmp_path).metrics == {"loss": 2.0, "eval/accuracy": 0.7}


def test_a_kill_while_metrics_are_completed_leaves_the_checkpoint_as_it_was(tmp_path, monkeypatch):
    def half(path, text, **_):
        path.write_bytes(text.encode()[:9])
        raise KeyboardInterrupt

    with Checkpoints(tmp_path, save_freq=1, keep=1, best_metric="eval/accuracy") as checkpoints:
        checkpoints.save_now(1, state(1), {"loss": 2.0})
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.write_text", half)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.complete(1, {"loss": 2.0, "eval/accuracy": 0.7})
    assert restore(tmp_path).metrics == {"loss": 2.0}


def test_of_several_processes_the_first_decides_and_a_failure_of_one_is_one_of_all(
    tmp_path, monkeypatch
):
    with Checkpoints(tmp_path, save_freq=2, keep=5, max_failures=2) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints_lib.distributed, "all_gather", lambda mine: [not mine, mine])
            assert checkpoints.is_due(1)
            assert not checkpoints.is_due(2)
            assert not checkpoints.save(2, state(2))  # it is there on the first
        monkeypatch.setattr(checkpoints._checkpointer, "save", lambda *_, **__: None)
        monkeypatch.setattr(checkpoints_lib, "on_all_processes", lambda ok: False)
        assert checkpoints.save(4, state(4))
        assert checkpoints.num_failures == 1
        assert checkpoints.is_due(5)
        with pytest.raises(SaveError, match="another process could not write"):
            checkpoints.save(6, state(6))


def test_a_save_that_another_process_did_not_begin_costs_no_traceback(
    tmp_path, monkeypatch, capsys
):
    with Checkpoints(tmp_path, save_freq=2, keep=5, max_failures=9) as checkpoints:
        monkeypatch.setattr(checkpoints_lib, "on_all_processes", lambda ok: False)
        assert checkpoints.save(2, state(2))  # its files are swept while they are written

        def close():
            raise ValueError("NOT_FOUND: a file that was swept")

        monkeypatch.setattr(checkpoints._checkpointer, "close", close)
    assert "WARNING: a checkpoint was given up: NOT_FOUND" in capsys.readouterr().err


def test_of_checkpoints_that_are_equally_good_the_first_is_kept(tmp_path):
    with Checkpoints(tmp_path, save_freq=1, keep=1, best_metric="eval/accuracy") as checkpoints:
        for step, value in {1: 0.7, 2: 0.7, 3: 0.1}.items():
            checkpoints.save(step, state(step), {"eval/accuracy": value})
            checkpoints.wait()
        assert checkpoints.steps == [1, 3]


def test_what_a_killed_process_left_is_removed_and_never_taken_for_a_checkpoint(tmp_path):
    saved(tmp_path, steps=(1,))
    for name in ("2.orbax-checkpoint-tmp", "3.deleted"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    with Checkpoints(tmp_path, save_freq=1, keep=5) as checkpoints:
        assert checkpoints.steps == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def fill_disk(monkeypatch, failures: int, *, later: bool = False) -> None:
    """Lets the first few saves fail, at once or in the background."""
    checkpointer = checkpoints_lib.ocp.AsyncCheckpointer
    name = "wait_until_finished" if later else "save"
    original, left = getattr(checkpointer, name), [failures]

    def failing(self, *args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)

    if later:  # what never ends has no folder
        save = checkpointer.save
        monkeypatch.setattr(checkpointer, "save", lambda *a, **k: left[0] or save(*a, **k))
    monkeypatch.setattr(checkpointer, name, failing)


@pytest.mark.parametrize("later", [False, True])
def test_a_save_that_fails_is_tried_again_at_the_next_iteration(
    tmp_path, monkeypatch, capfd, later
):
    fill_disk(monkeypatch, 2, later=later)
    with Checkpoints(tmp_path, save_freq=4, keep=5, max_failures=3) as checkpoints:
        tried = []
        for step in range(4, 12):
            if checkpoints.is_due(step):
                checkpoints.save(step, state(step))
                checkpoints.wait()
                tried.append(step)
        assert tried == [4, 5, 6, 8]
        assert checkpoints.num_failures == 2
        assert checkpoints.steps == [6, 8]
    err = capfd.readouterr().err
    assert "checkpoint 4 could not be written" in err
    assert "(2 in a row): [Errno 28] No space left on device; trying again" in err


def test_after_so_many_failures_in_a_row_the_run_stops_with_the_last_one_whole(
    tmp_path, monkeypatch
):
    saved(tmp_path, steps=(1,))
    fill_disk(monkeypatch, 3)
    with Checkpoints(tmp_path, save_freq=1, keep=5, max_failures=3) as checkpoints:
        for step in (2, 3):
            checkpoints.save(step, state(step))
        with pytest.raises(SaveError, match=r"3 in a row.*newest whole checkpoint is 1"):
            checkpoints.save(4, state(4))
    assert restore(tmp_path).step == 1


def test_saving_at_the_end_tries_again_by_itself(tmp_path, monkeypatch):
    fill_disk(monkeypatch, 2)
    monkeypatch.setattr(checkpoints_lib.time, "sleep", lambda s: None)
    with Checkpoints(tmp_path, save_freq=0, keep=5, max_failures=3) as checkpoints:
        assert not checkpoints.is_due(1)
        checkpoints.save_now(1, state(1))
        assert checkpoints.steps == [1]


def test_a_file_that_cannot_grow_fails_the_save_and_leaves_the_folder_valid(tmp_path, capfd):
    """A limit on the size of files stands for a full disk: the real writer meets a real error."""
    large = {"x": jax.random.normal(jax.random.key(0), (256, 1024))}
    with Checkpoints(tmp_path, save_freq=1, keep=5, max_failures=3) as checkpoints:
        checkpoints.save(1, large)
        checkpoints.wait()
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            checkpoints.save(2, large)
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert checkpoints.steps == [1]
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        assert checkpoints.is_due(3)
        checkpoints.save(3, large)
        checkpoints.wait()
        assert checkpoints.steps == [1, 3]
        np.testing.assert_array_equal(
            checkpoints.restore_latest(lambda _: large).state["x"], large["x"]
        )
    assert "checkpoint 2 could not be written" in capfd.readouterr().err


def test_saves_leave_nothing_in_memory(tmp_path):
    def lists_after(steps):
        for step in steps:
            checkpoints.save(step, state(step))
        checkpoints.wait()
        gc.collect()
        return sum(type(x) is list for x in gc.get_objects())

    with Checkpoints(tmp_path, save_freq=1, keep=1) as checkpoints:
        before = lists_after(range(3))
        assert lists_after(range(3, 9)) < before + 30  # 27 a save, if tensorstore is asked


def test_a_state_without_a_reference_is_kept_as_versions_that_knew_none_kept_it(tmp_path):
    """So a run that began under such a version goes on."""
    state = TrainState(jnp.int32(1), {"w": jnp.ones(2)}, {"m": jnp.zeros(2)})
    for reference in (None, {"w": jnp.full(2, 3.0)}):
        folder, given = tmp_path / str(reference is None), state.replace(reference_params=reference)
        with Checkpoints(folder, save_freq=1, keep=2) as checkpoints:
            checkpoints.save_now(1, given)
            restored = checkpoints.restore_latest(lambda step: given).state  # noqa: B023
        metadata = (folder / "1" / "state" / "_METADATA").read_text()
        assert ("reference_params" in metadata) == (reference is not None)
        assert isinstance(restored, TrainState)
        jax.tree.map(np.testing.assert_array_equal, restored, given)
