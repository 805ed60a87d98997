"""Weights on their way from a trainer to its samplers, by HTTP or through a folder."""

import json
import os
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from adpo_jax.rollouts import weights
from adpo_jax.rollouts.dispatch import Dispatch
from adpo_jax.rollouts.elsewhere import Reception
from adpo_jax.rollouts.weights import Manifest, Unreadable, Versions, WeightsFolder
from adpo_jax.rollouts.wire import WireError
from adpo_jax.run import roles, sampler_line
from adpo_jax.serve.samplers import SamplersHost

KEY = "a key, schlüssel"


def tree(embed=0.0, up=0.0):
    """Weights of several dtypes, some of which stay; the names of their leaves are NAMES."""
    return {
        "embed": np.full((50, 7), embed, ml_dtypes.bfloat16),
        "layers": {"up": np.full((3, 5), up, np.float32), "none": np.zeros((0, 4), np.float32)},
        "scale": np.array(2.5, np.float32),
    }


EMBED, UP, NONE, SCALE = "['embed']", "['layers']['up']", "['layers']['none']", "['scale']"
ABSTRACT = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree()))


class Trainer:
    """What a trainer offers, by a server; `line` is a sampler's to it."""

    def __init__(self, folder=None):
        shared = WeightsFolder(str(folder), lambda: "run-1") if folder else None
        self.versions = Versions(shared)
        tells = {"whole_calls": True, "weights": str(folder or "")}
        self.reception = Reception(Dispatch(lease_s=30.0), self.versions, {}, tells, {})
        self.host = SamplersHost(self.reception, host="127.0.0.1", port=0, key=KEY)
        self.host.start()
        self.lines = []

    def close(self):
        for line in self.lines:
            line._client.close()
        self.host.close()

    def stranger(self, folder=""):
        self.lines.append(sampler_line.Line(self.host.address, KEY, {}, ABSTRACT, folder=folder))
        return self.lines[-1]

    def line(self, folder=""):
        line = self.stranger(folder)
        assert line._say_hello()
        assert line.inbox.get(timeout=10) == ("reset",)
        return line


@pytest.fixture(params=["http", "folder"])
def trainer(request, tmp_path):
    made = Trainer(tmp_path if request.param == "folder" else None)
    yield made
    made.close()


@pytest.fixture
def by_folder(tmp_path):
    made = Trainer(tmp_path)
    yield made
    made.close()


def fetched(line, version):
    """The tensors that come, by name."""
    assert line.fetch(version)
    kind, number, arrays = line.inbox.get(timeout=10)
    assert (kind, number) == ("weights", version)
    return arrays


def assert_same(found, wanted):
    for name, array in weights.by_name(wanted).items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_weights_come_bit_by_bit_and_later_ones_only_as_far_as_they_have_changed(trainer):
    trainer.versions.add(0, tree(embed=0.5, up=1.0))
    line, late = trainer.line(), trainer.line()
    held = fetched(line, 0)
    assert held.keys() == {EMBED, UP, NONE, SCALE}
    trainer.versions.add(1, tree(embed=0.5, up=2.0))
    arrived = fetched(line, 1)
    assert arrived.keys() == {UP}
    assert_same(held | arrived, tree(embed=0.5, up=2.0))
    trainer.versions.add(2, tree(embed=0.5, up=2.0))
    assert fetched(line, 2) == {}
    trainer.versions.add(3, tree(embed=0.25, up=1.0))
    assert_same(held | fetched(line, 3), tree(embed=0.25, up=1.0))
    assert_same(fetched(late, 3), tree(embed=0.25, up=1.0))
    assert not late.fetch(0)  # which is gone, since there are newer ones
    # A trainer that has started again finds a sampler without any.
    assert line._say_hello()
    assert line.inbox.get(timeout=10) == ("reset",)
    assert fetched(line, 3).keys() == {EMBED, UP, NONE, SCALE}


