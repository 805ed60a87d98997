"""Checkpoints of the whole training state, through orbax."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      folder: where they lie; made when missing.
      save_freq: iterations between two of them; 0 for `save` alone.
      keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, *, save_freq: int, keep: int):
        self._save_freq = save_freq
        # On a CPU orbax would write from the very buffers that the next update reuses.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=jax.default_backend() != "cpu"
        )
        self._manager = ocp.CheckpointManager(Path(folder).resolve(), options=options)

    @property
    def latest_step(self) -> int | None:
        """Iterations done in the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def maybe_save(self, step: int, state) -> bool:
        """Saves the state after `step` iterations where it is due; says whether it did."""
        if self._save_freq and step % self._save_freq == 0:
            return self.save(step, state)
        return False

    def save(self, step: int, state) -> bool:
        """Saves the state after `step` iterations, unless that is saved already."""
        if step in self._manager.all_steps():
            return False
        return self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore_latest(self, like):
        """The newest state.

        Args:
          like: a state of arrays with the wanted shapes, dtypes and shardings.

        Raises:
          ValueError: when there is none, or its shapes are not those of `like`.
        """
        if self.latest_step is None:
            raise ValueError(f"no checkpoint in {self._manager.directory}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(self.latest_step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
