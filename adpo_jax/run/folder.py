"""The folder of a run: which run and process it belongs to, and where each file lies.

config.json            the whole config, with digests of the data and reward files that it names;
                       other configs that the run had are in config_changes.jsonl
metrics.jsonl          one object a line
tensorboard/           the same as events
checkpoints/           the training state; damaged ones are moved to damaged_checkpoints/, and
                       first_checkpoint.json says that there has been one
samples/               completions with their rewards
bad_batches/           recordings of iterations whose update was not sound
export/                the final policy as a Hugging Face folder
adapter/               under LoRA, its adapters as a folder of peft
in_flight/             with actor_rollout_ref.rollout.max_staleness, the samples that have not ended
surplus/               with algorithm.filter_groups, the groups that wait for the next iteration
profile/               xprof traces of the iterations that the config asks for
environment.json       versions and devices of the newest part of the run
trackers.json          the identifiers of the run's records in experiment trackers
evaluations/           what `python -m adpo_jax.evaluate` found, one folder each time
<rollout_data_dir>/    recordings of all iterations, where the config asks for them
"""

import fcntl
import json
import os
import shutil
import time
import weakref
from pathlib import Path, PurePath

from ml_collections import ConfigDict

from adpo_jax.hf.files import read_json
from adpo_jax.run import checkpoint_files
from adpo_jax.run.checkpoint_files import complete_steps
from adpo_jax.run.identity import (
    CONTENTS,
    WORKING_DIRECTORY,
    as_json,
    changes,
    digests_in,
    refused,
)

RESUME = ("auto", "never", "must")


# The names that a run and its trackers write in the folder, but for that of the recordings.
NAMES = (
    "adapter",
    "bad_batches",
    "checkpoints",
    "config.json",
    "config_changes.jsonl",
    "damaged_checkpoints",
    "environment.json",
    "evaluations",
    "export",
    "first_checkpoint.json",
    "in_flight",
    "metrics.jsonl",
    "metrics.tmp",
    "profile",
    "samples",
    "surplus",
    "tensorboard",
    "trackers.json",
    "wandb",
)


