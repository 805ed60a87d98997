"""Completions that processes of the user's make: they drive this engine, and hand tokens back.

While a call lasts the engine is a server (`serve.inside`). Each row is asked for at the
environment's address, and its records are rebuilt from what the server sampled.

Letters: P prompts, G completions of a prompt.
"""

import asyncio
import concurrent.futures
import dataclasses
import queue
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.environments.contract import EndedEnvironment
from adpo_jax.environments.external import REWARD_NAME, External, Record
from adpo_jax.environments.pool import EnvironmentFailed
from adpo_jax.records import Completion, Completions, Prompts
from adpo_jax.rewards.model import GIVEN
from adpo_jax.rollouts.completing import Answers, Reading
from adpo_jax.rollouts.evaluation import metric_name
from adpo_jax.rollouts.rows import group_seeds, reset_row, rows_of
from adpo_jax.serve.inside import MODEL_NAME, InsideServer
from adpo_jax.serve.ledger import NeverSampled
from adpo_jax.serve.protocol import Limits
from adpo_jax.serve.service import Language


@dataclasses.dataclass(frozen=True)
class Externally:
    """Completes prompts by asking an external environment; a `completing.Completer`.

    Attributes:
      engine: it takes prompts of whole conversations.
    """

    engine: Engine
    tokenizer: Any
    reading: Reading
    environment: External

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
        """See `Completer`.

        Raises:
          EnvironmentFailed: the environment failed, told of tokens that were never sampled, or
            cannot be served, because this machine has lost the address.
        """
        longest = self.environment.max_prompt_length + sampling.max_tokens
        limits = Limits(longest - 1, sampling.max_tokens, max_model_length=longest)
        language = Language(
            self.tokenizer,
            self.engine.policy.config.vocab_size,
            self.reading.stop_token_ids,
            self.environment.prompt_format,
        )
        try:
            inside = InsideServer(
                self.engine,
                params,
                language,
                limits,
                version=version,
                host=self.environment.serve_host,
                returns={"full_log_probs": sampling.full_log_probs},
            )
        except ValueError as error:
            raise EnvironmentFailed(str(error)) from None
        with inside as server:
            bodies = _bodies(prompts, sampling, key, version, self.reading.prompt_key)
            for body in bodies:
                body["model"] = {
                    "base_url": server.base_url,
                    "name": MODEL_NAME,
                    "api_key": server.api_key,
                    "max_prompt_length": self.environment.max_prompt_length,
                    "max_model_length": longest,
                }
            done: list[Answers | None] = [None] * len(prompts)
            for place, records in self._records(server, bodies, sampling.max_tokens):
                done[place] = self._answers(prompts.select([place]), records, server, sampling)
                if on_group_done is not None:
                    on_group_done(place, done[place])
        return Answers.concatenate(done)

    def _records(self, server: InsideServer, bodies: list[dict], max_response_length: int):
        """Pairs of a place and its records, as they come."""
        arrived: queue.SimpleQueue[tuple[int, list[Record]] | None] = queue.SimpleQueue()

        async def ask_all():
            async with self.environment.client() as client, asyncio.TaskGroup() as tasks:

                async def ask(place: int):
                    records = await self.environment.rollouts(
                        client,
                        bodies[place],
                        vocab_size=self.engine.policy.config.vocab_size,
                        max_response_length=max_response_length,
                    )
                    arrived.put((place, records))

                for place in range(len(bodies)):
                    tasks.create_task(ask(place))

        asking = server.run(ask_all())
        asking.add_done_callback(lambda _: arrived.put(None))
        left = len(bodies)
        try:
            while left:
                found = arrived.get()
                if found is None:
                    self._raise_failure(asking, server)
                left -= 1
                yield found
        finally:
            if left:
                asking.cancel()
            else:
                concurrent.futures.wait([asking], timeout=10.0)  # until its connections are closed

    def _raise_failure(self, asking, server: InsideServer) -> None:
        if server.failed:
            raise RuntimeError("decoding failed while the environment drove it; the log says how")
        try:
            asking.result()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    def _answers(
        self, prompt: Prompts, records: list[Record], server: InsideServer, sampling: SamplingParams
    ) -> Answers:
        """The answers to one row."""
        first = records[0].prompt
        if any(record.prompt != first for record in records):
            raise EnvironmentFailed(
                f"the environment at {self.environment.shown} gave rollouts of one row different "
                "prompt_token_ids; they are compared with each other and share their prompt. Let "
                "it depend on the row alone, or count what differs to the completion, masked 0"
            )
        group = []
        try:
            for r in records:
                group.append(
                    server.ledger.completion(
                        r.prompt, r.tokens, r.trained, sampling, r.finish_reason
                    )
                )
        except NeverSampled as error:
            raise EnvironmentFailed(
                f"the environment at {self.environment.shown}: {error}"
            ) from None
        texts = [self._text(completion) for completion in group]
        transcripts = [
            record.messages or [{"role": "assistant", "content": text}]
            for record, text in zip(records, texts)
        ]
        columns: dict[str, list] = {
            "environments": [EndedEnvironment(REWARD_NAME, record.metrics) for record in records],
            "transcripts": transcripts,
            GIVEN + REWARD_NAME: [record.reward for record in records],
        }
        logged: dict[str, list[float]] = {}
        for record in records:
            for name, value in record.metrics.items():
                logged.setdefault(f"{REWARD_NAME}/{metric_name(name)}", []).append(value)
        return Answers(
            Prompts([first], prompt.columns),
            Completions([group]),
            texts,
            transcripts,
            columns,
            logged,
        )

    def _text(self, completion: Completion) -> str:
        """What the policy wrote, its turns with a newline between."""
        turns = [
            completion.tokens[completion.trained & (completion.turns == turn)]
            for turn in range(int(completion.turns.max(initial=0)) + 1)
        ]
        return "\n".join(self.reading.decoded(self.tokenizer, turns))


def _bodies(
    prompts: Prompts, sampling: SamplingParams, key: jax.Array, step: int, prompt_key: str
) -> list[dict[str, Any]]:
    """What the environment is asked for, a row each, but for the model."""
    settings = {
        name: getattr(sampling, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens")
    }
    seeds = group_seeds(key, prompts)
    return [
        {
            "row": reset_row(row, prompt_key, None),
            "num_rollouts": sampling.n,
            "seeds": np.random.SeedSequence(seed).generate_state(sampling.n).tolist(),
            "step": step,
            "sampling_params": settings,
        }
        for row, seed in zip(rows_of(prompts), seeds)
    ]
