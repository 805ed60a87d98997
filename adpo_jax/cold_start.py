"""The cold start: supervised training on demonstrations, before the first iteration.

Its steps are numbered from -num_steps up to 0, where the iterations begin: logs and checkpoints of
both stages have one order, in which what came after a restored checkpoint is taken back.
"""

import dataclasses
from collections.abc import Callable

import optax

from adpo_jax import sft, update
from adpo_jax.checkpoints import Checkpoints
from adpo_jax.interruption import Interrupted, Interruption
from adpo_jax.metrics import Writers
from adpo_jax.policy import Policy
from adpo_jax.progress import Progress
from adpo_jax.update import TrainState

_LOG_FREQ = 50  # steps


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """The supervised stage of a run.

    Attributes:
      prompts, completions: the demonstrations' token ids.
      num_steps: optimizer steps of the whole stage.
      batch_size: demonstrations a step.
      prompt_length, length: tokens that prompts and completions are padded to.
      seed: of the demonstrations' order.
      save_freq: steps between two checkpoints; 0 for none.
      put: host arrays -> device arrays, spread over the mesh.
    """

    policy: Policy
    optimizer: optax.GradientTransformation
    prompts: list[list[int]]
    completions: list[list[int]]
    num_steps: int
    batch_size: int
    prompt_length: int
    length: int
    seed: int
    save_freq: int
    put: Callable

    def init_state(self, params) -> TrainState:
        """The state before the first step; it takes `params` over."""
        return update.init_state(self.policy, params, self.optimizer)

    def abstract_state(self) -> TrainState:
        """The shapes and layout of `init_state`'s result, to restore a checkpoint into."""
        return update.abstract_state(self.policy, self.optimizer)

    def train(
        self, state: TrainState, writer: Writers, checkpoints: Checkpoints, stop: Interruption
    ) -> TrainState:
        """Does the steps that the state has not behind it.

        Args:
          state: donated.

        Raises:
          Interrupted: when `stop` asked for it; the state has been saved.
        """
        done, last = int(state.step), self.num_steps
        step_fn = sft.make_sft_step(self.policy, self.optimizer)
        try:
            with Progress("cold start", last, done) as progress:
                for batch in self._batches(done):
                    stop.check()
                    state, loss = step_fn(state, *self.put(batch))
                    done += 1
                    if done % _LOG_FREQ == 0 or done == last:
                        progress.update(done, f"loss {float(loss):.3f}")
                        writer.write_scalars(
                            done - last, {"sft/step": done, "sft/loss": float(loss)}
                        )
                    if done < last and checkpoints.is_due(done - last, every=self.save_freq):
                        writer.flush()  # what a checkpoint has behind it is in the log
                        checkpoints.save(done - last, state.saved)
        except Interrupted as reason:
            writer.flush()
            checkpoints.save_now(done - last, state.saved)
            print(f"stopped by {reason} after cold start step {done}, which is saved", flush=True)
            raise
        return state

    def _batches(self, first: int):
        return sft.batches(
            self.prompts,
            self.completions,
            first=first,
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            seed=self.seed,
            prompt_length=self.prompt_length,
            length=self.length,
        )
