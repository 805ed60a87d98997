"""Parts of a run without a model's work."""

import dataclasses

from adpo_jax.records import Completion, Completions
from adpo_jax.update.learner import Learner


class FakeEngine:
    """Answers every prompt with two tokens."""

    def generate(self, params, prompts, sampling, key, *, version=0, keys=None, on_group_done=None):
        answer = Completion.sampled([40, 40], [-1.0, -1.0], "stop", version=version)
        return Completions([[answer] * sampling.n for _ in prompts])


class FakeLearner(Learner):
    """Counts iterations."""

    def learn(self, state, sequences, rewards_PG, reward_weights=None):
        metrics = {"rollout/entropy": 0.0, "update/skipped": 0.0}
        return state.replace(step=state.step + 1), metrics


def vars_of(record):
    """The fields of a dataclass and their values, as its constructor takes them."""
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
