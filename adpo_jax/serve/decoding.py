"""The thread that decodes: samples in from the server's event loop, new tokens out to it."""

import asyncio
import threading
from collections.abc import Callable, Hashable

from absl import logging

from adpo_jax.engine.continuous import ContinuousBatch, NewTokens, Sample
from adpo_jax.engine.sampling import SamplingParams


class DecodingFailed(Exception):
    """The decoding thread has died; the server cannot go on."""


class Decoding:
    """Decodes in a thread of its own while there is anything to decode.

    Args:
      batch: a batch that this thread alone uses, except for `submit` and `cancel`.
      loop: the server's event loop, on which new tokens are handed over.
      on_failure: called on the loop when decoding fails.
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

        Called on the loop.

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
        """Ends a sample whose further tokens nobody wants. Called on the loop."""
        self._queues.pop(sample, None)
        self.batch.cancel(sample)
        self._wake.set()

    def _run(self):
        try:
            while not self._stopping:
                self._wake.clear()
                news = self.batch.step()
                if news:
                    self._hand_over(self._deliver, news)
                elif not self.batch.busy:
                    self._wake.wait()
        except Exception:
            logging.exception("decoding failed")
            self._hand_over(self._fail)

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
        for queue in {id(queue): queue for queue in self._queues.values()}.values():
            queue.put_nowait(DecodingFailed())
        self._queues.clear()
        self._on_failure()
