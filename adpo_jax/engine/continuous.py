"""Continuous batching of requests that come and go while others decode: the engine for a server.

    batch = ContinuousBatch(engine, params)
    samples = batch.submit(prompt, SamplingParams(n=2, temperature=0.7), seed=1)
    while batch.busy:
        for new in batch.step():
            new.sample, new.tokens, new.log_probs, new.finish_reason

Each request has settings of its own. A request with a seed gets the completions that
`Engine.generate` gives for `jax.random.key(seed)`, whatever runs beside it.

`exchange` puts other parameters in place between two steps. With `holds` set no further request
begins, so that those under way can end first.

The loop is that of `batching`. Here batch, ring and prefix rows grow through a few sizes as the
load asks for it, and shrink when it is gone. A sample has a prefix row of its own, or shares one
with other samples of its request where sharing makes the rows few.

Text and stop strings are not known here (`text_stream`).
"""

import collections
import dataclasses
import functools
import threading
from collections.abc import Hashable, Sequence

import jax
import numpy as np

from adpo_jax.engine import cache_plan, reading, sampling
from adpo_jax.engine.batching import DecodeLoop
from adpo_jax.engine.decode_state import Sizes
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.patience import Patience, own_settings
from adpo_jax.engine.programs import Programs
from adpo_jax.engine.requests import NewTokens, Request, Sample
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.engine.schedule import Schedule
from adpo_jax.engine.scoring import Scorer
from adpo_jax.engine.sizes import (
    COLUMN_STEP,
    column_buckets,
    length_bucket,
    power_of_two,
    smallest_holding,
    up_to_multiple,
    whole_tiles,
)

# One program finds so many of the likeliest tokens; a request is given the first of them.
MAX_ALTERNATIVES = 20
# Each size is a fourth of the next: at most 3 x 3 x 3 programs, twice where rows are shared.
SIZE_STEPS = (16, 4, 1)
# The most samples of a shared prefix row. There are rows for twice as many samples as slots.
SHARED_WIDTH = 8


