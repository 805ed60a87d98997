"""The cold start: supervised training on demonstrations, before the first iteration.

Its steps are numbered from -num_steps up to 0, where the iterations begin. So the logs and
checkpoints of both stages have one order, and a restore takes back all rows that come later in it.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import optax

from adpo_jax import update
from adpo_jax.data.order import prompt_indices
from adpo_jax.log.metrics import Writers
from adpo_jax.log.progress import Progress
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Batch
from adpo_jax.run.checkpoints import Checkpoints
from adpo_jax.run.guard import TrainingStopped
from adpo_jax.run.interruption import Interrupted, Interruption
from adpo_jax.update import SKIPPED, TrainState, sft
from adpo_jax.update.packing import PackedBatch

_LOG_FREQ = 50  # steps


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """The supervised stage of a run.

    Attributes:
      prompts, completions: the demonstrations' token ids.
      num_steps: optimizer steps of the whole stage.
      batch_size: demonstrations of a step.
      prompt_length, completion_length: tokens of the longest ones that there may be.
      seed: decides the order of the demonstrations.
      save_freq: steps between two checkpoints; 0 for none.
      rows_per_micro: as many demonstrations of full length run through a device at once; 0 for all.
      layout: "packed" for streams where they have far fewer places, "rows" for padded rows.
    """

    policy: Policy
    optimizer: optax.GradientTransformation
    prompts: list[list[int]]
    completions: list[list[int]]
    num_steps: int
    batch_size: int
    prompt_length: int
    completion_length: int
    seed: int
    save_freq: int
    rows_per_micro: int = 0
    layout: str = "packed"

    def init_state(self, params) -> TrainState:
        """The state before the first step; it takes `params` over."""
        return update.init_state(self.policy, params, self.optimizer)

    def abstract_state(self) -> TrainState:
        """The shapes and layout of `init_state`'s result, to restore a checkpoint into."""
        return update.abstract_state(self.policy, self.optimizer)

    def train(
        self, state: TrainState, writer: Writers, checkpoints: Checkpoints, stop: Interruption
    ) -> TrainState:
        """Does the steps that the state has not done yet.

        Args:
          state: the state so far; it is donated.

        Raises:
          Interrupted: when `stop` asked the run to stop; the state has been saved.
          TrainingStopped: when the loss or gradient of a step was not finite.
        """
        done, last = int(state.step), self.num_steps
        step_fn = sft.make_sft_step(
            self.policy,
            self.optimizer,
            batch_size=self.batch_size,
            rows_per_micro=self.rows_per_micro,
        )
        skipped, metrics = 0.0, {}
        try:
            with Progress("cold start", last, done) as progress, progress.doing("training"):
                for batch in self._batches(done):
                    stop.check()
                    before = metrics
                    state, metrics = step_fn(state, batch)
                    skipped = skipped + metrics[SKIPPED]
                    # The host stays one step ahead, so that what it says of the steps is so.
                    jax.block_until_ready(before)
                    progress.advance(done)
                    done += 1
                    logged = done % _LOG_FREQ == 0 or done == last
                    if logged or progress.is_due:
                        loss = float(metrics["sft/loss"])
                        progress.update(done, f"loss {loss:.3f}")
                    if logged:
                        writer.write_scalars(done - last, {"sft/step": done, "sft/loss": loss})
                        _check(int(skipped), done)
                    if done < last and checkpoints.is_due(done - last, every=self.save_freq):
                        _check(int(skipped), done)  # the count is in no checkpoint
                        writer.flush()  # the log reaches as far as the checkpoint
                        checkpoints.save(done - last, state.saved)
        except Interrupted as reason:
            writer.flush()
            _check(int(skipped), done)
            checkpoints.save_now(done - last, state.saved)
            print(f"stopped by {reason} after cold start step {done}, which is saved", flush=True)
            raise
        return state

    def _batches(self, first: int) -> Iterator[Batch | PackedBatch]:
        """The batches of the steps from `first` on; each is a function of its step and the seed."""
        examples = sft.demonstrations(self.prompts, self.completions)
        longest = {
            "prompt_length": self.prompt_length,
            "completion_length": self.completion_length,
        }
        if self.layout == "rows":
            lay_out = sft.InRows(examples, **longest)
        else:
            lay_out = sft.choose_layout(
                self.policy,
                examples,
                self._rows(0),
                batch_size=self.batch_size,
                rows_per_micro=self.rows_per_micro,
                **longest,
            )
        yield from map(lay_out, self._rows(first))

    def _rows(self, first: int) -> Iterator[np.ndarray]:
        """The numbers of the demonstrations of the steps from `first` on."""
        num_rows = len(self.prompts)
        for step in range(first, self.num_steps):
            yield prompt_indices(
                step, seed=self.seed, num_rows=num_rows, batch_size=self.batch_size
            )


def _check(skipped: int, done: int) -> None:
    if skipped:
        raise TrainingStopped(
            f"the loss or gradient of {skipped} of the cold start's steps up to {done} was not "
            "finite, and they were left out; lower sft.lr, or look at sft.train_files"
        )
