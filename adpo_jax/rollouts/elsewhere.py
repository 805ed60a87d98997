"""Rollouts by samplers in other processes, on devices of their own.

The trainer publishes its weights after every update, hands out groups (`dispatch`), and trains on
those that come back. Samplers are started, watched and restarted by whatever runs the machines;
here they come and go.

With `max_staleness` 0 an iteration's groups are sampled by its own weights (`RemoteBatches`). With
one sampler the run is then the same, bit for bit, as one that samples for itself, since the sampler
makes the very same call of the engine; where groups are filtered, the same calls one after the
other. With `max_staleness` above 0 see `elsewhere_ahead`.

Several processes may train. The first one speaks to the samplers and tells the others.
"""

import contextlib
import dataclasses
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adpo_jax.devices import distributed
from adpo_jax.engine.sampling import prompt_uids, sample_keys
from adpo_jax.records import Completion, Completions, GradedGroups, Prompts
from adpo_jax.rollouts import wire
from adpo_jax.rollouts.dispatch import LEASE_S, Dispatch, Work
from adpo_jax.rollouts.filtering import GroupFilter
from adpo_jax.rollouts.flight import ExpertLimits, age_metrics
from adpo_jax.rollouts.numbering import Numbering
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

    def require(self, fits: dict[str, Any]) -> None:
        """Adds to what a sampler must have in common with this run."""
        self._fits = self._fits | fits

    def hello(self, fits: dict[str, Any]) -> dict[str, Any]:
        given = fits.get("fits")
        given = given if isinstance(given, dict) else {}
        for name, value in self._fits.items():
            if given.get(name) != value:
                raise Refused(
                    f"this sampler is of another run: its {name} is {given.get(name)!r:.100}, the "
                    f"trainer's {value!r:.100}. Start both with the same config and the same model",
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


class RemoteSamplers(Source):
    """Samplers in other processes, which decode groups; the sources below say which and when.

    Args:
      sampler: its settings, rewards and reading are used; its engine does not sample.
      prompts_of: number of a batch, from 0 -> its prompts.
      folder: the folder of what is in flight, inside the run's; it names the run's weights too.
      fits: what a sampler must have in common with this run.
      fits_of_params: the parameters -> what it must have in common with them.
      weights_of: the parameters -> what samplers need of them (adapters alone, where there are
        such).
      address: host and port for samplers.
      key: the key that they must know.
      batch_size: prompts of a batch.
      weights_folder: a folder on shared storage, in which samplers find the weights; "" where the
        trainer sends them.

    Attributes:
      whole_calls: whether a sampler decodes all groups that are asked for in one call.

    Raises:
      ValueError: for an address or a folder that cannot be used, and for groups that are too large
        to be sent.
    """

    whole_calls: bool

    def __init__(
        self,
        sampler: Sampler,
        prompts_of: Callable[[int], Prompts],
        folder: Path,
        *,
        fits: dict[str, Any],
        fits_of_params: Callable[[Any], dict[str, Any]],
        weights_of: Callable[[Any], Any],
        address: tuple[str, int],
        key: str,
        batch_size: int,
        weights_folder: str = "",
    ):
        self._sampler, self._weights_of = sampler, weights_of
        self._fits_of_params = fits_of_params
        sampling = sampler.sampling
        self._numbering = Numbering(prompts_of, batch_size, sampler.seed, sampling.n)
        self._dispatch = Dispatch(lease_s=LEASE_S)
        shared = None
        if weights_folder and distributed.is_leader():
            shared = WeightsFolder(weights_folder, lambda: name_of_run(folder))
        self._versions = Versions(shared)
        limits = {
            "n": sampling.n,
            "max_response_length": sampling.max_tokens,
            "has_full_log_probs": sampling.full_log_probs,
            "experts": ExpertLimits.of(sampler.engine, sampling),
        }
        self._reception = Reception(
            self._dispatch,
            self._versions,
            fits,
            {"whole_calls": self.whole_calls, "weights": str(shared.path) if shared else ""},
            limits | {"vocab_size": sampler.engine.policy.config.vocab_size},
        )
        most = wire.most_bytes(max_prompt_length=sampler.engine.max_prompt_length, **limits)
        self._host = None
        if distributed.is_leader():
            host, port = address
            self._host = SamplersHost(
                self._reception, host=host, port=port, key=key, max_group_bytes=most
            )
        self._started = False
        self._offered = -1  # the step whose weights were published last

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

    def _offer(self, step: int, params) -> None:
        """Has samplers find the weights of a step."""
        if self._offered == step:
            return
        if self._offered < 0:  # no sampler has been let in
            self._reception.require(self._fits_of_params(params))
        self._offered = step
        host_params = distributed.fetch(self._weights_of(params))
        with distributed.fail_together():
            if self._host is not None:
                self._versions.add(step, host_params)

    def _graded(
        self, step: int, prompts: Prompts, completions: list[list[Completion]]
    ) -> GradedGroups:
        """Groups graded, of which each process grades its share."""
        with self._sampler.keeping_samples(step), distributed.fail_together():
            rows = distributed.own_rows(len(prompts))
            answers = self._sampler.of_one_turn(
                prompts.select(rows), Completions([completions[row] for row in rows])
            )
            mine = self._sampler.graded(step, answers)
        return GradedGroups.concatenate(distributed.all_gather(mine))

    # --- on the first process, which speaks to the samplers

    def _open(self) -> None:
        """Lets samplers in."""
        if not self._started:
            self._started = True
            self._host.start()
            where = f"samplers find this run at --trainer={self._host.address}"
            print(where, file=sys.stderr, flush=True)

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

    def _wait_for_more(self, step: int, num_whole: int, last_notice: float) -> float:
        """Waits a while for more whole groups than these.

        Args:
          last_notice: time at which a sampler was last connected, or its absence last printed.

        Returns:
          The updated time.
        """
        self._dispatch.wait_for_more(num_whole, timeout=1.0)
        if self._dispatch.num_samplers:
            return time.monotonic()
        if time.monotonic() - last_notice > _TELL_S:
            print(
                f"no sampler is connected; iteration {step + 1} waits for one at "
                f"{self._host.address}",
                file=sys.stderr,
                flush=True,
            )
            return time.monotonic()
        return last_notice


class RemoteBatches(RemoteSamplers):
    """Batches that are sampled by the weights of their iteration, without staleness."""

    whole_calls = True
    _num_asked = 0  # groups so far

    def next(self, step: int, params) -> GradedGroups:
        """See `sample`."""
        return self.sample(step, None, self._numbering.prompts_of(step), params)

    def sample(self, step: int, attempt: int | None, prompts: Prompts, params) -> GradedGroups:
        """The completions of prompts by the weights of a step, those that `Sampler` gives.

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
        groups = self._graded(step, prompts, completions)
        return with_sampling_metrics(groups, step, seconds, counts)

    # --- on the first process, which speaks to the samplers

    def _called(
        self, step: int, attempt: int | None, prompts: Prompts
    ) -> tuple[list[list[Completion]], dict[str, float]]:
        """The completions of prompts that are asked for now, and counts."""
        key = self._sampler.key(step, attempt)
        keys = np.asarray(sample_keys(key, prompt_uids(prompts.token_ids), self._numbering.n))
        numbers = range(self._num_asked, self._num_asked + len(prompts))
        self._num_asked += len(prompts)
        self._open()
        with self._counted() as counts:
            self._dispatch.publish(step, works(numbers, prompts.token_ids, keys))
            last_notice = time.monotonic()
            while len(whole := self._dispatch.whole()) < len(numbers):
                last_notice = self._wait_for_more(step, len(whole), last_notice)
        completions = self._dispatch.take(numbers)
        return [completions[number] for number in numbers], counts | {"ahead/in_flight": 0.0}


class FilteredBatches(GroupFilter):
    """Groups with a spread that samplers in other processes decode, without staleness.

    Args:
      batches: decodes each batch.
      prompts_of, folder, max_attempts, min_reward_std: as of `GroupFilter`.
    """

    def __init__(self, batches: RemoteBatches, prompts_of, folder: Path, **filtering):
        super().__init__(batches.sample, prompts_of, folder, **filtering)
        self._batches = batches

    def next(self, step: int, params) -> GradedGroups:
        """See `GroupFilter`; the ages are those of what is trained on, groups that waited too."""
        groups = super().next(step, params)
        return dataclasses.replace(groups, metrics=groups.metrics | age_metrics(groups, step))

    @property
    def address(self) -> str:
        """host:port where samplers find the trainer."""
        return self._batches.address

    def end(self) -> None:
        """Tells the samplers that the run is over."""
        self._batches.end()

    def close(self) -> None:
        """Ends the server."""
        self._batches.close()


def works(
    numbers: Iterable[int], token_ids: Iterable[Sequence[int]], keys: Iterable[np.ndarray]
) -> list[Work]:
    """Groups to be sampled, from their numbers, their prompts and the keys of their samples."""
    groups = zip(numbers, token_ids, keys, strict=True)
    return [Work(number, list(map(int, prompt)), key) for number, prompt, key in groups]


def with_sampling_metrics(
    groups: GradedGroups,
    step: int,
    seconds: float,
    counts: dict[str, float],
    tokens_dropped: int = 0,
) -> GradedGroups:
    """Groups with the metrics of how they were sampled.

    Args:
      seconds: of the iteration's sampling.
      counts: further metrics.
      tokens_dropped: of groups that were sampled beside these, and dropped.
    """
    tokens = int(groups.completions.lengths.sum()) + tokens_dropped
    metrics = counts | age_metrics(groups, step)
    metrics["rollout/tokens_per_s"] = tokens / max(seconds, 1e-9)
    return dataclasses.replace(
        groups, seconds=(seconds, groups.seconds[1]), metrics=groups.metrics | metrics
    )
