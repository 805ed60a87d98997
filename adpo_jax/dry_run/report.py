"""The report of a dry run as tables: one device's memory, the programs, their collectives."""

import dataclasses
from collections.abc import Iterator

from adpo_jax.devices.chips import Chip
from adpo_jax.dry_run.hlo import Collective
from adpo_jax.engine.cache_plan import readable

# The program for which an offloaded part of the state comes back from the host's memory.
PROGRAM_OF = {"optimizer": "update", "anchor": "anchor"}
# What happens before the first program: the parameters get the form in which they sample.
LOADING = "loading"
COPY = "parameters to sample with"


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """A compiled program of an iteration; figures of one device.

    Attributes:
      calls: its calls in an iteration at full lengths; a call of "decode" is one step, which gives
        every slot a token.
      temporary: bytes that it allocates while it runs, its results included.
      moved: bytes that it has to read and write: its arguments and results, of the cache what is
        seen.
      flops: FLOPs of its matrix products, those inside of kernels included, and those of experts
        as an even choice needs them.
      balance: FLOPs of its products x devices / FLOPs that the program asks for, kernels and
        experts left out of both: 1 if no device repeats another's work.
      launches: kernels that the device is given, one after the other; what a TPU's compiler makes
        of a program is one.
      compile_s: seconds that compiling took here.
      kernel_s: seconds of a call that the forecast says, kernel after kernel; None where the chip
        is not known.
      linked_s: seconds of a call in which collectives move bytes over the links.
      expected_calls: calls of an iteration with the lengths of the forecast.
      expected_share: the share of a call's work that there is with these lengths.
    """

    name: str
    calls: int
    temporary: int
    moved: int
    flops: int
    balance: float
    collectives: list[Collective]
    launches: int
    compile_s: float
    kernel_s: float | None = None
    linked_s: float = 0.0
    expected_calls: int | None = None
    expected_share: float = 1.0

    def floor_s(self, chip: Chip) -> float:
        """The fewest seconds that its calls of an iteration can take together."""
        return self.calls * max(self.flops / chip.flops, self.moved / chip.bandwidth)

    @property
    def forecast_s(self) -> float | None:
        """The seconds of its calls of an iteration together, with the lengths of the forecast."""
        if self.kernel_s is None:
            return None
        calls = self.calls if self.expected_calls is None else self.expected_calls
        return calls * self.expected_share * (self.kernel_s + self.linked_s)


