"""The records that flow along the road: prompts, completions, graded groups, sequences, batches.

Records lie in the host's memory and are ragged: a completion takes as many places as it has tokens.
The update alone makes rectangles (streams or rows), each of what it runs at once. `Batch` is the
rectangle for people with a loop of their own.

Letters: P prompts, G completions of a prompt, T tokens of a completion, S tokens of a prompt and a
completion.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from adpo_jax.rewards import Scores


def _one_a_token(dtype: type) -> dict:
    """The metadata of a field that has one number of this dtype a token."""
    return {"dtype": np.dtype(dtype)}


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """One completion of a prompt.

    `trained` says which tokens the loss trains, and it may have holes: what a tool answered between
    two turns is part of the completion, and nobody trains on it. (Where completions lie padded in a
    rectangle, "present" marks the places that hold a token at all.)

    Attributes:
      tokens: [T] int32, the stop token included.
      log_probs: [T] float32 in nats, under the distribution that each token was sampled from; 0 for
        a token that was not sampled.
      trained: [T] bool, whether the policy sampled the token and is trained on it.
      versions: [T] int32, iterations done by the weights that each token was sampled from.
      turns: [T] int16, the turn that each token belongs to, from 0.
      finish_reason: "stop" or "length".
      full_log_probs: [T] float32, tempered and not truncated; None unless asked for.
      experts: [T, L, k] uint8, or uint16 where there are more than 256: the k experts that each
        layer with a mixture took when the token was sampled; None unless asked for.
      prompt_experts: [P - 1, L, k] likewise, of the P tokens of the prompt but its last, whose
        experts are the first of `experts`; None unless asked for. The completions of a prompt share
        one array.
    """

    tokens: np.ndarray = dataclasses.field(metadata=_one_a_token(np.int32))
    log_probs: np.ndarray = dataclasses.field(metadata=_one_a_token(np.float32))
    trained: np.ndarray = dataclasses.field(metadata=_one_a_token(np.bool_))
    versions: np.ndarray = dataclasses.field(metadata=_one_a_token(np.int32))
    turns: np.ndarray = dataclasses.field(metadata=_one_a_token(np.int16))
    finish_reason: str = "length"
    full_log_probs: np.ndarray | None = dataclasses.field(
        default=None, metadata=_one_a_token(np.float32)
    )
    experts: np.ndarray | None = None
    prompt_experts: np.ndarray | None = None

    @property
    def without_experts(self) -> "Completion":
        """The completion without the experts that its tokens went through."""
        return dataclasses.replace(self, experts=None, prompt_experts=None)

    @classmethod
    def sampled(
        cls,
        tokens: np.ndarray,
        log_probs: np.ndarray,
        finish_reason: str,
        *,
        full_log_probs: np.ndarray | None = None,
        experts: np.ndarray | None = None,
        prompt_experts: np.ndarray | None = None,
        version: int = 0,
    ) -> "Completion":
        """A completion of one turn, all of whose tokens weights of one version sampled.

        Args:
          tokens, log_probs, full_log_probs: [T]; they are copied.
          experts: [T, L, k].
          prompt_experts: [P - 1, L, k].
        """
        T = len(tokens)
        return cls(
            tokens=np.array(tokens, np.int32),
            log_probs=np.array(log_probs, np.float32),
            trained=np.ones(T, bool),
            versions=np.full(T, version, np.int32),
            turns=np.zeros(T, np.int16),
            finish_reason=finish_reason,
            full_log_probs=None if full_log_probs is None else np.array(full_log_probs, np.float32),
            experts=experts,
            prompt_experts=prompt_experts,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sampler_log_probs(self) -> np.ndarray:
        """[T] float32, the log-probs that the trainer compares its own with."""
        return self.log_probs if self.full_log_probs is None else self.full_log_probs


def token_fields() -> dict[str, np.dtype]:
    """The fields of a completion that have one number a token, with their dtypes."""
    fields = dataclasses.fields(Completion)
    return {f.name: f.metadata["dtype"] for f in fields if "dtype" in f.metadata}


@dataclasses.dataclass(frozen=True)
class Completions:
    """The completions of P prompts, G of each.

    Attributes:
      groups: P lists of G completions, in the order of the prompts.
      stats: counts of prefill, decoding and dispatches in the call that sampled them.
    """

    groups: list[list[Completion]]
    stats: dict[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, prompt: int) -> list[Completion]:
        return self.groups[prompt]

    @property
    def num_samples(self) -> int:
        """G."""
        return len(self.groups[0])

    @property
    def flat(self) -> list[Completion]:
        """All P * G completions, those of a prompt side by side."""
        return [completion for group in self.groups for completion in group]

    @property
    def lengths(self) -> np.ndarray:
        """[P, G] int32, tokens."""
        return np.array([[len(c) for c in group] for group in self.groups], np.int32)

    @property
    def finish_reasons(self) -> np.ndarray:
        """[P, G] str, "stop" or "length"."""
        return np.array([[c.finish_reason for c in group] for group in self.groups])

    def padded(self, field: str, length: int | None = None, fill: float = 0) -> np.ndarray:
        """One field of the tokens as a rectangle.

        Args:
          field: one of `token_fields()`, or "present", 1 where there is a token.
          length: places of the rectangle; None for the tokens of the longest completion.
          fill: the value of places that hold no token.

        Returns:
          [P, G, length] in the field's dtype, completions at the left.

        Raises:
          ValueError: for another field, one that completions have not, and a length too short.
        """
        fields = token_fields() | {"present": np.dtype(bool)}
        if field not in fields:
            raise ValueError(f"a completion has {', '.join(fields)}; given {field!r}")
        dtype, lengths = fields[field], self.lengths
        if length is not None and length < lengths.max(initial=0):
            raise ValueError(
                f"length={length} is below the longest completion's {lengths.max()} tokens"
            )
        everyone = (completion for group in self.groups for completion in group)
        if field != "present" and any(getattr(c, field) is None for c in everyone):
            raise ValueError(f"not all completions have {field}; it is there where it is asked for")
        shape = (*lengths.shape, int(lengths.max(initial=0)) if length is None else length)
        out = np.full(shape, fill, dtype)
        for p, group in enumerate(self.groups):
            for g, completion in enumerate(group):
                value = True if field == "present" else getattr(completion, field)
                out[p, g, : len(completion)] = value
        return out

    def map(self, function: Callable[[Completion], Completion]) -> "Completions":
        """These completions, each replaced by the result of `function`."""
        return Completions([[function(c) for c in group] for group in self.groups], self.stats)

    def select(self, rows: Sequence[int]) -> "Completions":
        """The groups with these numbers, in this order, without the counts of the whole call."""
        return Completions([self.groups[row] for row in rows])

    @classmethod
    def concatenate(cls, parts: "Sequence[Completions]") -> "Completions":
        """The groups of all parts, in their order; counts are summed."""
        names = dict.fromkeys(name for part in parts for name in part.stats)
        stats = {name: sum(part.stats.get(name, 0) for part in parts) for name in names}
        return cls([group for part in parts for group in part.groups], stats)


def _taken(values: Sequence, rows: Sequence[int]) -> list:
    """The values of these rows; a sequence that computes its values may take them at once."""
    return values.take(rows) if hasattr(values, "take") else [values[i] for i in rows]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenised prompts and the data columns that belong to them.

    Those of a large data set are read and tokenised when `select` takes them.

    Attributes:
      token_ids: one list of token ids a prompt.
      columns: one value a prompt under each name; rewards compare an answer with "solution".
      files_digest: a digest of the files that they come from, where they are read when due.
      copies_in_batch: the `copy_numbers` in a batch that these are a share of; None where these are
        the batch.
    """

    token_ids: Sequence[list[int]]
    columns: dict[str, Sequence]
    files_digest: str = ""
    copies_in_batch: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def select(self, rows: Sequence[int]) -> "Prompts":
        """The prompts with these numbers, in this order, in memory."""
        columns = {name: _taken(values, rows) for name, values in self.columns.items()}
        return Prompts(_taken(self.token_ids, rows), columns)

    def share(self, rows: range) -> "Prompts":
        """The prompts with these numbers, which keep their `copy_numbers` in this batch."""
        if len(rows) == len(self):  # prompts that are read when due need not be read twice
            return self.select(rows)
        return dataclasses.replace(
            self.select(rows), copies_in_batch=_taken(copy_numbers(self.token_ids), rows)
        )

    @property
    def copy_numbers(self) -> Sequence[int]:
        """`copy_numbers` of the prompts in their batch."""
        if self.copies_in_batch is not None:
            return self.copies_in_batch
        return copy_numbers(self.token_ids)

    @classmethod
    def concatenate(cls, parts: "Sequence[Prompts]") -> "Prompts":
        """The prompts of all parts, in their order; all parts have the same columns."""
        columns = {
            name: [value for part in parts for value in part.columns[name]]
            for name in parts[0].columns
        }
        return cls([ids for part in parts for ids in part.token_ids], columns)

    def digest(self) -> str:
        """SHA-256 of all token ids and solutions, in their order.

        Of prompts that are tokenised when due: of their files, and of 64 prompts spread over them.
        """
        there = self
        found = hashlib.sha256(self.files_digest.encode())
        if self.files_digest:
            there = self.select(range(0, len(self), max(len(self) // 64, 1)))
        solutions = there.columns.get("solution") or [None] * len(there)
        for ids, solution in zip(there.token_ids, solutions, strict=True):
            found.update(json.dumps([ids, solution], default=str).encode())
        return found.hexdigest()

    def repeated_columns(self, times: int) -> dict[str, list]:
        """The columns with each value repeated, one for every completion of its prompt."""
        return {
            name: [value for value in values for _ in range(times)]
            for name, values in self.columns.items()
        }


def copy_numbers(prompts: Iterable[Sequence[int]]) -> list[int]:
    """The number of each prompt among those that are equal to it, from 0."""
    seen: collections.Counter[bytes] = collections.Counter()
    found = []
    for prompt in prompts:
        content = np.asarray(prompt, "<i8").tobytes()
        found.append(seen[content])
        seen[content] += 1
    return found


@dataclasses.dataclass(frozen=True)
class GradedGroups:
    """Prompts with their graded completions, which an iteration trains on.

    Attributes:
      texts: the text of each of the P * G completions, those of a prompt side by side.
      scores: the rewards of the P * G completions.
      seconds: seconds until the last token, and from there until the last reward.
      metrics: further metrics of them to log.
      transcripts: the messages of each of the P * G completions, what tools answered among them;
        None where they have one turn each, and for those that a recording has left out.
    """

    prompts: Prompts
    completions: Completions
    texts: list[str]
    scores: Scores
    seconds: tuple[float, float] = (0.0, 0.0)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    transcripts: list[list[dict] | None] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def rewards(self) -> np.ndarray:
        """[P, G] float."""
        return self.scores.total.reshape(len(self), -1)

    def rewards_of(self, names: Sequence[str]) -> np.ndarray:
        """[P, G, K] float: the unweighted rewards of these functions, NaN where one gave none.

        Raises:
          ValueError: for a function that did not grade them, as in another run's recordings.
        """
        missing = [name for name in names if name not in self.scores.components]
        if missing:
            raise ValueError(
                f"the completions have no rewards of {missing[0]}; they have those of "
                f"{', '.join(self.scores.components)}"
            )
        kinds = [self.scores.components[name] for name in names]
        return np.stack(kinds, axis=-1).reshape(len(self), -1, len(names))

    def select(self, rows: Sequence[int]) -> "GradedGroups":
        """The groups with these numbers, in this order, without counts and metrics of the whole."""
        G = self.completions.num_samples
        flat = [row * G + g for row in rows for g in range(G)]
        return dataclasses.replace(
            self,
            prompts=self.prompts.select(rows),
            completions=self.completions.select(rows),
            texts=[self.texts[i] for i in flat],
            scores=self.scores.select(flat),
            metrics={},
            transcripts=self.transcripts and [self.transcripts[i] for i in flat],
        )

    @classmethod
    def concatenate(cls, parts: "Sequence[GradedGroups]") -> "GradedGroups":
        """The groups of all parts, in their order, without metrics; counts are summed.

        The seconds are those of the slowest part, since the processes of a run sample at the same
        time.
        """
        if len(parts) == 1:
            return dataclasses.replace(parts[0], metrics={})
        return cls(
            prompts=Prompts.concatenate([part.prompts for part in parts]),
            completions=Completions.concatenate([part.completions for part in parts]),
            texts=[text for part in parts for text in part.texts],
            scores=Scores.concatenate([part.scores for part in parts]),
            seconds=tuple(max(seconds) for seconds in zip(*(part.seconds for part in parts))),
            transcripts=_joined_transcripts(parts),
        )

    def without_truncated(self) -> "GradedGroups":
        """The groups with no token trained of the completions that ran into the length limit.

        Their rewards stay: they take part in what their group is compared with.
        """

        def masked(completion: Completion) -> Completion:
            if completion.finish_reason != "length":
                return completion
            return dataclasses.replace(completion, trained=np.zeros_like(completion.trained))

        return dataclasses.replace(self, completions=self.completions.map(masked))

    @property
    def without_experts(self) -> "GradedGroups":
        """The groups without the experts that their tokens went through."""
        stripped = self.completions.map(lambda completion: completion.without_experts)
        return dataclasses.replace(self, completions=stripped)

    @property
    def sequences(self) -> "Sequences":
        """The prompts and completions as the update takes them."""
        return Sequences(self.prompts.token_ids, self.completions.groups)


def _joined_transcripts(parts: Sequence[GradedGroups]) -> list[list[dict] | None] | None:
    """The transcripts of all parts, None for each completion of a part without any."""
    if all(part.transcripts is None for part in parts):
        return None
    return [messages for part in parts for messages in part.transcripts or [None] * len(part.texts)]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Prompts with their completions as the update runs them.

    Attributes:
      prompts: P lists of token ids, one or more each.
      completions: P lists of G completions.
      log_probs: log-probs under policies other than the sampler, by the names of
        `losses.algorithm.LOG_PROBS`: P lists of G arrays [T] float32.
    """

    prompts: list[Sequence[int]]
    completions: list[list[Completion]]
    log_probs: dict[str, list[list[np.ndarray]]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """[P, G] int64, tokens of the completions."""
        return np.array([[len(c) for c in group] for group in self.completions])

    @property
    def num_trained(self) -> np.ndarray:
        """[P, G] int64, trained tokens of the completions."""
        return np.array([[c.trained.sum() for c in group] for group in self.completions])

    @property
    def tokens_of_groups(self) -> np.ndarray:
        """[P] int64, tokens of a prompt and its completions."""
        return np.array([len(ids) for ids in self.prompts]) + self.lengths.sum(1)

    @property
    def experts_shape(self) -> tuple[int, ...]:
        """(layers, experts of a token) where completions say what they went through, else ()."""
        found = (c.experts for group in self.completions for c in group if c.experts is not None)
        return next((experts.shape[1:] for experts in found), ())

    def prompt_experts(self, prompt: int) -> np.ndarray | None:
        """Those of the first of its completions that has them."""
        found = (c.prompt_experts for c in self.completions[prompt])
        return next((experts for experts in found if experts is not None), None)

    @property
    def without_experts(self) -> "Sequences":
        """The same for a model other than the sampler's, whose router chooses for itself."""
        groups = [[c.without_experts for c in group] for group in self.completions]
        return dataclasses.replace(self, completions=groups)

    def select(self, rows: Sequence[int]) -> "Sequences":
        """The groups with these numbers, in this order."""

        def chosen(values):
            return [values[row] for row in rows]

        log_probs = {name: chosen(values) for name, values in self.log_probs.items()}
        return Sequences(chosen(self.prompts), chosen(self.completions), log_probs)

    def values(self, name: str) -> list[list[np.ndarray]]:
        """Log-probs under the policy of this name, "sampler" too: P lists of G arrays [T]."""
        if name != "sampler":
            return self.log_probs[name]
        return [[c.sampler_log_probs for c in group] for group in self.completions]


class Batch(NamedTuple):
    """Completions in a rectangle with an explicit group axis, for a training loop of one's own.

    A row is the prompt, padded on its left, followed by the completion, padded on its right, so
    that completions start in the same column everywhere.
    """

    tokens_PGS: np.ndarray  # int32
    attention_mask_PGS: np.ndarray  # int32, 1 where there is a token
    completion_mask_PGT: np.ndarray  # float32, 1 at the tokens that are trained on
    sampler_log_probs_PGT: np.ndarray  # float32, the sampler's, tempered and not truncated

    @property
    def num_completion(self) -> int:
        return self.completion_mask_PGT.shape[-1]

    @property
    def padding_frac(self) -> float:
        """The share of the places run through the model that hold no token."""
        return 1.0 - float(np.mean(self.attention_mask_PGS > 0))

    def sequences(self) -> Sequences:
        """The prompts and completions of the batch, ragged.

        Raises:
          ValueError: when the rows of a group have different prompts.
        """
        tokens, there = np.asarray(self.tokens_PGS), np.asarray(self.attention_mask_PGS) > 0
        width = tokens.shape[-1] - self.num_completion
        prompts = np.where(there, tokens, 0)[..., :width]
        if (prompts != prompts[:, :1]).any() or (there[..., :width] != there[:, :1, :width]).any():
            raise ValueError(
                "the rows of a group have different prompts; put completions of one prompt in a "
                "group"
            )

        def completion(p: int, g: int) -> Completion:
            present = there[p, g, width:]
            found = Completion.sampled(
                tokens[p, g, width:][present],
                np.asarray(self.sampler_log_probs_PGT)[p, g][present],
                "length",
            )
            trained = np.asarray(self.completion_mask_PGT)[p, g][present] > 0
            return dataclasses.replace(found, trained=trained)

        P, G, _ = tokens.shape
        return Sequences(
            [tokens[p, 0, :width][there[p, 0, :width]] for p in range(P)],
            [[completion(p, g) for g in range(G)] for p in range(P)],
        )


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Completion]],
    *,
    prompt_length: int,
    completion_length: int,
) -> Batch:
    """Prompts and completions side by side in a rectangle.

    Args:
      prompts: P lists of token ids, at most `prompt_length` long.
      completions: P lists of G completions, at most `completion_length` tokens long.

    Returns:
      A batch of P prompts with S = prompt_length + completion_length. Its sampler's log-probs are
      the `full_log_probs` of completions that have them, else their `log_probs`.

    Raises:
      ValueError: for groups that do not fit the prompts or each other, and for lengths too short.
    """
    sizes = {len(group) for group in completions}
    if not len(prompts) or len(completions) != len(prompts) or len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "wanted P prompts and a group of G completions for each; given "
            f"{len(prompts)} prompts and groups of {[len(group) for group in completions][:20]}"
        )
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if not 0 < shortest <= longest <= prompt_length:
        raise ValueError(
            f"prompts have 1 to prompt_length={prompt_length} tokens; given {shortest} to {longest}"
        )
    longest = max(len(completion) for group in completions for completion in group)
    if longest > completion_length:
        raise ValueError(
            f"completions have up to completion_length={completion_length} tokens; given {longest}"
        )
    P, G = len(prompts), len(completions[0])
    tokens = np.zeros((P, G, prompt_length + completion_length), np.int32)
    attention_mask = np.zeros_like(tokens)
    mask = np.zeros((P, G, completion_length), np.float32)
    log_probs = np.zeros_like(mask)
    for p, ids in enumerate(prompts):
        tokens[p, :, prompt_length - len(ids) : prompt_length] = ids
        attention_mask[p, :, prompt_length - len(ids) : prompt_length] = 1
        for g, completion in enumerate(completions[p]):
            T = len(completion)
            tokens[p, g, prompt_length : prompt_length + T] = completion.tokens
            attention_mask[p, g, prompt_length : prompt_length + T] = 1
            mask[p, g, :T] = completion.trained
            log_probs[p, g, :T] = completion.sampler_log_probs
    return Batch(tokens, attention_mask, mask, log_probs)


def pad_values(values: list[list[np.ndarray]], length: int) -> np.ndarray:
    """P lists of G arrays [T] as one array [P, G, length] float32, 0 behind their ends."""
    padded = np.zeros((len(values), len(values[0]), length), np.float32)
    for row, group in zip(padded, values):
        for out, found in zip(row, group):
            out[: len(found)] = found
    return padded
