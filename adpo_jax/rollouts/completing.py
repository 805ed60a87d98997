"""Where completions come from: one turn of the engine, or a conversation with an environment.

A completer gives `Answers`; grading, evaluation and all sources of rollouts take them without
knowing which of the two it was.

Letters: P prompts, G completions of a prompt.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from adpo_jax.engine.engine import Engine, FinishedGroup
from adpo_jax.engine.sampling import SamplingParams, prompt_uids, sample_keys
from adpo_jax.records import Completion, Completions, Prompts

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How completions are read for the rewards.

    Attributes:
      prompt_key: the data column that rewards are given as `prompts`; "" for none.
      skip_special_tokens: whether no special token is read. Otherwise those that end, begin or pad
        a text are left out, and others stay: a tokenizer may have made `<answer>` one.
      stop_token_ids: the tokens that end a completion, beside those that the tokenizer names.
    """

    prompt_key: str = ""
    skip_special_tokens: bool = False
    stop_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, sampling: SamplingParams) -> "Reading":
        """The default reading of what is sampled so."""
        return cls(stop_token_ids=tuple(sampling.stop_token_ids))

    def texts(self, tokenizer, completions: Sequence[Completion]) -> list[str]:
        """The text of each completion."""
        return self.decoded(tokenizer, [completion.tokens for completion in completions])

    def decoded(self, tokenizer, tokens: Sequence[np.ndarray]) -> list[str]:
        """The text of each row of token ids."""
        ids = [row.tolist() for row in tokens]
        if self.skip_special_tokens:
            return tokenizer.batch_decode(ids, skip_special_tokens=True)
        named = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "pad"))
        ends = {*self.stop_token_ids, *named}
        ids = [[token for token in row if token not in ends] for row in ids]
        return tokenizer.batch_decode(ids, skip_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class Answers:
    """The completions of P prompts, and what is said of them.

    Attributes:
      prompts: the prompts that they answer: those that were asked for, unless an environment has
        added to them.
      texts: what the model wrote, for the rewards; P * G, those of a prompt side by side.
      transcripts: the messages of each completion; None where each is a single turn.
      columns: further columns for the rewards, P * G values each.
      logged: numbers that were told beside them, as `rewards.Scores.logged` has them.
    """

    prompts: Prompts
    completions: Completions
    texts: list[str]
    transcripts: list[list[Message]] | None = None
    columns: dict[str, list] = dataclasses.field(default_factory=dict)
    logged: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def select(self, places: Sequence[int]) -> "Answers":
        """The answers to the prompts at these places."""
        G = self.completions.num_samples
        flat = [place * G + g for place in places for g in range(G)]

        def chosen(values: list) -> list:
            return [values[i] for i in flat]

        return Answers(
            self.prompts.select(places),
            self.completions.select(places),
            chosen(self.texts),
            self.transcripts and chosen(self.transcripts),
            {name: chosen(values) for name, values in self.columns.items()},
            {name: chosen(values) for name, values in self.logged.items()},
        )

    @classmethod
    def concatenate(
        cls, parts: "Sequence[Answers]", stats: dict[str, int] | None = None
    ) -> "Answers":
        """The answers of one or more parts, in their order.

        Args:
          stats: the counts of the whole call; None for the sums of the parts'.
        """
        completions = Completions.concatenate([part.completions for part in parts])
        if stats is not None:
            completions = dataclasses.replace(completions, stats=stats)
        transcripts = None
        if parts[0].transcripts is not None:
            transcripts = [messages for part in parts for messages in part.transcripts]
        logged = dict.fromkeys(name for part in parts for name in part.logged)
        return cls(
            Prompts.concatenate([part.prompts for part in parts]),
            completions,
            [text for part in parts for text in part.texts],
            transcripts,
            {name: [x for p in parts for x in p.columns[name]] for name in parts[0].columns},
            {name: [x for p in parts for x in p.logged.get(name, ())] for name in logged},
        )

    def reward_columns(self, reading: Reading, takes: Callable[[str], bool]) -> dict[str, list]:
        """The data columns, one value for each of the P * G completions, and what is offered.

        See `rewards.binding.OFFERED`.

        Args:
          takes: whether a reward function can use what is offered under a name.
        """
        completions = self.completions.flat
        columns = self.prompts.repeated_columns(len(completions) // max(len(self.prompts), 1))
        if reading.prompt_key in columns:
            columns["prompts"] = columns[reading.prompt_key]
        columns["completion_tokens"] = [len(completion) for completion in completions]
        if takes("completion_ids"):
            columns["completion_ids"] = [completion.tokens.tolist() for completion in completions]
        return columns | self.columns


class Completer(Protocol):
    """Completes prompts."""

    def __call__(
        self,
        params: Any,
        prompts: Prompts,
        sampling: SamplingParams,
        key: jax.Array,
        *,
        version: int = 0,
        on_group_done: Callable[[int, Answers], None] | None = None,
    ) -> Answers:
        """Samples `sampling.n` completions of each prompt.

        Args:
          version: iterations done by the parameters, for the records.
          on_group_done: called with the place of a prompt and the answers to it alone, while others
            decode.
        """


@dataclasses.dataclass(frozen=True)
class OneTurn:
    """Completions of one turn."""

    engine: Engine
    tokenizer: Any
    reading: Reading

    def __call__(self, params, prompts, sampling, key, *, version=0, on_group_done=None) -> Answers:
        def done(group: FinishedGroup):
            texts = self.reading.texts(self.tokenizer, group.completions)
            prompt = prompts.select([group.prompt_index])
            answers = Answers(prompt, Completions([group.completions]), texts)
            on_group_done(group.prompt_index, answers)

        uids = prompt_uids(prompts.token_ids, prompts.copy_numbers)
        out = self.engine.generate(
            params,
            prompts.token_ids,
            sampling,
            key,
            version=version,
            keys=np.asarray(sample_keys(key, uids, sampling.n)),
            on_group_done=on_group_done and done,
        )
        return Answers(prompts, out, self.reading.texts(self.tokenizer, out.flat))
