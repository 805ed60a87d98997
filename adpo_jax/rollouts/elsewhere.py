"""Rollouts by samplers in other processes, on devices of their own.

The trainer publishes its weights after every update, hands out groups (`dispatch`) in the order of
`pacing`, and trains on those that come back. Samplers are started, watched and restarted by
whatever runs the machines; here they come and go.

With `max_staleness` 0 an iteration's groups are sampled by its own weights. With one sampler the
run is then the same, bit for bit, as one that samples for itself, since the sampler makes the very
same call of the engine; where groups are filtered, the same calls one after the other.

Several processes may train. The first one speaks to the samplers and tells the others.
"""

import contextlib
import dataclasses
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adpo_jax.devices import distributed
from adpo_jax.engine import schedule as schedule_lib
from adpo_jax.engine.sampling import sample_keys
from adpo_jax.records import Completion, Completions, GradedGroups, Prompts
from adpo_jax.rewards import RewardError, Scores
from adpo_jax.rollouts import wire
from adpo_jax.rollouts.dispatch import LEASE_S, Dispatch, Work
from adpo_jax.rollouts.filtering import GroupFilter
from adpo_jax.rollouts.flight import (
    ExpertLimits,
    Flight,
    FlightFiles,
    FlyingSample,
    Limits,
    age_metrics,
)
from adpo_jax.rollouts.group_decoding import Numbering
from adpo_jax.rollouts.pacing import Pacing
from adpo_jax.rollouts.sampler import Sampler
from adpo_jax.rollouts.sieve import Judging, Sieve
from adpo_jax.rollouts.source import Source
from adpo_jax.rollouts.weights import Versions, WeightsFolder, name_of_run
from adpo_jax.serve.samplers import Refused, SamplersHost

# Seconds that a sampler's question may wait for news, well below the lease.
POLL_S = 5.0
# Seconds without any sampler after which the trainer says that it waits, and again.
_TELL_S = 30.0