class RunFolder:
    """One run's folder, held by one process at a time.

    Args:
      root: the folder; `claim` makes it.
      writes: whether this process claims the folder and writes there; one of several does.
    """

    def __init__(self, root: Path, *, writes: bool = True):
        self.root = Path(root)
        self.writes = writes
        self._release = None

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def bad_batches(self) -> Path:
        return self.root / "bad_batches"

    @property
    def in_flight(self) -> Path:
        return self.root / "in_flight"

    @property
    def surplus(self) -> Path:
        return self.root / "surplus"

    @property
    def profile(self) -> Path:
        return self.root / "profile"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to go on from."""
        return bool(complete_steps(self.checkpoints))

    @property
    def exported_step(self) -> int | None:
        """Iterations done by the exported policy; None where there is no export."""
        step = self._exported.get("iterations")
        return step if type(step) is int else None

    @property
    def exported_state(self) -> str | None:
        """The digest of the exported state; None without an export, or if its note has none."""
        state = self._exported.get("state")
        return state if isinstance(state, str) else None

    def note_export(self, step: int, state: str) -> None:
        """Notes which state the export holds; the note goes when the export is replaced.

        Args:
          step: iterations done.
          state: the digest of the state.
        """
        if not self.writes:
            return
        note = {"iterations": step, "state": state}
        self._export_note.write_text(json.dumps(note) + "\n")

    @property
    def _exported(self) -> dict:
        try:
            note = json.loads(self._export_note.read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    @property
    def _export_note(self) -> Path:
        return self.export / "adpo_jax.json"

    def check(
        self,
        config: ConfigDict,
        *,
        replay: Path | None = None,
        resume: str = "auto",
        allow_config_change: bool = False,
        contents: dict | None = None,
    ) -> None:
        """Checks that this config may run in this folder; writes nothing.

        Args:
          replay: the recording that the run trains from, which is part of its identity.
          resume: one of `RESUME`.
          allow_config_change: whether the config may change what the run is.
          contents: digests, in words, of the contents of the files that the config names (see
            `setup.contents`); None where they are not known yet.

        Raises:
          ValueError: when the folder holds a run with another config, or no run but other files, or
            not what `resume` asks for.
        """
        if resume not in RESUME:
            raise ValueError(f"--resume is one of {', '.join(RESUME)}, given {resume!r}")
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{self.root} is a file; choose another --workdir")
        holds_run = self.config.exists()
        if not holds_run and self.root.exists() and not self._is_as_good_as_empty:
            raise ValueError(f"{self.root} is not empty and holds no run; choose another --workdir")
        if resume == "never" and holds_run:
            raise ValueError(
                f"--resume=never, but {self.root} holds a run; choose another --workdir or "
                "trainer.experiment_name, or go on with --resume=auto"
            )
        self._check_state_is_there()
        if resume == "must" and not self.has_checkpoint:
            raise ValueError(
                f"--resume=must, but {self.root} has no checkpoint; --resume=auto starts a new run"
            )
        self._check_links()
        _check_recordings(config.trainer.rollout_data_dir)
        self._check_config(as_json(config, replay, contents), allow_config_change)

    def claim(self, config: ConfigDict, **options) -> None:
        """Claims the folder for this run until `release`; options as for `check`.

        Raises:
          ValueError: as `check`, or for a folder that cannot be written or that another process
            holds; nothing is written then.
        """
        if not self.writes:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._hold()
            self.check(config, **options)
            self._write_config(as_json(config, options.get("replay"), options.get("contents")))
            self.samples.mkdir(exist_ok=True)
            self._sweep()
        except OSError as error:
            self.release()
            raise ValueError(f"{self.root} cannot be written: {error.strerror or error}") from error
        except ValueError:
            self.release()
            raise

    def release(self) -> None:
        """Lets other processes have the folder."""
        if self._release is not None:
            self._release()
            self._release = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def recordings(self, config: ConfigDict) -> Path:
        """The folder in which rollouts are recorded."""
        return self.root / config.trainer.rollout_data_dir

    def write_environment(self, environment: dict) -> None:
        """Writes the versions and devices that this part of the run runs on."""
        if not self.writes:
            return
        text = json.dumps(environment, indent=2) + "\n"
        _replace(self.root / "environment.json", text.encode())

    def write_samples(self, name: str, rows: list[dict]) -> None:
        """Writes `samples/<name>.jsonl`."""
        if not self.writes:
            return
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        # Text of a model may hold lone surrogates, which UTF-8 has no bytes for.
        text = "".join(line + "\n" for line in lines)
        _replace(self.samples / f"{name}.jsonl", text.encode(errors="replace"))

    @property
    def _is_as_good_as_empty(self) -> bool:
        """Whether there is nothing but what a file system keeps or a killed claim has left."""
        left_over = {"lost+found", _unfinished(self.config).name}
        return all(path.name in left_over for path in self.root.iterdir())

    def _check_state_is_there(self) -> None:
        """Refuses a run that had a state and has lost it: it would overwrite its own files."""
        if self.has_checkpoint:
            return
        damaged = self.root / checkpoint_files.DAMAGED
        if damaged.is_dir() and any(damaged.iterdir()):
            lost = f"all its checkpoints were damaged and lie in {damaged}"
        elif (self.root / checkpoint_files.FIRST).exists():
            lost = f"it has had checkpoints, and {self.checkpoints} has none any more"
        elif self.exported_step:
            lost = f"it has exported its policy, and {self.checkpoints} has no checkpoint"
        else:  # the run was stopped before its first checkpoint
            return
        raise ValueError(
            f"the run in {self.root} cannot go on: {lost}. Put a checkpoint back, or start anew in "
            "another --workdir; to start anew here, remove the folder"
        )

    def changes(self, config: ConfigDict) -> dict[str, str]:
        """The keys in which the run in the folder differs: key -> a line with both values.

        The result is empty where there is no run. The contents of files are not compared.

        Args:
          config: a final config.

        Raises:
          ValueError: when the saved config cannot be read.
        """
        return self._changes(as_json(config, None, None))

    def _check_links(self) -> None:
        """Refuses links out of the folder, which would make this process write elsewhere."""
        if not self.root.is_dir():
            return
        for path in self.root.iterdir():
            if path.is_symlink() and not path.resolve().is_relative_to(self.root.resolve()):
                raise ValueError(f"{path} is a link that leaves the run's folder; remove it")

    def _check_config(self, here: dict, allow_config_change: bool) -> None:
        there = self._saved_config
        lines = [] if there is None else refused(there, here, self._step, self.has_checkpoint)
        if lines and not allow_config_change:
            raise ValueError(
                f"{self.root} holds a run with another config, data or reward function; choose "
                "another --workdir or trainer.experiment_name, or go on with "
                "--allow_config_change. Changed (there -> here):\n  " + "\n  ".join(lines)
            )

    @property
    def _step(self) -> int:
        """Iterations done in the newest checkpoint; below 0 in a cold start."""
        return max(complete_steps(self.checkpoints), default=0)

    @property
    def _saved_config(self) -> dict | None:
        if not self.config.exists():
            return None
        try:
            return read_json(self.config)
        except ValueError as error:
            raise ValueError(f"{error}; choose another --workdir") from None

    def _changes(self, here: dict) -> dict[str, str]:
        """The keys whose values differ from the saved config's, with both values."""
        there = self._saved_config
        if there is None:
            return {}
        return changes(there, here)

    def _write_config(self, content: dict) -> None:
        there = self._saved_config
        content = {CONTENTS: digests_in(there or {})} | content
        changes = self._changes(content)
        content[WORKING_DIRECTORY] = os.getcwd()
        if there == content:
            return
        if changes:
            line = {
                "time": round(time.time(), 3),
                "after_iteration": self._step,
                "changed": changes,
            }
            with (self.root / "config_changes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        _replace(self.config, (json.dumps(content, indent=2) + "\n").encode())

    def _hold(self) -> None:
        if self._release is not None:
            return
        descriptor = os.open(self.root, os.O_RDONLY)
        # The kernel releases the lock when the process dies, however it dies.
        self._release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"another process is training in {self.root}; wait for it, or choose another "
                "--workdir"
            ) from None

    def _sweep(self) -> None:
        """Removes the half-done files of an export that was killed."""
        for folder in (self.export, self.adapter):
            for state in ("writing", "replaced"):
                for path in self.root.glob(f".{folder.name}.{state}-*"):
                    shutil.rmtree(path, ignore_errors=True)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    unfinished = _unfinished(path)
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _unfinished(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(f".{path.name}.tmp")


def _check_recordings(name: str) -> None:
    """Refuses a folder of recordings where the run writes, or removes, something else."""
    if not name:
        return
    first = PurePath(name).parts[:1]
    if first == () or first[0] in NAMES or first[0].startswith("."):
        raise ValueError(
            "trainer.rollout_data_dir is a folder of its own within the run's folder, beside "
            f"{', '.join(NAMES)}; given {name!r}"
        )
