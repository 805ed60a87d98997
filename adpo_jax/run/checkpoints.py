"""Checkpoints of the whole training state: atomic, checked bit by bit, written beside training.

A checkpoint is a folder `<step>` of orbax's format. A rename puts it under that name when it is
complete. It has digests of its arrays, so that a restored state is either the saved one or known to
be damaged; then the checkpoint before takes its place. A save that fails is retried.

Remote file systems are left out, and state that is no pytree of arrays.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from adpo_jax.devices import distributed
from adpo_jax.log.printable import say
from adpo_jax.run.checkpoint_files import (
    DAMAGED,
    FIRST,
    CheckpointError,
    DamagedError,
    check_arrays,
    check_digests,
    complete_steps,
    description,
    first_line,
    on_all_processes,
    read_description,
    read_on_all,
    replace_description,
    sealed,
)

_DELETED = ".deleted"
_UNFINISHED = ".orbax-checkpoint-tmp"


class SaveError(OSError):
    """Checkpoints failed to be written too often in a row."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state from the disk.

    Attributes:
      step: iterations done.
      state: the tree of arrays.
      metrics: the metrics that were saved with it.
      sizes: the sizes of streams that had been used (`stream_sizes.KnownSizes.saved`).
    """

    step: int
    state: Any
    metrics: dict[str, float]
    sizes: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      folder: the folder that they lie in; made when missing.
      save_freq: iterations between two checkpoints; 0 if nothing but `save` makes them.
      keep: how many of the newest checkpoints are kept.
      best_metric: the checkpoint with the largest value of this metric is kept too, and a new
        largest value is saved at once; "" for neither.
      max_failures: how many failed saves in a row stop the run.

    Where there are several processes, all of them make the same calls.
    """

    def __init__(
        self,
        folder: Path,
        *,
        save_freq: int,
        keep: int,
        best_metric: str = "",
        max_failures: int = 1,
    ):
        self._folder = Path(folder).resolve()
        self._save_freq, self._keep = save_freq, keep
        self._best_metric, self._max_failures = best_metric, max_failures
        _leave_bytes_uncounted()
        logging.getLogger("absl").addFilter(_told_here)
        _leave_late_writes_untold()
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._pending: int | None = None  # the step that is being written
        self._owed = False  # whether the last save failed
        self._failed_in_a_row = 0
        self.num_failures = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return complete_steps(self._folder)

    @property
    def latest_step(self) -> int | None:
        """Iterations done in the newest checkpoint; None where there is none."""
        return max(self.steps, default=None)

    def is_due(
        self, step: int, metrics: dict[str, float] | None = None, *, every: int | None = None
    ) -> bool:
        """Whether the state after `step` iterations, with these metrics, is to be saved.

        Args:
          every: iterations between two checkpoints; None for `save_freq`.

        Raises:
          SaveError: when a save has failed meanwhile, after too many failures in a row.
        """
        if jax.process_count() == 1:  # several processes have to find out together, in `save`
            self._notice()
        freq = self._save_freq if every is None else every
        due = freq > 0 and step % freq == 0
        return _as_on_first(bool(due or self._owed or self._is_best(metrics or {})))

    def save(
        self,
        step: int,
        state,
        metrics: dict[str, float] | None = None,
        sizes: dict[str, list[list[int]]] | None = None,
    ) -> bool:
        """Begins to save the state after `step` iterations, unless it is saved already.

        The state may be donated as soon as this returns.

        Args:
          metrics: the metrics of that iteration, which are saved with it.
          sizes: the sizes of streams that have been used, likewise
            (`stream_sizes.KnownSizes.saved`).

        Raises:
          SaveError: after too many failures in a row.
        """
        self.wait()
        if _as_on_first(step in self.steps):
            return False
        failure = None
        try:
            content = description(state) | {"metrics": metrics or {}, "sizes": sizes or {}}
            # On a CPU orbax writes from the very buffers that the next update reuses.
            arrays = _copy(state) if jax.default_backend() == "cpu" else state
            self._pending = step
            self._checkpointer.save(
                self._folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_stored(arrays)),
                    description=ocp.args.JsonSave(sealed(content)),
                ),
            )
        except Exception as error:  # orbax's errors have no common base, and none may lose the run
            failure = error
        if not on_all_processes(failure is None):
            self._failed(failure or RuntimeError("another process could not write"))
        return True

    def save_now(
        self,
        step: int,
        state,
        metrics: dict[str, float] | None = None,
        sizes: dict[str, list[list[int]]] | None = None,
    ) -> None:
        """As `save`, and waits until the state is on the disk; a failed save is tried again.

        Raises:
          SaveError: after too many failures in a row.
        """
        pause_s = 0.5
        while True:
            self.save(step, state, metrics, sizes)
            self.wait()
            if _as_on_first(step in self.steps):
                return
            time.sleep(pause_s)
            pause_s *= 2

    def complete(self, step: int, metrics: dict[str, float]) -> None:
        """Gives a checkpoint the metrics that were found only after it was saved.

        Those of an evaluation that was interrupted are found when the run goes on. Without them the
        best checkpoint might not be kept. Does nothing where there is no checkpoint of that step.
        """
        folder = self._folder / str(step)
        if jax.process_index() or not folder.exists():
            return
        try:
            replace_description(folder, read_description(folder) | {"metrics": metrics})
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"WARNING: checkpoint {step} keeps its old metrics: {first_line(error)}")

    def wait(self) -> None:
        """Waits for the checkpoint that is being written.

        Raises:
          SaveError: when it failed, after too many failures in a row.
        """
        if self._pending is None:
            return
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            failure = error
        else:
            failure = None
        if not on_all_processes(failure is None):
            self._failed(failure or RuntimeError("another process could not write"))
            return
        self._note_first(self._pending)
        self._pending, self._owed, self._failed_in_a_row = None, False, 0
        self._prune()

    def restore_latest(self, like: Callable[[int], Any]) -> Restored:
        """Restores the newest whole checkpoint; damaged ones are moved aside, and stderr says so.

        Args:
          like: step -> a state of arrays with the wanted shapes, dtypes and shardings.

        Raises:
          CheckpointError: when none is whole, or its arrays are not those of `like`.
          OSError: when one cannot be read for now (too many open files, no permission) and may be
            whole. Nothing is moved then.
        """
        if not self.steps:
            raise CheckpointError(f"no checkpoint in {self._folder}")
        reasons = []
        for step in reversed(self.steps):
            try:
                restored = self._restore(step, like(step))
                self._note_first(step)  # the run may be older than the note
                return restored
            except DamagedError as error:
                reasons.append(f"{step}: {error}")
                aside = self._move_aside(step)
                say(
                    f"WARNING: checkpoint {step} is damaged ({error}); moved to {aside}, "
                    "trying the one before"
                )
        raise CheckpointError(
            f"every checkpoint in {self._folder} was damaged: {'; '.join(reasons)}. They lie in "
            f"{self._aside}; start again in another folder"
        )

    def close(self) -> None:
        """Waits for the checkpoint that is being written; a failure is printed, not raised."""
        try:
            self.wait()
        except SaveError as error:
            say(f"WARNING: {error}")
        try:
            self._checkpointer.close()
        except Exception as error:  # of a save that this process began and another one did not
            say(f"WARNING: a checkpoint was given up: {first_line(error)}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # --- restoring

    def _restore(self, step: int, like) -> Restored:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        folder = self._folder / str(step)
        content = read_on_all(lambda: read_description(folder))
        check_arrays(folder, content["arrays"], abstract)
        wanted = _stored(abstract)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        state = read_on_all(lambda: self._checkpointer.restore(folder, args=args).state)
        if wanted is not abstract:
            state = dataclasses.replace(abstract, **state)
        check_digests(state, content["digests"])
        # Checkpoints of older versions have no sizes.
        return Restored(step, state, content["metrics"], content.get("sizes", {}))

    @property
    def _aside(self) -> Path:
        return self._folder.with_name(DAMAGED)

    def _move_aside(self, step: int) -> Path:
        self._aside.mkdir(exist_ok=True)
        number = len(list(self._aside.iterdir()))
        target = self._aside / f"{step}-{number}"
        if jax.process_index() == 0:
            (self._folder / str(step)).rename(target)
        distributed.wait_for_all("moved a damaged checkpoint aside")
        return target

    # --- keeping house

    def _note_first(self, step: int) -> None:
        """Notes, once in a run, that it has had a state and must not start again without one."""
        path = self._folder.with_name(FIRST)
        if jax.process_index() == 0 and not path.exists():
            with contextlib.suppress(OSError):  # the disk may be full; the next save tries again
                path.write_text(json.dumps({"step": step}) + "\n")

    def _notice(self) -> None:
        """Takes note of a save that has ended meanwhile, whether it failed or not."""
        if self._pending is None:
            return
        try:
            self._checkpointer.check_for_errors()
        except Exception as error:
            self._failed(error)
            return
        if self._pending in self.steps:
            self.wait()

    def _failed(self, error: Exception) -> None:
        step, self._pending, self._owed = self._pending, None, True
        self._failed_in_a_row += 1
        self.num_failures += 1
        self._sweep()
        text = (
            f"checkpoint {step} could not be written to {self._folder} "
            f"({self._failed_in_a_row} in a row): {first_line(error)}"
        )
        if self._failed_in_a_row >= self._max_failures:
            left = f"the newest whole checkpoint is {self.latest_step}"
            raise SaveError(f"{text}; {left}") from error
        say(f"WARNING: {text}; trying again")

    def _sweep(self) -> None:
        """Removes the half-done files of a process that died, or of a save that failed."""
        if jax.process_index() == 0:
            for path in self._folder.iterdir():
                if path.name.endswith(_DELETED) or _UNFINISHED in path.name:
                    shutil.rmtree(path, ignore_errors=True)
        distributed.wait_for_all("swept the checkpoints")

    def _prune(self) -> None:
        kept = {*self.steps[-self._keep :], *self._best_steps()}
        for step in self.steps:
            if step not in kept and jax.process_index() == 0:
                # It is renamed first, since a folder under its own name is a whole checkpoint.
                doomed = self._folder / f"{step}{_DELETED}"
                (self._folder / str(step)).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        distributed.wait_for_all("pruned the checkpoints")

    def _best_steps(self) -> list[int]:
        """A list of the best checkpoint's step, the first of equals; empty if there is none."""
        values = self._values()
        return [max(values, key=lambda step: (values[step], -step))] if values else []

    def _is_best(self, metrics: dict[str, float]) -> bool:
        value = metrics.get(self._best_metric, math.nan)
        return math.isfinite(value) and value > max(self._values().values(), default=-math.inf)

    def _values(self) -> dict[int, float]:
        """The best metric of each checkpoint that has it."""
        if not self._best_metric:
            return {}
        values = {}
        for step in self.steps:
            try:
                metrics = read_description(self._folder / str(step))["metrics"]
            except Exception:  # it is damaged; a restore will say so
                continue
            value = metrics.get(self._best_metric)
            if value is not None and math.isfinite(value):
                values[step] = value
        return values


def _as_on_first(decision: bool) -> bool:
    """What the first process decides, where there are several, so that all do the same.

    Folders may look different on each of them while a checkpoint is being written.
    """
    return distributed.all_gather(decision)[0]


def _told_here(record: logging.LogRecord) -> bool:
    """Whether a record is to be logged: not where orbax logs an error that it raises as well.

    Each of its threads logs the same failure with a traceback, and `Checkpoints` tells of it.
    """
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def _leave_late_writes_untold() -> None:
    """Keeps tensorstore from printing a traceback for each write that ends after one has failed.

    orbax has closed the event loop by then, which tensorstore's own threads take for an error.
    """
    before = sys.unraisablehook
    if getattr(before, "leaves_late_writes_untold", False):
        return

    def hook(told):
        late = told.exc_type is RuntimeError and str(told.exc_value) == "Event loop is closed"
        if not late or told.object is not None:  # a thread of C++ has no object
            before(told)

    hook.leaves_late_writes_untold = True
    sys.unraisablehook = hook


def _leave_bytes_uncounted() -> None:
    """Keeps orbax from asking tensorstore, twice a save, for a number that it logs.

    tensorstore 0.1.86 leaks 3 kB each time, in 50 small pieces that hold free memory apart.
    """
    module = sys.modules.get("orbax.checkpoint._src.serialization.tensorstore_utils")
    if hasattr(module, "get_tensorstore_raw_bytes"):
        module.get_tensorstore_raw_bytes = lambda direction=None: 0


def _stored(state):
    """The tree that orbax keeps of a state.

    A reference that there is none of, and parameters of fixed policies, have no place in it, as in
    the checkpoints of versions that knew none of them: those are gone on from.
    """
    if not dataclasses.is_dataclass(state):
        return state
    left_out = ("reference_params", "fixed_params")
    fields = (field.name for field in dataclasses.fields(state))
    found = {name: getattr(state, name) for name in fields}
    return {k: v for k, v in found.items() if k not in left_out or v is not None}


@jax.jit
def _copy(tree):
    return jax.tree.map(jnp.copy, tree)
