"""The thread that decodes: samples in from the server's event loop, new tokens out to it.

It can be paused, and takes other parameters between two steps.
"""

import asyncio
import contextlib
import enum
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from absl import logging

from adpo_jax.engine.continuous import ContinuousBatch
from adpo_jax.engine.requests import NewTokens, Sample
from adpo_jax.engine.sampling import SamplingParams


class DecodingFailed(Exception):
    """The decoding thread has died; the server cannot go on."""


class Pause(enum.Enum):
    """How decoding stands still: once what is under way has ended, or at once."""

    WAIT = "wait"
    KEEP = "keep"


class _Exchange(NamedTuple):
    """Parameters that wait to be used, and what is told when they are."""

    params: Any
    version: int
    done: asyncio.Future


class Decoding:
    """Decodes in a thread of its own while there is anything to decode.

    All methods are called on the event loop, except `stop`.

    Args:
      batch: a batch that this thread alone uses, except for `submit` and `cancel`.
      loop: the server's event loop, on which new tokens are handed over.
      on_failure: called on the loop when decoding fails.

    Attributes:
      failed: whether the thread has died.
      paused: how decoding is paused; None where it is not.
    """

    def __init__(
        self,
        batch: ContinuousBatch,
        loop: asyncio.AbstractEventLoop,
        on_failure: Callable[[], None] = lambda: None,
    ):
        self.batch = batch
        self.failed = False
        self._loop, self._on_failure = loop, on_failure
        self._wake, self._stopping = threading.Event(), False
        # The queue of each sample that has not ended; touched on the loop alone.
        self._queues: dict[Sample, asyncio.Queue] = {}
        self.paused: Pause | None = None
        self._exchange: _Exchange | None = None
        # Those who wait until decoding stands still; touched on the loop alone.
        self._until_still: list[asyncio.Future] = []
        self._num_pauses = 0
        self._begins = asyncio.Event()  # while requests that arrive begin
        self._begins.set()
        self._num_scoring = 0  # requests whose prompts are being scored; changed on the loop alone
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self.batch.close()

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        seed: int,
        num_alternatives: int,
        queue: asyncio.Queue,
        client: Hashable = None,
    ) -> list[Sample]:
        """Queues the samples of a prompt; their `NewTokens`, or an error, come through `queue`.

        Raises:
          ValueError: as `ContinuousBatch.submit`.
          DecodingFailed: when there is no thread any more.
        """
        if self.failed:
            raise DecodingFailed
        samples = self.batch.submit(
            prompt, sampling, seed=seed, num_alternatives=num_alternatives, client=client
        )
        # No news of them comes before the loop has the next turn.
        self._queues |= dict.fromkeys(samples, queue)
        self._wake.set()
        return samples

    def cancel(self, sample: Sample) -> None:
        """Ends a sample whose further tokens nobody wants."""
        self._queues.pop(sample, None)
        self.batch.cancel(sample)
        self._wake.set()

    async def pause(self, how: Pause) -> None:
        """Lets no further request begin, and returns once decoding stands still.

        With `Pause.WAIT` what is under way ends first; with `Pause.KEEP` it stands still too, until
        `resume`.

        Raises:
          DecodingFailed: when there is no thread any more.
        """
        if self.failed:
            raise DecodingFailed
        self.paused = how
        self._hold(True)
        self._num_pauses += 1
        still = self._loop.create_future()
        self._until_still.append(still)
        self._wake.set()
        await still

    def resume(self) -> None:
        """Ends a pause."""
        self.paused = None
        self._hold(self._exchange is not None)
        self._num_pauses += 1
        self._tell_still(self._num_pauses)
        self._wake.set()

    async def exchange(self, params, version: int) -> None:
        """Puts other parameters in place, and returns when they are.

        What is under way ends under the old ones first, while no further request begins. Only what
        `Pause.KEEP` holds goes on under the new ones.

        Raises:
          DecodingFailed: when there is no thread any more.
        """
        if self.failed:
            raise DecodingFailed
        assert self._exchange is None
        done = self._loop.create_future()
        self._hold(True)
        self._exchange = _Exchange(params, version, done)
        self._wake.set()
        await done

    async def may_begin(self) -> None:
        """Returns once neither a pause nor an exchange keeps a request from beginning.

        Raises:
          DecodingFailed: when there is no thread any more.
        """
        while not self._begins.is_set():  # it may be cleared again before this goes on
            await self._begins.wait()
        if self.failed:
            raise DecodingFailed

    @contextlib.asynccontextmanager
    async def scoring(self):
        """A context in which prompts are scored, all under the same parameters.

        It is entered when a request may begin. A pause and an exchange wait until it is left.

        Raises:
          DecodingFailed: when there is no thread any more.
        """
        await self.may_begin()
        self._num_scoring += 1
        try:
            yield
        finally:
            self._num_scoring -= 1
            self._wake.set()

    def _hold(self, holds: bool):
        self.batch.holds = holds
        (self._begins.clear if holds else self._begins.set)()

    def _run(self):
        try:
            while True:
                # Before anything is looked at, so that whatever changes later ends the next wait.
                self._wake.clear()
                if self._stopping:
                    return
                self._turn()
        except Exception:
            logging.exception("decoding failed")
            self._hand_over(self._fail)

    def _turn(self):
        """One step, or what is done between two of them."""
        # The number is read before the pause and set after it, so that it never names a later one.
        number, batch = self._num_pauses, self.batch
        paused, exchange = self.paused, self._exchange
        # Read after them: while either is set, no scoring begins.
        scoring = self._num_scoring > 0
        may_exchange = not scoring and (paused is Pause.KEEP or not batch.under_way)
        if exchange is not None and may_exchange:
            batch.exchange(exchange.params, exchange.version)
            self._exchange = None
            self._hand_over(self._exchanged, exchange.done)
            return
        if paused is Pause.KEEP:
            if not scoring:
                self._hand_over(self._tell_still, number)
            self._wake.wait()
            return
        news = batch.step()
        if news:
            self._hand_over(self._deliver, news)
            return
        if batch.under_way or (self._exchange is not None and not scoring):
            return
        if paused is not None and not scoring:
            self._hand_over(self._tell_still, number)
        if batch.holds or not batch.busy:
            self._wake.wait()

    def _exchanged(self, done: asyncio.Future):
        self._hold(self.paused is not None)
        _tell(done)
        self._wake.set()

    def _tell_still(self, number: int):
        """Tells those who wait that decoding stands still, if the last pause has this number."""
        if number != self._num_pauses:
            return
        for still in self._until_still:
            _tell(still)
        self._until_still.clear()

    def _hand_over(self, function: Callable, *args):
        # The loop is closed where the process ends without `stop`.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _deliver(self, news: list[NewTokens]):
        for new in news:
            queue = self._queues.get(new.sample)
            if queue is not None:
                queue.put_nowait(new)
            if new.finish_reason:
                self._queues.pop(new.sample, None)

    def _fail(self):
        self.failed = True
        self._begins.set()
        for queue in {id(queue): queue for queue in self._queues.values()}.values():
            queue.put_nowait(DecodingFailed())
        self._queues.clear()
        waiting = [*self._until_still, *([self._exchange.done] if self._exchange else [])]
        for future in waiting:
            if not future.done():
                future.set_exception(DecodingFailed())
        self._on_failure()


def _tell(future: asyncio.Future) -> None:
    if not future.done():  # else nobody waits for it any more
        future.set_result(None)