@dataclasses.dataclass(frozen=True)
class LoadSizing:
    """The sizes that follow the load; see `batching.Sizing`.

    Attributes:
      slot_sizes, column_sizes, prefix_sizes: the sizes that there are programs for, rising.
      steps: the most decode steps of a dispatch.
      num_shards: devices that slots and rows are split over.
    """

    slot_sizes: Sequence[int]
    column_sizes: Sequence[int]
    prefix_sizes: Sequence[int]
    steps: int
    num_shards: int
    pages = None

    @property
    def most_columns(self) -> int:
        return self.column_sizes[-1]

    def per_row(self, n: int) -> int:
        """The most samples of a request that share a row, so that all devices have some of them."""
        return -(-n // self.num_shards)

    def room(self, now: Sizes | None, schedule: Schedule, most_in_ring: int) -> Sizes | None:
        needed = self._needed(now, schedule, most_in_ring, self.slot_sizes[-1])
        if now is None or needed is None:
            return needed
        columns, prefix = max(now.columns, needed.columns), max(now.prefix, needed.prefix)
        return needed._replace(columns=columns, prefix=prefix)

    def fitted(self, now: Sizes, schedule: Schedule, most_in_ring: int) -> Sizes:
        if schedule.num_waiting or schedule.num_live * 4 > now.slots:
            return now
        needed = self._needed(None, schedule, most_in_ring, 0)
        return needed if needed.slots * 4 <= now.slots else now

    def smaller(self, live: int) -> int:
        return 0

    def _needed(
        self, now: Sizes | None, schedule: Schedule, most_in_ring: int, most_slots: int
    ) -> Sizes | None:
        """The smallest sizes for the live samples and those that can start in `most_slots`."""
        requests = schedule.live_groups()
        alive, rows = len(requests), self._rows_in_use(now, schedule)
        for request, count, further_rows in schedule.waiting(self._width):
            if alive >= most_slots:
                break
            requests.append(request)
            alive, rows = min(alive + count, most_slots), rows + further_rows
        if not alive:
            return None
        longest = max(len(request.prompt) for request in requests) - 1
        slots = smallest_holding(self.slot_sizes, max(alive, schedule.needed_slots))
        if now is not None:
            slots = max(slots, now.slots)
        columns = min(most_in_ring + self.steps, self.most_columns)
        columns = smallest_holding(self.column_sizes, columns)
        prefix = smallest_holding(self.prefix_sizes, longest)
        rows, width = self._rows_and_width(now, slots, rows, alive)
        return Sizes(slots, columns, rows, width, prefix)

    # --- prefix rows

    @property
    def _width(self) -> int:
        """The most samples of a shared row; several devices share the samples of a request."""
        return max(1, SHARED_WIDTH // self.num_shards)

    def _rows_in_use(self, now: Sizes | None, schedule: Schedule) -> int:
        """The shared rows that the admitted samples take, or would take if rows were shared."""
        shares = now is not None and now.width > 1
        return schedule.rows_in_use if shares else schedule.rows_needed(self._width)

    def _rows_and_width(
        self, now: Sizes | None, slots: int, needed: int, alive: int
    ) -> tuple[int, int]:
        """The number of prefix rows for so many slots, and the most samples that share one.

        Sharing begins where a row would have 4 samples or more on average, and ends where there
        would be too few rows.

        Args:
          needed: the rows that samples would need if they shared rows.
          alive: live samples, and those that can start.
        """
        rows = up_to_multiple(-(-2 * slots // self._width), self.num_shards)
        shares = now is not None and now.width > 1
        if rows < slots and needed <= rows and (shares or 4 * needed <= alive):
            return rows, self._width
        return slots, 1


class ContinuousBatch:
    """A batch whose samples come and go.

    `submit` and `cancel` may be called from any thread, `step` and `exchange` from one.

    Args:
      engine: the engine; its `steps_per_dispatch` is the time, in tokens, that a new request may
        have to wait for the running ones, and the most tokens that come at once.
      params: the policy's parameters.
      version: their number.
      compile_ahead: whether a request that needs a new program waits until it is compiled, in a
        thread of its own, while others decode; else they wait for it, as on several devices.

    Attributes:
      holds: whether the requests that arrive wait, while those under way go on.
    """

    def __init__(self, engine: Engine, params, *, version: int = 0, compile_ahead: bool = False):
        self.engine, self.verbs = engine, engine.verbs
        sizing = _load_sizing(engine)
        self.num_slots = sizing.slot_sizes[-1]
        self._per_row = sizing.per_row
        self._programs = Programs(engine.verbs, self._present_params, sizing.steps)
        self._patience: Patience | None = None
        decides, most_prefilled = sizing, None
        settings = functools.partial(own_settings, num_alternatives=MAX_ALTERNATIVES)
        # On several devices the layouts of what is compiled ahead are not known.
        if compile_ahead and engine.policy.mesh is None:
            self._patience = decides = Patience(
                sizing,
                self._programs,
                sizing.column_sizes,
                sizing.prefix_sizes,
                MAX_ALTERNATIVES,
                functools.partial(reading.pieces_of, engine.verbs, engine.prefill_chunk_size),
            )
            settings, most_prefilled = decides.settings, decides.most_prefilled
        self._loop = DecodeLoop(
            engine.verbs,
            params,
            decides,
            settings,
            num_shards=engine.shards,
            most_prefilled=most_prefilled,
            prefill_chunk_size=engine.prefill_chunk_size,
        )
        self._loop.version = version
        self._scorer = Scorer(engine.verbs, self._loop.params, MAX_ALTERNATIVES, version)
        self.holds = False
        self._exchanging = threading.Lock()
        # Requests on their way to the loop, which belongs to the thread that decodes: a queue for
        # each client, the client whose turn is next first.
        self._arrived: collections.OrderedDict[Hashable, collections.deque[Request]]
        self._arrived = collections.OrderedDict()
        self._num_arrived, self._any_cancelled = 0, False
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether anything waits or decodes."""
        return self.num_waiting > 0 or self.num_running > 0

    @property
    def under_way(self) -> bool:
        """Whether any request has begun and not ended."""
        return self._loop.busy

    @property
    def version(self) -> int:
        """The number of the parameters."""
        return self._loop.version

    @property
    def sizes(self) -> Sizes | None:
        """The sizes of the batch as it is now; None while it holds no memory."""
        return self._loop.sizes

    @property
    def num_running(self) -> int:
        return self._loop.schedule.num_live

    @property
    def num_waiting(self) -> int:
        return self._num_arrived + self._loop.schedule.num_waiting

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        seed: int,
        num_alternatives: int = 0,
        client: Hashable = None,
    ) -> list[Sample]:
        """Queues the completions of one prompt.

        Clients take turns: one that asks for much waits behind itself, and not others behind it.

        Args:
          prompt: token ids.
          sampling: the settings of these completions; `stop` strings are not looked for.
          num_alternatives: how many of the likeliest tokens to return beside each sampled one, up
            to 20.
          client: who asks.

        Returns:
          The `sampling.n` samples, to which the tokens of `step` will refer.

        Raises:
          ValueError: for a prompt or settings that the engine was not made for.
        """
        tokens = self.engine.checked([prompt], dataclasses.replace(sampling, stop=()))
        if not 0 <= num_alternatives <= MAX_ALTERNATIVES:
            raise ValueError(
                f"num_alternatives is 0 to {MAX_ALTERNATIVES}; given {num_alternatives}"
            )
        keys = functools.partial(_keys, tokens[0], sampling.n, seed)
        request = Request(tokens[0], sampling, keys, num_alternatives)
        with self._lock:
            self._arrived.setdefault(client, collections.deque()).append(request)
            self._num_arrived += len(request.samples)
        return request.samples

    def cancel(self, sample: Sample) -> None:
        """Ends a sample, which gets no further tokens; its slot is free at the next step."""
        self._loop.cancel(sample)
        self._any_cancelled = True

    def step(self) -> list[NewTokens]:
        """Starts waiting samples, decodes some tokens of all live ones, and returns the tokens.

        Raises:
          RuntimeError: after a step that raised anything, such as one without enough memory.
        """
        with self._lock:
            self._hand_on()
        return self._loop.step()

    def exchange(self, params, version: int) -> None:
        """Goes on with other parameters of the same policy; see `DecodeLoop.exchange`.

        No program is compiled anew where the parameters have the shapes, dtypes and places of the
        old ones.

        Args:
          version: the number of these parameters, which `NewTokens` will bear.
        """
        with self._exchanging:
            self._scorer = None  # a call under way keeps the old parameters until its end
            self._loop.exchange(params, version)
            self._scorer = Scorer(self.verbs, self._loop.params, MAX_ALTERNATIVES, version)

    @property
    def scorer(self) -> Scorer:
        """Scores prompts under the present parameters."""
        with self._exchanging:
            return self._scorer

    def _present_params(self):
        with self._exchanging:
            return self._loop.params

    def _forget_cancelled(self):
        """Drops the requests that wait for their turn and that nobody wants any more."""
        self._any_cancelled = False
        for client, requests in list(self._arrived.items()):
            wanted = collections.deque[Request]()
            for request in requests:
                if all(sample.cancelled for sample in request.samples):
                    self._num_arrived -= len(request.samples)
                    for sample in request.samples:
                        sample.ended = True
                else:
                    wanted.append(request)
            self._arrived[client] = wanted
            if not wanted:
                del self._arrived[client]

    def _hand_on(self):
        """Gives the loop as many requests as it may start soon; the others wait for their turn."""
        if self._any_cancelled:
            self._forget_cancelled()
        if self.holds:
            return
        held = []
        while self._arrived and self._loop.num_ready < self.num_slots:
            client, requests = self._arrived.popitem(last=False)
            if not (self._loop.may_read(requests[0]) and self._may_start(requests[0])):
                held.append((client, requests))
                continue
            request = requests.popleft()
            if requests:
                self._arrived[client] = requests  # at the end
            self._num_arrived -= len(request.samples)
            self._loop.submit(request, self._per_row(len(request.samples)))
            for sample in request.samples:
                if sample.cancelled:
                    self._loop.cancel(sample)  # the loop did not know it the first time
        for client, requests in reversed(held):
            self._arrived[client] = requests
            self._arrived.move_to_end(client, last=False)

    def _may_start(self, request: Request) -> bool:
        """Whether a request can start without keeping those waiting that decode."""
        loop = self._loop
        return self._patience is None or self._patience.may_start(
            request, loop.sizes, loop.schedule
        )

    def close(self) -> None:
        """Ends what is compiled ahead; the batch is not used any more."""
        self._programs.close()
        with self._exchanging:  # else the parameters wait for the collector of cycles
            self._loop.params = self._scorer = None


def _load_sizing(engine: Engine) -> LoadSizing:
    """The sizes that a server's batch may have on this engine.

    Raises:
      ValueError: where the memory does not hold a single completion.
    """
    columns = column_buckets(engine.max_response_length, 1)[-1]
    prefix = length_bucket(engine.max_prompt_length - 1, engine.max_prompt_length)
    num_slots, most = engine.num_slots, engine.plan.most_tokens
    if most is not None:
        # Every slot has a row beside it, and either store is copied when it is resized.
        state = engine.plan.row_tokens
        copied = cache_plan.Copied(ring=True, rows=True)
        fitting = most // copied.tokens(columns + state, prefix + state)
        num_slots = min(num_slots, fitting // engine.shards * engine.shards)
    if not num_slots:
        raise ValueError(
            f"the memory holds {most} tokens of keys and values, too few for one completion "
            f"of {columns} with its prompt of {prefix} while they are copied to a larger "
            "place; raise gpu_memory_utilization or lower the lengths"
        )
    steps = min(engine.steps_per_dispatch, columns)

    def whole(limit: int, multiple: int, least: int) -> list[int]:
        parts = (max(least, limit // part) for part in SIZE_STEPS)
        return sorted({min(up_to_multiple(p, multiple), limit) for p in parts})

    def tiles(limit: int, least: int) -> list[int]:
        return sorted({min(whole_tiles(n), limit) for n in whole(limit, 1, least)})

    return LoadSizing(
        slot_sizes=whole(num_slots, engine.shards, 4),
        column_sizes=tiles(columns, max(COLUMN_STEP, steps)),
        prefix_sizes=tiles(prefix, 64),
        steps=steps,
        num_shards=engine.shards,
    )


def _keys(prompt: np.ndarray, n: int, seed: int) -> np.ndarray:
    """[n or more, 2] uint32."""
    # Compiled once for each power of two.
    several = power_of_two(n)
    with jax.default_device(_host()):
        key = jax.random.key(np.uint32(seed % 2**32))
        return np.asarray(sampling.sample_keys(key, sampling.prompt_uids([prompt]), several))[0]


@functools.cache
def _host() -> jax.Device | None:
    """The processor, where an accelerator's queue would keep waiting; None where JAX has none."""
    if jax.default_backend() == "cpu":
        return None
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
