"""Rollouts by samplers in other processes, on devices of their own.

The trainer publishes its weights after every update, hands out groups (`dispatch`) in the order of
`pacing`, and trains on those that come back. Samplers are started, watched and restarted by
whatever runs the machines; here they come and go.

With `max_staleness` 0 an iteration's groups are sampled by its own weights. With one sampler the
run is then the same, bit for bit, as one that samples for itself, since the sampler makes the very
same call of the engine.

Several processes may train. The first one speaks to the samplers and tells the others.
"""

import dataclasses
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adpo_jax.devices import distributed
from adpo_jax.engine import schedule as schedule_lib
from adpo_jax.engine.sampling import sample_keys
from adpo_jax.records import Completions, GradedGroups, Prompts
from adpo_jax.rewards import RewardError
from adpo_jax.rollouts import wire
from adpo_jax.rollouts.dispatch import LEASE_S, Dispatch, Work
from adpo_jax.rollouts.flight import (
    Flight,
    FlightFiles,
    FlyingSample,
    Limits,
    age_metrics,
)
from adpo_jax.rollouts.group_decoding import Numbering
from adpo_jax.rollouts.pacing import Pacing
from adpo_jax.rollouts.sampler import Sampler
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
        except wire.WireError as error:
            raise Refused(str(error)) from None
        taken = [n for n, group in groups.items() if self._dispatch.deliver(name, n, group)]
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
      batch_size, num_steps, max_staleness, ahead: as of `ahead.Ahead`.
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
        weights_folder: str = "",
    ):
        self._sampler, self._weights_of = sampler, weights_of
        self._numbering = Numbering(prompts_of, batch_size, sampler.seed, sampler.sampling.n)
        limits = Limits(sampler.sampling.n, sampler.sampling.max_tokens, vocab_size)
        self._files = FlightFiles(folder, limits, owner="samplers")
        self._pacing = Pacing(batch_size, max_staleness, ahead, num_groups=num_steps * batch_size)
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
            },
        )
        self._host = None
        if distributed.is_leader():
            host, port = address
            self._host = SamplersHost(self._reception, host=host, port=port, key=key)
        self._started = False

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
        began = time.perf_counter()
        host_params = distributed.fetch(self._weights_of(params))
        found = None
        with distributed.fail_together():
            before = self._flight(step)
            if self._host is not None:
                self._versions.add(step, host_params)
            del host_params
            if self._host is not None:
                found = self._sampled(step, before)
        chosen, groups, after, counts = distributed.all_gather(found)[0]
        self._flights = {step: before, step + 1: after}
        seconds = time.perf_counter() - began
        try:
            with distributed.fail_together():
                rows = distributed.own_rows(len(chosen))
                answers = self._sampler.of_one_turn(
                    self._numbering.prompts([chosen[row] for row in rows]),
                    Completions([groups[row] for row in rows]),
                )
                mine = self._sampler.graded(step, answers)
        except RewardError as error:
            self._sampler.keep_sample(step, error)
            raise
        together = GradedGroups.concatenate(distributed.all_gather(mine))
        tokens = int(together.completions.lengths.sum())
        metrics = {
            **counts,
            **age_metrics(together, step),
            "rollout/tokens_per_s": tokens / max(seconds, 1e-9),
        }
        return dataclasses.replace(
            together, seconds=(seconds, together.seconds[1]), metrics=metrics
        )

    def _sampled(self, step: int, before: Flight):
        """The first process's part of `next`: what is trained on, and what stays in flight."""
        dispatch, works = self._dispatch, []
        if not self._started:
            self._started = True
            whole = {
                n: [sample.completion() for sample in group] for n, group in before.groups.items()
            }
            dispatch.restore(whole)
            works += self._works([n for n in before.admitted_at if n not in whole])
            self._host.start()
            told = f"samplers find this run at --trainer={self._host.address}"
            print(told, file=sys.stderr, flush=True)
        new = self._pacing.admitted(before.next_number, len(before.admitted_at))
        admitted_at = before.admitted_at | dict.fromkeys(new, step)
        dispatch.publish(step, works + self._works(new))
        taken_back, doubles = dispatch.num_taken_back, dispatch.num_doubles
        began = time.perf_counter()
        chosen = self._wait_for_groups(step, admitted_at)
        waited = time.perf_counter() - began
        completions = dispatch.take(chosen)
        gone = set(chosen)
        kept = {n: g for n, g in dispatch.kept().items() if n not in gone}
        left = {n: at for n, at in admitted_at.items() if n not in gone}
        after = Flight(
            {n: tuple(map(FlyingSample.of, group)) for n, group in sorted(kept.items())},
            left,
            dict.fromkeys(left, 0),
            before.next_number + len(new),
        )
        counts = {
            "ahead/in_flight": float(len(left)),
            "ahead/waited": waited,
            "samplers/connected": float(dispatch.num_samplers),
            "samplers/taken_back": float(dispatch.num_taken_back - taken_back),
            "samplers/doubles": float(dispatch.num_doubles - doubles),
        }
        return chosen, [completions[number] for number in chosen], after, counts

    def _wait_for_groups(self, step: int, admitted_at: dict[int, int]) -> list[int]:
        told = time.monotonic()
        while True:
            whole = [n for n in self._dispatch.whole() if n in admitted_at]
            chosen = self._pacing.chosen(step, admitted_at, whole)
            if chosen is not None:
                return chosen
            self._dispatch.wait_for_more(len(whole), timeout=1.0)
            if self._dispatch.num_samplers:
                told = time.monotonic()
            elif time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                print(
                    f"no sampler is connected; iteration {step + 1} waits for one at "
                    f"{self._host.address}",
                    file=sys.stderr,
                    flush=True,
                )

    def _works(self, numbers) -> list[Work]:
        numbers = list(numbers)
        if not numbers:
            return []
        prompts = self._numbering.prompts(numbers).token_ids
        if self._pacing.max_staleness == 0:
            keys = self._keys_of_a_batch(numbers[0] // self._numbering.batch_size, prompts)
        else:
            keys = [self._numbering.keys(number) for number in numbers]
        return [
            Work(n, list(map(int, prompt)), key) for n, prompt, key in zip(numbers, prompts, keys)
        ]

    def _keys_of_a_batch(self, batch: int, prompts: list) -> np.ndarray:
        """[P, G, 2]: those that an engine gives the samples when it is asked for the batch."""
        key = jax.random.fold_in(jax.random.key(self._sampler.seed), batch)
        arrays = [np.asarray(prompt, np.int32) for prompt in prompts]
        return np.asarray(sample_keys(key, schedule_lib.prompt_uids(arrays), self._numbering.n))

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
        if self._pacing.max_staleness:
            self.check(step)
        else:
            P = self._numbering.batch_size
            self._flights = {step: Flight(next_number=step * P)}

    def _flight(self, step: int) -> Flight:
        if step not in self._flights:
            self._flights = {step: self._files.load(step)}
        return self._flights[step]