@dataclasses.dataclass(frozen=True)
class Report:
    """What one device of a run holds and does; all bytes are bytes of one device.

    Attributes:
      resident: bytes of the state's parts: parameters, optimizer, anchor, reference, teacher.
      rollout: bytes that sampling adds: the parameters' copy (`COPY`), the cache.
      loading: bytes that are needed for a while to make that copy, besides it.
      on_host: parts of the state that are on the device only while their program runs.
      keeps_cache: whether the cache stays on the device during the update.
      failed: programs that do not fit, with the compiler's words.
      lengths: which lengths of completions the forecast is for.
      waiting: the share of the slots' steps in which they wait for the longest sample.
    """

    title: str
    device_kind: str
    chip: Chip | None
    memory: int | None
    resident: dict[str, int]
    rollout: dict[str, int]
    loading: int
    on_host: frozenset[str]
    keeps_cache: bool
    programs: list[ProgramCost]
    failed: dict[str, str]
    cures: list[str]
    lengths: str = ""
    waiting: float = 0.0

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes in use at the peak of each program, and of `LOADING`."""
        of_programs = {p.name: self._there(p.name) + p.temporary for p in self.programs}
        return {LOADING: self._there(LOADING) + self.loading} | of_programs

    def _there(self, program: str) -> int:
        """Bytes that lie on the device while a program runs, without those that it allocates."""
        away = {part for part in self.on_host if PROGRAM_OF[part] != program}
        state = sum(size for part, size in self.resident.items() if part not in away)
        if program in ("prefill", "decode"):
            return state + sum(self.rollout.values())
        copy = self.rollout[COPY] if program == LOADING else 0
        return state + copy + (self.rollout["cache"] if self.keeps_cache else 0)

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=0)

    @property
    def fits(self) -> bool:
        """Whether every program compiled, and the largest peak is within the device's memory."""
        return not self.failed and (self.memory is None or self.peak <= self.memory)

    def lines(self) -> Iterator[str]:
        """The report as Markdown."""
        yield f"{self.title}"
        yield ""
        yield from _table(["one device holds", "bytes"], self._memory_rows())
        yield ""
        yield self._verdict()
        yield from (f"- {cure}" for cure in self.cures)
        yield ""
        yield from _table(
            ["program", "calls", "TFLOP a call", "FLOPs balance", "bytes a call", "floor"]
            + ["launches a call", "forecast", "built"],
            [self._program_row(p) for p in self.programs],
        )
        yield ""
        if self.chip is not None and not self.failed:
            floor = sum(p.floor_s(self.chip) for p in self.programs)
            yield (
                f"An iteration takes {_seconds(floor)} or more: {self.chip.flops / 1e12:.0f} "
                f"TFLOP/s and {self.chip.bandwidth / 1e9:.0f} GB/s are published for one "
                f"{self.chip.name} (chips.py); waiting for other devices is not counted."
            )
            yield ""
            yield from self._forecast_lines()
        rows = [
            [p.name, c.kind, c.shape, f"{c.calls}", readable(c.bytes), c.source or "-"]
            for p in self.programs
            for c in p.collectives[:6]
        ]
        if rows:
            yield "Collectives of one call that move most (results on one device):"
            yield ""
            yield from _table(["program", "kind", "result", "times", "bytes", "for"], rows)
        else:
            yield "No collectives."
        yield from self._crossing_lines()

    def _crossing_lines(self) -> Iterator[str]:
        """What one call of each program moves over the slow network between slices."""
        for program in self.programs:
            across = [c for c in program.collectives if c.crosses]
            if across:
                calls = sum(c.calls for c in across)
                yield ""
                yield (
                    f"Between slices, a call of {program.name} makes {calls} exchanges, of "
                    f"{readable(sum(c.bytes for c in across))} together: "
                    + ", ".join(f"{c.calls} x {c.kind} {c.shape}" for c in across[:4])
                    + ("." if len(across) <= 4 else ", and smaller ones.")
                )

    def _forecast_lines(self) -> Iterator[str]:
        seconds = [p.forecast_s for p in self.programs]
        if None in seconds or not seconds:
            return
        linked = sum(
            (p.calls if p.expected_calls is None else p.expected_calls)
            * p.expected_share
            * p.linked_s
            for p in self.programs
        )
        yield (
            f"Forecast: {_seconds(sum(seconds))}, of which {_seconds(linked)} is for collectives "
            f"that nothing else runs beside; {self.lengths}; {self.waiting:.0%} of the slots' "
            "steps wait for the longest sample. Hosts and grading are not counted."
        )
        yield ""

    def _memory_rows(self) -> list[list[str]]:
        rows = [
            [f"{name} (on the host but for the {PROGRAM_OF[name]})", readable(size)]
            if name in self.on_host
            else [name, readable(size)]
            for name, size in self.resident.items()
        ]
        rows += [
            [f"{name} (while sampling)", readable(size)] for name, size in self.rollout.items()
        ]
        rows += [["in other forms (while loading those)", readable(self.loading)]]
        rows += [[f"activations of {p.name}", readable(p.temporary)] for p in self.programs]
        rows += [[f"peak, in {n}", readable(p)] for n, p in self.peaks.items() if p == self.peak]
        return [*rows, [f"memory of one {self.device_kind}", _memory_text(self.memory)]]

    def _verdict(self) -> str:
        if self.failed:
            return "Does not fit: " + "; ".join(f"{n}: {why}" for n, why in self.failed.items())
        if self.memory is None:
            return "The memory of this device is not known."
        share = f"{self.peak / self.memory:.0%} of the memory"
        return f"Fits: {share}." if self.fits else f"Does not fit: {share}. What would help:"

    def _program_row(self, p: ProgramCost) -> list[str]:
        floor = "-" if self.chip is None else _seconds(p.floor_s(self.chip))
        return [
            p.name,
            f"{p.calls}",
            f"{p.flops / 1e12:.3g}",
            f"{p.balance:.3f}",
            readable(p.moved),
            floor,
            f"{p.launches}",
            "-" if p.forecast_s is None else _seconds(p.forecast_s),
            f"{p.compile_s:.1f} s",
        ]


def _memory_text(memory: int | None) -> str:
    return "not known" if memory is None else readable(memory)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