def test_two_versions_share_the_memory_of_what_is_equal_and_keep_what_the_update_overwrites():
    versions, params = Versions(), tree(embed=0.5)
    versions.add(0, jax.tree.map(lambda x: x.view(), params))  # as those of a device are
    params["layers"]["up"][:] = 1.0
    versions.add(1, jax.tree.map(lambda x: x.view(), params))
    (old_embed, old_up), (embed, up) = (versions.tensors(v, [EMBED, UP]) for v in (0, 1))
    assert np.shares_memory(np.asarray(old_embed), np.asarray(embed))
    assert not any(old_up.tobytes())
    assert np.frombuffer(up, np.float32).tolist() == [1.0] * 15
    versions.add(2, params)
    assert versions.tensors(0, [EMBED]) is versions.manifest(0) is None
    assert versions.tensors(2, ["another"]) is None


def test_weights_of_another_model_and_what_is_no_manifest_are_refused():
    versions = Versions()
    versions.add(0, tree())
    content = versions.manifest(0)
    for other in ({"a": 1.0}, ABSTRACT | {"scale": jnp.zeros(4)}, ABSTRACT | {"scale": 1}):
        with pytest.raises(WireError, match="weights of another model"):
            Manifest.read(content, jax.eval_shape(lambda other=other: other))
    good = json.loads(content)
    tensor = good["tensors"][UP]
    bad = [b"", b"\xff", b"[]", b"[" * 100_000, b"null", b"{}"]
    for changed in ({"file": "../a.safetensors"}, {"file": "a/b"}, {"file": 1}, {"tensors": 1}):
        bad.append(json.dumps(good | changed).encode())
    for changed in ({"digest": 1}, {"at": -1}, {"at": 1 << 70}, {"at": "1"}, {"shape": 3}):
        broken = good["tensors"] | {UP: tensor | changed}
        bad.append(json.dumps(good | {"tensors": broken}).encode())
    for text in bad:
        with pytest.raises(WireError, match="no manifest of weights"):
            Manifest.read(text, ABSTRACT)


def test_a_folder_keeps_two_versions_and_what_is_not_the_runs_own(tmp_path):
    strange = ["run-2-000000.safetensors", ".run-2-000001.safetensors.ab", "run-1.safetensors"]
    for name in (*strange, "run-1-000007.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".run-1-000008.safetensors.0123abcd").mkdir()  # of a trainer that was killed
    (tmp_path / ".run-1-000008.safetensors.0123abcd" / ".tmpQ").write_bytes(b"half")
    (tmp_path / "elsewhere").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "pipe")
    versions = Versions(WeightsFolder(str(tmp_path), lambda: "run-1"))
    for version in range(4):
        versions.add(version, tree(up=version))
    own = ["run-1-000002.safetensors", "run-1-000003.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*strange, *own, "elsewhere", "pipe"]
    )
    newest = safetensors.numpy.load_file(tmp_path / own[1])
    assert newest[UP].tolist() == tree(up=3.0)["layers"]["up"].tolist()
    (tmp_path / "plain").touch()
    assert (tmp_path / own[1]).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_run_has_a_name_of_its_own_which_stays(tmp_path):
    folders = [tmp_path / name / "in_flight" for name in ("one run!", "another", "one run!")]
    first, other, again = map(weights.name_of_run, folders)
    assert first == again != other
    assert first.startswith("one_run_-")
    copied = tmp_path / "copies" / "one run!" / "in_flight"
    copied.mkdir(parents=True)
    (copied / "weights_name").write_bytes((folders[0] / "weights_name").read_bytes())
    assert weights.name_of_run(copied) != first


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip(path):
    path.write_bytes(bytes([byte ^ 1 for byte in path.read_bytes()]))


