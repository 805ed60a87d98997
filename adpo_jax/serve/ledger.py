"""What was really sampled, so that a record that comes back need not be believed.

A client drives the policy turn by turn and hands token ids back. The ledger knows the tokens that
were sampled after each prompt, with the log-probs that they were drawn with. A record is rebuilt
from it, and one whose trained tokens were never sampled is refused.
"""

import collections
import hashlib
import threading
from collections.abc import Sequence

import numpy as np

from adpo_jax.engine.continuous import ContinuousBatch
from adpo_jax.engine.requests import NewTokens, Sample
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.records import Completion, token_fields

# The settings that decide from which distribution a token is drawn.
_DISTRIBUTION = ("temperature", "top_k", "top_p", "min_p", "min_tokens")
# What is kept of a sampled token, beside the fields that a record gives.
_KEPT = ("tokens", "log_probs", "full_log_probs")


class NeverSampled(ValueError):
    """A record of tokens that the policy did not sample, or not as the run samples."""


class Entry:
    """The tokens of one sample.

    Attributes:
      sampling: the settings that they were sampled with.
      parts: of each step, arrays by the names of `_KEPT`; those that were not asked for are absent.
      versions: of the parameters that sampled each part.
    """

    def __init__(self, sampling: SamplingParams):
        self.sampling = sampling
        self.parts: list[dict[str, np.ndarray]] = []
        self.versions: list[int] = []

    def note(self, new: NewTokens) -> None:
        found = {name: getattr(new, name) for name in _KEPT}
        self.parts.append({k: np.array(v) for k, v in found.items() if v is not None})
        self.versions.append(new.version)

    def joined(self) -> dict[str, np.ndarray]:
        """The arrays of all parts, [T, ...], and `versions` [T]."""
        if not self.parts:
            return {"tokens": np.zeros(0, np.int32)}
        made = {name: np.concatenate([p[name] for p in self.parts]) for name in self.parts[0]}
        sizes = [len(part["tokens"]) for part in self.parts]
        return made | {"versions": np.repeat(np.array(self.versions, np.int32), sizes)}


class Ledger:
    """The samples of a server by the prompts that they follow. Its methods are called from any
    thread.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._of_sample: dict[Sample, Entry] = {}
        self._after: dict[bytes, list[Entry]] = collections.defaultdict(list)

    def begin(self, prompt: Sequence[int], sampling: SamplingParams, samples: list[Sample]) -> None:
        """Notes samples that are to follow a prompt."""
        digest = _digest(prompt).digest()
        with self._lock:
            for sample in samples:
                entry = self._of_sample.setdefault(sample, Entry(sampling))
                self._after[digest].append(entry)

    def note(self, news: list[NewTokens]) -> None:
        """Notes what was sampled, which may be known before its beginning is."""
        with self._lock:
            for new in news:
                entry = self._of_sample.setdefault(new.sample, Entry(new.sample.request.sampling))
                entry.note(new)

    def completion(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        trained: Sequence[bool],
        sampling: SamplingParams,
        finish_reason: str,
    ) -> Completion:
        """The completion of a record, with the log-probs that its tokens were sampled with.

        A turn is what one request sampled, or the first tokens of that. Tokens that are not trained
        belong to the turn before them.

        Args:
          tokens: T ids after the prompt.
          trained: T, whether the policy sampled the token.
          sampling: how the run samples.

        Raises:
          NeverSampled: for tokens that were not sampled after what stands before them, or in
            another way than the run samples.
        """
        ids, is_trained = np.array(tokens, np.int32), np.array(trained, bool)
        T = len(ids)
        fields: dict[str, np.ndarray] = {
            name: np.zeros(T, dtype) for name, dtype in token_fields().items()
        }
        fields |= {"tokens": ids, "trained": is_trained, "turns": np.zeros(T, np.int16)}
        kept = {"log_probs", "versions"}
        if sampling.full_log_probs:
            kept.add("full_log_probs")
        else:
            del fields["full_log_probs"]
        context, at, turn = _digest(prompt), 0, 0
        ends = [*(np.flatnonzero(np.diff(is_trained)) + 1).tolist(), T]
        while at < T:
            end = next(place for place in ends if place > at)
            if is_trained[at]:
                found = self._following(context.digest(), ids[at:end], sampling, at)
                end = at + len(found["tokens"])
                for name in kept:
                    fields[name][at:end] = found[name]
                turn += 1
            fields["turns"][at:end] = max(turn - 1, 0)
            context.update(ids[at:end].tobytes())
            at = end
        return Completion(**fields, finish_reason=finish_reason)

    def _following(
        self, digest: bytes, wanted: np.ndarray, sampling: SamplingParams, place: int
    ) -> dict[str, np.ndarray]:
        """The most that was sampled after a prompt and is the beginning of `wanted`."""
        with self._lock:
            entries = [(entry.sampling, entry.joined()) for entry in self._after.get(digest, ())]
        fitting = []
        for used, found in entries:
            count = min(len(found["tokens"]), len(wanted))
            differs = np.flatnonzero(found["tokens"][:count] != wanted[:count])
            count = int(differs[0]) if len(differs) else count
            if count:
                differing = [n for n in _DISTRIBUTION if getattr(used, n) != getattr(sampling, n)]
                fitting.append((not differing, count, used, differing, found))
        if not fitting:
            raise NeverSampled(
                f"token {place} of a completion is said to be trained, and the policy did not "
                "sample it after what stands before it: hand back the token ids of the answers as "
                "they came, and those of the requests' prompts before them"
            )
        _, count, used, differing, found = max(fitting, key=lambda fit: fit[:2])
        if differing:
            name = differing[0]
            raise NeverSampled(
                f"token {place} of a completion was sampled with {name} {getattr(used, name)}, "
                f"where the run samples with {getattr(sampling, name)}: pass the sampling_params "
                "of the request on"
            )
        return {name: values[:count] for name, values in found.items()}


def _digest(tokens: Sequence[int]):
    return hashlib.sha256(np.array(tokens, np.int32).tobytes())


class WitnessedBatch(ContinuousBatch):
    """A batch that keeps a ledger of what it samples."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ledger = Ledger()

    def submit(self, prompt: list[int], sampling: SamplingParams, **options) -> list[Sample]:
        samples = super().submit(prompt, sampling, **options)
        self.ledger.begin(prompt, sampling, samples)
        return samples

    def step(self) -> list[NewTokens]:
        news = super().step()
        self.ledger.note(news)
        return news
