"""Compiles what a batch will need beside its decoding, so that no running sample waits for it.

A batch that follows its load runs another program for each of its sizes, and a program may take a
minute to compile. `Programs` compiles it in a thread of its own. Whoever changes the batch asks
first whether the programs are ready, and leaves it as it is until they are.

A program is compiled from shapes alone, and jit finds it at the first call.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from adpo_jax.engine import reading, sampling
from adpo_jax.engine.decode_state import DecodeState, Sizes, Slots
from adpo_jax.engine.sampling import Knobs, Method, SamplingParams
from adpo_jax.engine.verbs import Verbs


class Decode(NamedTuple):
    """Decoding with these sizes and settings, and starting samples in the slots.

    stop_width is the number of stop tokens of a row.
    """

    sizes: Sizes
    method: Method
    stop_width: int


class Prefill(NamedTuple):
    """The prefill of so many prompts of this length, and their way into the prefix rows."""

    sizes: Sizes
    count: int
    length: int


class ReadPiece(NamedTuple):
    """A piece of a long prompt, beside a store of so many columns."""

    tokens: int
    columns: int


class CopyPrompt(NamedTuple):
    """The way of a long prompt, once it has been read, into the prefix rows.

    columns are those of its store, length those of a row that it is copied into.
    """

    sizes: Sizes
    columns: int
    length: int


class Move(NamedTuple):
    """The copies from one set of sizes to another."""

    old: Sizes
    new: Sizes


class Draws(NamedTuple):
    """The keys of so many samples of a prompt, a power of two."""

    count: int


Program = Decode | Prefill | ReadPiece | CopyPrompt | Move | Draws


class Programs:
    """The programs of one batch.

    Args:
      params: returns the parameters as `Verbs.load_params` gives them.
      steps: decode steps of a dispatch.
    """

    def __init__(self, verbs: Verbs, params: Callable[[], Any], steps: int):
        self._verbs, self._params, self._steps = verbs, params, steps
        self._thread = ThreadPoolExecutor(1, "compiling")
        self._jobs: dict[Program, Future] = {}

    def ready(self, programs: Iterable[Program]) -> bool:
        """Whether all of these are compiled; those that are not will be."""
        jobs = [self._job(program) for program in programs]
        return all(job.done() for job in jobs)

    def wait(self) -> None:
        """Waits for what is being compiled, and forgets what has not begun."""
        for program, job in list(self._jobs.items()):
            if job.cancel():
                del self._jobs[program]
            else:
                job.result()

    def finish(self, programs: Iterable[Program]) -> None:
        """Waits for those of these that are being compiled, or will be."""
        for program in programs:
            if program in self._jobs:
                self._jobs[program].result()

    def close(self) -> None:
        """Compiles nothing further."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _job(self, program: Program) -> Future:
        if program not in self._jobs:
            compile_: Callable[..., None] = {
                Decode: self._compile_decode,
                Prefill: self._compile_prefill,
                ReadPiece: self._compile_piece,
                CopyPrompt: self._compile_copies,
                Move: self._compile_move,
                Draws: self._compile_draws,
            }[type(program)]
            self._jobs[program] = self._thread.submit(self._try, compile_, program)
        return self._jobs[program]

    def _try(self, compile_: Callable[..., None], program: Program) -> None:
        """A program that cannot be compiled is ready too: its first call says what is wrong."""
        try:
            compile_(*program)
        except Exception:
            logging.exception("%s was not compiled ahead", type(program).__name__)

    def _state(self, sizes: Sizes) -> DecodeState:
        """The shapes of a state."""
        return jax.eval_shape(lambda: self._verbs.init_decode_state(sizes))

    def _compile_decode(self, sizes: Sizes, method: Method, stop_width: int) -> None:
        state = self._state(sizes)
        Verbs.generate.lower(
            self._verbs,
            self._params(),
            state,
            _knobs(sizes.slots, stop_width),
            method,
            self._steps,
            np.int32(0),
            np.int32(0),
        ).compile()
        fresh = np.zeros(sizes.slots, bool)
        members = np.zeros((sizes.rows, sizes.width), np.int32)
        ints = np.zeros(sizes.slots, np.int32)
        keys = np.zeros((sizes.slots, 2), np.uint32)
        slots = Slots(ints, ints, ints, fresh, ints, ints, keys)
        Verbs.assign.lower(self._verbs, state, fresh, slots, members).compile()

    def _compile_prefill(self, sizes: Sizes, count: int, length: int) -> None:
        tokens, lengths = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        lowered = Verbs.prefill.lower(self._verbs, self._params(), tokens, lengths, False)
        lowered.compile()
        prefixes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)
        Verbs.insert.lower(self._verbs, self._state(sizes), prefixes, lengths).compile()

    def _compile_piece(self, tokens: int, columns: int) -> None:
        reading.compile_piece(self._verbs, self._params(), tokens, columns)

    def _compile_copies(self, sizes: Sizes, columns: int, length: int) -> None:
        prefixes = reading.compile_copies(self._verbs, columns, length)
        state = self._state(sizes)
        Verbs.insert.lower(self._verbs, state, prefixes, np.zeros(1, np.int32)).compile()

    def _compile_move(self, old: Sizes, new: Sizes) -> None:
        state, verbs = self._state(old), self._verbs
        moves = new.moves(old)
        if moves or new.columns != old.columns:
            old_slots = np.zeros(new.slots, np.int32)
            Verbs.gather_slots.lower(
                verbs, state.ring, state.slots, state.column, old_slots, new.columns, np.int32(0)
            ).compile()
        if moves:
            Verbs.rows_of.lower(verbs, state.prefix, np.zeros(new.rows, np.int32)).compile()
        elif new.columns != old.columns:
            Verbs.with_columns.lower(verbs, state.ring, new.columns).compile()
        if new.prefix != old.prefix:
            kv = self._state(old._replace(rows=new.rows)).prefix.kv
            Verbs.with_columns.lower(verbs, kv, new.prefix).compile()

    def _compile_draws(self, count: int) -> None:
        sampling.sample_keys(jax.random.key(np.uint32(0)), np.zeros(1, np.uint32), count)


def _knobs(slots: int, stop_width: int) -> Knobs:
    """The shapes of settings that each slot has of its own."""
    one = SamplingParams().knobs()._replace(stop_ids=np.zeros(stop_width, np.int32))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((slots, *np.shape(x)), np.asarray(x).dtype), one
    )