def replaced_by(make):
    def spoil(path):
        path.unlink()
        make(path)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (cut, "ends before"),
        (flip, "are not those that the trainer wrote"),
        (replaced_by(lambda path: None), "No such file"),
        (replaced_by(os.mkfifo), "no regular file"),
        (replaced_by(os.mkdir), "no regular file"),
        (replaced_by(lambda path: path.symlink_to("/dev/zero")), "cannot be read"),
        (replaced_by(lambda path: path.write_bytes(b"")), "ends before"),
    ],
)
def test_what_else_lies_in_the_folder_is_tried_for_a_while_and_told_in_a_sentence(
    by_folder, tmp_path, monkeypatch, spoil, why
):
    monkeypatch.setattr(sampler_line, "_RETRY_S", 0.0)
    by_folder.versions.add(0, tree(up=1.0))
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()
    spoil(path)
    line = by_folder.line()
    assert not line.fetch(0)
    monkeypatch.setattr(sampler_line, "UNREAD_S", -1.0)
    with pytest.raises(sampler_line.TrainerLost, match=f"could not be read for .* {why}"):
        line.fetch(0)
    # It shows late.
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    path.write_bytes(good)
    assert_same(fetched(line, 0), tree(up=1.0))


def test_a_sampler_whose_folder_lies_elsewhere_is_told_so_or_says_why_it_ends(
    by_folder, tmp_path, monkeypatch
):
    by_folder.versions.add(0, tree())
    mounted = tmp_path / "mounted"
    mounted.symlink_to(tmp_path)
    assert_same(fetched(by_folder.line(str(mounted)), 0), tree())
    line = by_folder.line(str(tmp_path / "nowhere"))
    monkeypatch.setattr(sampler_line, "UNREAD_S", -1.0)
    by_folder.reception._dispatch.publish(0, [])
    line.start()
    kind, error = line.inbox.get(timeout=10)
    assert kind == "raised"
    assert "say where with --weights=FOLDER" in str(error)
    trainer = Trainer()
    try:
        line = trainer.stranger(str(tmp_path))
        with pytest.raises(sampler_line.Refusal, match="writes its weights into no folder"):
            line._say_hello()
    finally:
        trainer.close()


def test_bytes_that_are_too_many_or_too_few_are_none(tmp_path):
    versions = Versions()
    versions.add(0, tree())
    manifest = Manifest.read(versions.manifest(0), ABSTRACT)
    names = manifest.changed({})
    whole = b"".join(versions.tensors(0, names))
    assert_same(weights.taken([whole[:1], whole[1:]], manifest, names), tree())
    for parts in ([whole, b"x"], [whole[:-1]], []):
        with pytest.raises(Unreadable, match="bytes came than the tensors have"):
            weights.taken(iter(parts), manifest, names)


def test_a_sampler_whose_reading_stands_still_no_longer_says_that_it_lives(by_folder):
    line = by_folder.line()
    line._fetched = time.monotonic() - sampler_line.HUNG_S - 1
    line.beat()
    assert line._hangs
    line._fetched = None
    assert not line._hangs


@pytest.mark.parametrize("folder", ["/proc", "missing", "a\0b", "x" * 5000])
def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="--weights: no file can be written into .*; name a folder"
    ):
        WeightsFolder(folder, lambda: "run")
    if folder != "/proc":
        with pytest.raises(ValueError, match="--weights: there is no folder"):
            roles.checked_folder(folder)


def test_a_disk_that_fills_up_is_told_in_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    versions = Versions(WeightsFolder(str(tmp_path), lambda: "run"))
    monkeypatch.setattr(weights.safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=r"--weights: .*run-000000.* cannot be written .*No space"):
        versions.add(0, tree())
    assert list(tmp_path.iterdir()) == []


def test_who_fetches_while_newer_versions_come_gets_one_version_whole(trainer, monkeypatch):
    monkeypatch.setattr(sampler_line, "_RETRY_S", 0.0)
    trainer.versions.add(0, tree())
    newest = [0]

    def publish():
        for version in range(1, 40):
            trainer.versions.add(version, tree(embed=version, up=version))
            newest.append(version)

    thread = threading.Thread(target=publish)
    thread.start()
    line, held, last = trainer.line(), {}, -1
    while thread.is_alive() or last < 39:
        version = newest[-1]
        if line.fetch(version):
            held |= line.inbox.get(timeout=10)[2]
            assert_same(held, tree(embed=version, up=version))
            last = version
    thread.join()