class Reception:
    """Answers the samplers' requests; a `serve.samplers.Desk`.

    Args:
      versions: the weights that they may take.
      fits: what a sampler must have in common with this run, by name.
      tells: what samplers are told at their hello, beside the run's name.
      limits: keyword arguments of `wire.read_groups`.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        versions: Versions,
        fits: dict[str, Any],
        tells: dict[str, Any],
        limits: dict[str, Any],
    ):
        self._dispatch, self._versions = dispatch, versions
        self._fits, self._tells, self._limits = fits, tells, limits
        self.run = secrets.token_hex(8)

    def hello(self, fits: dict[str, Any]) -> dict[str, Any]:
        given = fits.get("fits")
        given = given if isinstance(given, dict) else {}
        for name, value in self._fits.items():
            if given.get(name) != value:
                raise Refused(
                    f"this sampler is of another run: its {name} is {given.get(name)!r:.100}, the "
                    f"trainer's {value!r:.100}. Start both with the same config",
                    409,
                )
        return {"run": self.run, **self._tells}

    def order(self, asked: dict[str, Any]) -> dict[str, Any]:
        name, holds = asked.get("name"), asked.get("holds")
        room, version = asked.get("room"), asked.get("version")
        wait = asked.get("wait", POLL_S)
        ok = isinstance(name, str) and 1 <= len(name) <= 100 and isinstance(holds, list)
        ok = ok and type(wait) in (int, float) and wait >= 0
        if not ok or not all(type(x) is int for x in (*holds, room, version)):
            raise Refused("an order is asked for with name, holds, room, version and wait")
        self._check_run(asked.get("run"))
        order = self._dispatch.order(name, holds, max(room, 0), version, min(wait, POLL_S))
        works = [
            {"number": work.number, "prompt": work.prompt, "keys": work.keys.tolist()}
            for work in order.works
        ]
        return {
            "version": order.version,
            "works": works,
            "dropped": order.dropped,
            "finished": order.finished,
        }

    def alive(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._check_run(asked.get("run"))
        self._dispatch.alive(str(asked.get("name")))
        return {}

    def deliver(self, name: str, run: str, content: bytes) -> dict[str, Any]:
        self._check_run(run)
        try:
            groups = wire.read_groups(content, **self._limits, last_version=self._dispatch.version)
            taken = [n for n, group in groups.items() if self._dispatch.deliver(name, n, group)]
        except ValueError as error:
            raise Refused(str(error)) from None
        return {"taken": taken}

    def weights(self, version: int) -> tuple[bytes, str]:
        manifest = self._versions.manifest(version)
        if manifest is None:
            raise Refused(f"there are no weights of version {version} any more", 404)
        return manifest, wire.digest_of(manifest)

    def tensors(self, version: int, names: list[str]) -> list[memoryview]:
        found = self._versions.tensors(version, names)
        if found is None:
            raise Refused(f"there are no such tensors of version {version} here", 404)
        return found

    def _check_run(self, run: Any) -> None:
        if run != self.run:
            raise Refused("the trainer has started again since; say hello to it", 410)


class Elsewhere(Source):
    """Groups that samplers in other processes decode.

    Args:
      sampler: its settings, rewards and reading are used; its engine is not.
      prompts_of: number of a batch, from 0 -> its prompts.
      folder: the folder that `save` writes in.
      fits: what a sampler must have in common with this run.
      weights_of: the parameters -> what samplers need of them (adapters alone, where there are
        such).
      vocab_size: token ids are below this.
      address: host and port for samplers.
      key: the key that they must know.
      batch_size, num_steps, max_staleness, ahead, sieve: as of `ahead.Ahead`. Without staleness
        groups are filtered by `FilteredElsewhere`.
      weights_folder: a folder on shared storage, in which samplers find the weights; "" where the
        trainer sends them.

    Raises:
      ValueError: for an address or a folder that cannot be used.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts_of: Callable[[int], Prompts],
        folder: Path,
        *,
        fits: dict[str, Any],
        weights_of: Callable[[Any], Any],
        vocab_size: int,
        address: tuple[str, int],
        key: str,
        batch_size: int,
        num_steps: int,
        max_staleness: int,
        ahead: int,
        sieve: Sieve | None = None,
        weights_folder: str = "",
    ):
        assert not sieve or max_staleness
        self._sampler, self._weights_of = sampler, weights_of
        self._sieve, self._num_steps = sieve, num_steps
        self._numbering = Numbering(prompts_of, batch_size, sampler.seed, sampler.sampling.n)
        experts = ExpertLimits.of(sampler.engine, sampler.sampling)
        limits = Limits(
            sampler.sampling.n, sampler.sampling.max_tokens, vocab_size, experts=experts
        )
        self._files = FlightFiles(folder, limits, owner="samplers")
        self._pacing = Pacing(
            batch_size, max_staleness, ahead, num_groups=None if sieve else num_steps * batch_size
        )
        self._flights: dict[int, Flight] = {0: Flight()}
        self._dispatch = Dispatch(lease_s=LEASE_S)
        shared = None
        if weights_folder and distributed.is_leader():
            shared = WeightsFolder(weights_folder, lambda: name_of_run(folder))
        self._versions = Versions(shared)
        sampling = sampler.sampling
        self._reception = Reception(
            self._dispatch,
            self._versions,
            fits,
            {"whole_calls": max_staleness == 0, "weights": str(shared.path) if shared else ""},
            {
                "n": sampling.n,
                "max_response_length": sampling.max_tokens,
                "vocab_size": vocab_size,
                "has_full_log_probs": sampling.full_log_probs,
                "experts": experts,
            },
        )
        self._host = None
        if distributed.is_leader():
            host, port = address
            self._host = SamplersHost(self._reception, host=host, port=port, key=key)
        self._started = False
        self._offered = -1  # the step whose weights were published last
        self._num_asked = 0  # groups, where each iteration asks for its own

    @property
    def address(self) -> str:
        """host:port where samplers find the trainer."""
        return self._host.address

    def end(self) -> None:
        """Tells the samplers that the run is over."""
        if self._started:
            self._dispatch.finish(timeout=2 * POLL_S)

    def close(self) -> None:
        """Ends the server. Samplers wait for the trainer to come back, unless the run is over."""
        if self._host is not None:
            self._host.close()

    def next(self, step: int, params) -> GradedGroups:
        """See `Source`; the same on every process.

        Raises:
          RewardError: when a reward function fails on any process.
          SourceError: when what iteration `step` left in flight was not kept.
        """
        if not self._pacing.max_staleness:
            return self.sample(step, None, self._numbering.prompts_of(step), params)
        began, found, judging = time.perf_counter(), None, Judging(self._sieve)
        self._offer(step, params)
        with self._keeping_samples(step):
            with distributed.fail_together():
                before = self._flight(step)
                if self._host is not None:
                    found = self._chosen(step, before, judging)
            chosen, groups, after, counts = distributed.all_gather(found)[0]
        self._flights = {step: before, step + 1: after}
        seconds = time.perf_counter() - began
        if self._sieve is None:
            groups = self._graded(step, self._numbering.prompts(chosen), groups)
        return _told(groups, step, seconds, counts)

    def sample(self, step: int, attempt: int | None, prompts: Prompts, params) -> GradedGroups:
        """The completions of prompts by the weights of a step, those that `Sampler` gives.

        It is for `max_staleness` 0.

        Raises:
          RewardError: when a reward function fails on any process.
        """
        began, found = time.perf_counter(), None
        self._offer(step, params)
        with distributed.fail_together():
            if self._host is not None:
                found = self._called(step, attempt, prompts)
        completions, counts = distributed.all_gather(found)[0]
        seconds = time.perf_counter() - began
        return _told(self._graded(step, prompts, completions), step, seconds, counts)

    def _offer(self, step: int, params) -> None:
        """Has samplers find the weights of a step."""
        if self._offered == step:
            return
        self._offered = step
        host_params = distributed.fetch(self._weights_of(params))
        with distributed.fail_together():
            if self._host is not None:
                self._versions.add(step, host_params)

    def _graded(
        self, step: int, prompts: Prompts, completions: list[list[Completion]]
    ) -> GradedGroups:
        """Groups graded, of which each process grades its share."""
        with self._keeping_samples(step), distributed.fail_together():
            rows = distributed.own_rows(len(prompts))
            answers = self._sampler.of_one_turn(
                prompts.select(rows), Completions([completions[row] for row in rows])
            )
            mine = self._sampler.graded(step, answers)
        return GradedGroups.concatenate(distributed.all_gather(mine))

    @contextlib.contextmanager
    def _keeping_samples(self, step: int) -> Iterator[None]:
        """Keeps the sample of which a reward function fails."""
        try:
            yield
        except RewardError as error:
            self._sampler.keep_sample(step, error)
            raise

    # --- on the first process, which speaks to the samplers

    def _called(
        self, step: int, attempt: int | None, prompts: Prompts
    ) -> tuple[list[list[Completion]], dict[str, float]]:
        """The completions of prompts that are asked for now, and counts."""
        key = jax.random.fold_in(jax.random.key(self._sampler.seed), step)
        if attempt is not None:
            key = jax.random.fold_in(key, attempt)
        arrays = [np.asarray(prompt, np.int32) for prompt in prompts.token_ids]
        keys = np.asarray(sample_keys(key, schedule_lib.prompt_uids(arrays), self._numbering.n))
        numbers = range(self._num_asked, self._num_asked + len(prompts))
        self._num_asked += len(prompts)
        works = zip(numbers, prompts.token_ids, keys, strict=True)
        works = [Work(number, list(map(int, prompt)), key) for number, prompt, key in works]
        self._open()
        with self._counted() as counts:
            self._dispatch.publish(step, works)
            told = time.monotonic()
            while len(whole := self._dispatch.whole()) < len(numbers):
                told = self._wait_for_more(step, len(whole), told)
        completions = self._dispatch.take(numbers)
        return [completions[number] for number in numbers], counts | {"ahead/in_flight": 0.0}

    def _chosen(self, step: int, before: Flight, judging: Judging):
        """What is trained on of groups ahead, and what stays in flight.

        Returns:
          The numbers of the groups, their completions (graded groups where there is a sieve), the
          flight that is left, and counts.
        """
        dispatch, works = self._dispatch, []
        if not self._started:
            whole = {
                n: [sample.completion() for sample in group] for n, group in before.groups.items()
            }
            dispatch.restore(whole)
            works += self._works([n for n in before.admitted_at if n not in whole])
        self._open()
        there, new = self._admitted(step, before)
        with self._counted() as counts:
            dispatch.publish(step, works + self._works(new))
            chosen, there = self._until_chosen(step, there, judging)
        completions = dispatch.take(chosen)
        gone = set(chosen)
        kept = {n: g for n, g in dispatch.kept().items() if n not in gone}
        kept = {n: tuple(map(FlyingSample.of, group)) for n, group in sorted(kept.items())}
        after = there.without(chosen, kept)
        counts["ahead/in_flight"] = float(len(after.admitted_at))
        if self._sieve is None:
            return chosen, [completions[number] for number in chosen], after, counts
        judged = Scores.concatenate(judging.scores)
        return chosen, judging.told(judging.joined(chosen, {}), judged), after, counts

    def _admitted(self, step: int, before: Flight) -> tuple[Flight, range]:
        """The flight with the groups that start now, and their numbers."""
        in_flight = len(before.admitted_at)
        new = self._pacing.admitted(before.next_number, in_flight)
        if self._sieve is not None:  # those that were dropped count for nothing
            left = (self._num_steps - step) * self._pacing.batch_size - in_flight
            new = new[: max(left, 0)]
        there = Flight(
            before.groups,
            before.admitted_at | dict.fromkeys(new, step),
            before.owners | dict.fromkeys(new, 0),
            before.next_number + len(new),
        )
        return there, new

    def _until_chosen(self, step: int, there: Flight, judging: Judging) -> tuple[list[int], Flight]:
        """Waits until the iteration has its groups; returns their numbers, and the flight."""
        told = time.monotonic()
        while True:
            whole = [n for n in self._dispatch.whole() if n in there.admitted_at]
            if new := judging.new(whole):
                kept = self._dispatch.kept()
                answers = self._sampler.of_one_turn(
                    self._numbering.prompts(new), Completions([kept[number] for number in new])
                )
                judging.take(new, self._sampler.graded(step, answers))
            if dropped := judging.dropped(sorted(judging.without_spread)):
                self._dispatch.take(dropped)
                there, new = self._admitted(step, there.without(dropped, {}))
                self._dispatch.publish(step, self._works(new))
                whole = [number for number in whole if number not in set(dropped)]
            chosen = self._pacing.chosen(step, there.admitted_at, whole)
            if chosen is not None:
                return chosen, there
            told = self._wait_for_more(step, len(self._dispatch.whole()), told)

    def _open(self) -> None:
        """Lets samplers in."""
        if not self._started:
            self._started = True
            self._host.start()
            told = f"samplers find this run at --trainer={self._host.address}"
            print(told, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[dict[str, float]]:
        """Counts what happens meanwhile."""
        dispatch, counts, began = self._dispatch, {}, time.perf_counter()
        taken_back, doubles = dispatch.num_taken_back, dispatch.num_doubles
        yield counts
        counts |= {
            "ahead/waited": time.perf_counter() - began,
            "samplers/connected": float(dispatch.num_samplers),
            "samplers/taken_back": float(dispatch.num_taken_back - taken_back),
            "samplers/doubles": float(dispatch.num_doubles - doubles),
        }

    def _wait_for_more(self, step: int, num_whole: int, told: float) -> float:
        """Waits a while for more whole groups than these.

        Args:
          told: when there was a sampler, or it was told that there is none.

        Returns:
          The same, by now.
        """
        self._dispatch.wait_for_more(num_whole, timeout=1.0)
        if self._dispatch.num_samplers:
            return time.monotonic()
        if time.monotonic() - told > _TELL_S:
            print(
                f"no sampler is connected; iteration {step + 1} waits for one at "
                f"{self._host.address}",
                file=sys.stderr,
                flush=True,
            )
            return time.monotonic()
        return told

    def _works(self, numbers) -> list[Work]:
        numbers = list(numbers)
        if not numbers:
            return []
        prompts = self._numbering.prompts(numbers).token_ids
        keys = map(self._numbering.keys, numbers)
        return [
            Work(n, list(map(int, prompt)), key) for n, prompt, key in zip(numbers, prompts, keys)
        ]

    # --- what is in flight, on disk

    def save(self, step: int, *, oldest: int = 0) -> None:
        """Saves the whole groups that iteration `step` left; others are sampled again."""
        if self._pacing.max_staleness:
            self._files.save(step, self._flight(step), oldest=oldest)

    def check(self, step: int) -> None:
        """Checks that what iteration `step` left in flight was kept.

        Raises:
          SourceError: when it was not.
        """
        if self._pacing.max_staleness:
            self._flight(max(step, 0))

    def restore(self, step: int) -> None:
        """Takes up what iteration `step` left in flight; errors as of `check`."""
        self.check(step)

    def _flight(self, step: int) -> Flight:
        if step not in self._flights:
            self._flights = {step: self._files.load(step)}
        return self._flights[step]


class FilteredElsewhere(GroupFilter):
    """Groups with a spread that samplers in other processes decode, without staleness.

    Args:
      elsewhere: decodes each batch.
      prompts_of, folder, max_attempts, min_reward_std: as of `GroupFilter`.
    """

    def __init__(self, elsewhere: Elsewhere, prompts_of, folder: Path, **filtering):
        super().__init__(elsewhere.sample, prompts_of, folder, **filtering)
        self._elsewhere = elsewhere

    @property
    def address(self) -> str:
        """host:port where samplers find the trainer."""
        return self._elsewhere.address

    def end(self) -> None:
        """Tells the samplers that the run is over."""
        self._elsewhere.end()

    def close(self) -> None:
        """Ends the server."""
        self._elsewhere.close()


def _told(
    groups: GradedGroups, step: int, seconds: float, counts: dict[str, float]
) -> GradedGroups:
    """Groups with the metrics of how they were sampled, in so many seconds."""
    tokens = int(groups.completions.lengths.sum())
    metrics = counts | age_metrics(groups, step)
    metrics["rollout/tokens_per_s"] = tokens / max(seconds, 1e-9)
    return dataclasses.replace(
        groups, seconds=(seconds, groups.seconds[1]), metrics=groups.metrics | metrics
    )
