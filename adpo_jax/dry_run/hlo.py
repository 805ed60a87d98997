"""FLOPs, traffic, launches and collectives of a compiled program, from its HLO text, loops counted.

XLA's own cost analysis counts the body of a loop once, and a model's layers are a loop. Here the
body of a loop whose condition compares its counter with a constant counts as often as the loop
turns. Where the end is decided while the loop runs (decoding, packed micro-batches), the body
counts as often as the caller says.

Source: the text format of https://openxla.org/xla/operation_semantics; FLOPs of a convolution as in
xla/service/hlo_cost_analysis.cc (a TPU's compiler writes every matrix product as one).
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from adpo_jax.dry_run.device_groups import device_groups

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
# What a TPU's compiler makes of a collective between slices: a transfer through the hosts.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# What occupies no kernel of a GPU: names for values, and the beginnings and ends of what does.
_FREE = frozenset(
    ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional")
    + ("call", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency")
    + ("async-update", "async-done")
)
# What moves numbers and changes none.
_MOVES = frozenset(
    ("copy", "bitcast", "slice", "dynamic-slice", "transpose", "reshape", "concatenate", "pad")
)
_READS_A_PART = frozenset(("dynamic-slice", "slice", "gather"))


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program, all of its calls together.

    Attributes:
      kind: one of `COLLECTIVES`.
      shape: the shape of its result on one device, e.g. "bf16[4,128,256]".
      calls: how often it runs.
      bytes: bytes of its results on one device over all calls.
      source: the operation of the model that it serves, shortened.
      crosses: whether devices of several slices take part in the same exchange.
    """

    kind: str
    shape: str
    calls: int
    bytes: int
    source: str
    crosses: bool = False


@dataclasses.dataclass(frozen=True)
class Copy:
    """An instruction that moves an array and computes nothing.

    Attributes:
      shape: of its result, e.g. "bf16[1,1024,3072]".
      calls: how often it runs.
      bytes: bytes of its results over all calls.
      source: the operation of the model that it serves, shortened.
    """

    shape: str
    calls: int
    bytes: int
    source: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str  # everything after the opcode


class Program:
    """A module of HLO text.

    Args:
      unknown_turns: the turns of a loop whose end is decided while it runs.
      slices: the slice that each device of the program is in, in the order of the mesh.
      not_entered: names of jitted functions whose loops do not turn.
      outer_turns: as `unknown_turns`, of loops that are in no other; None for the same.
    """

    def __init__(
        self,
        text: str,
        unknown_turns: int = 1,
        slices: Sequence[int] = (),
        not_entered: Sequence[str] = (),
        outer_turns: int | None = None,
    ):
        self._computations, self._entry = _parse(text)
        self._unknown_turns = unknown_turns
        self._outer_turns = unknown_turns if outer_turns is None else outer_turns
        self._slices = slices
        self._not_entered = not_entered

    @functools.cached_property
    def _times(self) -> dict[str, int]:
        """How often each computation runs."""
        times = collections.Counter({self._entry: 1})
        for name in self._in_call_order():
            for instruction in self._computations[name]:
                turns = self._turns(instruction, name) if instruction.opcode == "while" else 1
                for other in _called(instruction):
                    times[other] += times[name] * turns
        return times

    def _in_call_order(self) -> list[str]:
        """Every computation after all those that call it."""
        order, seen = [], set()

        def visit(name):
            if name in seen or name not in self._computations:
                return
            seen.add(name)
            for instruction in self._computations[name]:
                for other in _called(instruction):
                    visit(other)
            order.append(name)

        visit(self._entry)
        return order[::-1]

    def _turns(self, loop: _Instruction, computation: str) -> int:
        """How often a loop of a computation turns."""
        if _is_of(loop, self._not_entered):
            return 0
        unknown = self._outer_turns if computation == self._entry else self._unknown_turns
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest).group(1)
        instructions = self._computations[condition]
        root = instructions[-1]
        if root.opcode == "fusion":
            instructions = instructions + self._computations[_called(root)[0]]
            root = instructions[-1]
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return unknown
        numbers = [n for i in instructions if (n := _constant(i)) is not None]
        if len(numbers) != 1:
            return unknown
        return -(-numbers[0] // self._stride(loop, instructions))

    def _stride(self, loop: _Instruction, condition: list[_Instruction]) -> int:
        """The number that a turn adds to the counter: 2 if the compiler put two turns into one."""
        places = [m.group(1) for i in condition if (m := re.search(r"index=(\d+)", i.rest))]
        body = re.search(r"body=%?([\w.\-]+)", loop.rest).group(1)
        if len(places) != 1 or self._computations[body][-1].opcode != "tuple":
            return 1
        made = {i.name: i for i in self._computations[body]}
        counter = made.get(self._computations[body][-1].operands[int(places[0])])
        stride = 0
        while counter is not None and counter.opcode == "add":
            terms = [made[name] for name in counter.operands]
            stride += sum(_constant(term) or 0 for term in terms)
            counter = next((term for term in terms if _constant(term) is None), None)
        return max(stride, 1)

    @functools.cached_property
    def flops(self) -> int:
        """Floating-point operations of the matrix products; a multiply-add counts as two."""
        return self.flops_without(())

    def flops_without(self, functions: Sequence[str]) -> int:
        """`flops` but for those of jitted functions with these names."""
        total = 0
        for name, instructions in self._computations.items():
            shapes = {i.name: i.shape for i in instructions}
            for i in instructions:
                if i.opcode not in ("dot", "convolution") or _is_of(i, functions):
                    continue
                count = _dot_flops if i.opcode == "dot" else _convolution_flops
                total += self._times[name] * count(i, shapes)
        return total

    @functools.cached_property
    def _executed(self) -> dict[str, int]:
        """How often each computation runs whose instructions are kernels of their own."""
        times = collections.Counter({self._entry: 1})
        for name in self._in_call_order():
            for i in self._computations[name] if times[name] else ():
                if i.opcode in ("while", "conditional", "call"):
                    turns = self._turns(i, name) if i.opcode == "while" else 1
                    for other in _called(i):
                        times[other] += times[name] * turns
        return times

    def _kernels(self) -> Iterator[tuple[_Instruction, int]]:
        """The instructions that a device runs, and how often."""
        for name, times in self._executed.items():
            for i in self._computations[name] if times else ():
                if i.opcode not in _FREE and not i.opcode.endswith("-done"):
                    yield i, times

    @functools.cached_property
    def launches(self) -> int:
        """Kernels that a GPU is given, one after the other; copies of memory are among them."""
        return sum(times for _, times in self._kernels())

    @property
    def kernel_calls(self) -> dict[str, int]:
        """How often each hand-written kernel is called, by the names that it was given."""
        calls = collections.Counter()
        for i, times in self._kernels():
            if i.opcode == "custom-call":
                calls[_kernel_name(i)] += times
        return dict(calls)

    def traffic(self, of_kernels: Mapping[str, int] | None = None) -> int:
        """Bytes that the instructions read and write, each of its operands and results once.

        Of an operand that is sliced the slice counts, of a result that is updated in place the
        update. What stays in a cache between two instructions is counted all the same.

        Args:
          of_kernels: bytes of one call of hand-written kernels by their names; others count like
            any instruction.
        """
        return sum(times * self._bytes_of(i, of_kernels or {}) for i, times in self._kernels())

    def seconds(
        self,
        flops: float,
        bandwidth: float,
        *,
        launch: float = 0.0,
        of_kernels: Mapping[str, int] | None = None,
    ) -> float:
        """Seconds of a device that runs one kernel after the other, each at one of its two limits.

        Args:
          flops, bandwidth: operations and bytes a second.
          launch: seconds that each kernel takes besides.
          of_kernels: as in `traffic`.
        """
        return sum(
            times
            * (
                launch
                + max(self._flops_of(i) / flops, self._bytes_of(i, of_kernels or {}) / bandwidth)
            )
            for i, times in self._kernels()
        )

    def _flops_of(self, i: _Instruction) -> int:
        inside = self._computations[_called(i)[0]] if i.opcode == "fusion" else [i]
        total = sum(_dot_flops(x, self._shapes) for x in inside if x.opcode == "dot")
        more = (_convolution_flops(x, self._shapes) for x in inside if x.opcode == "convolution")
        return total + sum(more)

    def _bytes_of(self, i: _Instruction, of_kernels: Mapping[str, int]) -> int:
        if i.opcode == "custom-call" and _kernel_name(i) in of_kernels:
            return of_kernels[_kernel_name(i)]
        operands = [self._shapes[name] for name in i.operands if name in self._shapes]
        if i.opcode in _READS_A_PART:
            return 2 * _shape_bytes(i.shape)
        if i.opcode == "dynamic-update-slice":
            return 2 * _shape_bytes(operands[1])
        if i.opcode != "fusion":
            return _shape_bytes(i.shape) + sum(map(_shape_bytes, operands))
        inside = self._computations[_called(i)[0]]
        return self._written(inside) + sum(self._read(inside))

    def _written(self, inside: list[_Instruction]) -> int:
        """Bytes that a fusion writes."""
        made = {i.name: i for i in inside}
        root = inside[-1]
        results = [made[n] for n in root.operands] if root.opcode == "tuple" else [root]
        total = 0
        for result in results:
            while result.opcode == "bitcast":
                result = made[result.operands[0]]
            updated = result.opcode == "dynamic-update-slice"
            total += _shape_bytes(made[result.operands[1]].shape if updated else result.shape)
        return total

    def _read(self, inside: list[_Instruction]) -> list[int]:
        """Bytes that a fusion reads of each of its operands, fusions within it included."""
        wholes = [_shape_bytes(i.shape) for i in _parameters(inside)]
        return [
            whole if is_result else min(read, whole)
            for (read, is_result), whole in zip(self._reads(inside), wholes)
        ]

    def _reads(self, inside: list[_Instruction]) -> Iterator[tuple[int, bool]]:
        """Of each operand the bytes that are read, and whether the result is a view of it."""
        users = collections.defaultdict(list)
        for i in inside:
            for place, operand in enumerate(i.operands):
                users[operand].append((i, place))
        for parameter in _parameters(inside):
            whole, total, is_result = _shape_bytes(parameter.shape), 0, False
            open_ = list(users[parameter.name])
            while open_:
                user, place = open_.pop()
                passes_on = user.opcode == "bitcast" or _is_in_place(user)
                if user.opcode == "fusion" and not passes_on:
                    reads = list(self._reads(self._computations[_called(user)[0]]))
                    more, passes_on = reads[place]
                    total += more
                if passes_on:
                    is_result = is_result or user is inside[-1]
                    open_ += users[user.name]
                elif user.opcode == "fusion":
                    continue
                elif user.opcode in _READS_A_PART and place == 0:
                    total += _shape_bytes(user.shape)
                elif user.opcode != "dynamic-update-slice" or place:
                    total += whole
            yield total, is_result

    @functools.cached_property
    def _shapes(self) -> dict[str, str]:
        return {i.name: i.shape for inside in self._computations.values() for i in inside}

    def copies(self, least: int) -> list[Copy]:
        """Instructions that move arrays of `least` bytes or more and compute nothing."""
        found = collections.Counter()
        for i, times in self._kernels():
            inside = [i]
            if i.opcode == "fusion":
                inside = self._computations[_called(i)[0]]
            if i.opcode.endswith("-start"):  # a TPU fetches ahead into its fast memory
                continue
            moved = self._written(inside) if i.opcode == "fusion" else _shape_bytes(i.shape)
            big = [o for o in inside if o.opcode not in ("parameter", "constant", "tuple")]
            # The arithmetic of where to slice is on scalars.
            big = [o for o in big if _shape_bytes(o.shape) > 8]
            if moved >= least and big and all(o.opcode in _MOVES for o in big):
                found[_short_shape(i.shape), moved, _source(i.rest)] += times
        copies = [Copy(shape, n, n * size, source) for (shape, size, source), n in found.items()]
        return sorted(copies, key=lambda c: -c.bytes)

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """All collectives; those that move most bytes come first."""
        # A collective that runs beside arithmetic is written several times under one channel.
        # Collectives written by hand have channels of their own, whose numbers may coincide.
        found: dict = {}
        for name, instructions in self._computations.items():
            for i in instructions:
                kind, between = i.opcode.removesuffix("-start"), _BETWEEN_SLICES.search(i.rest)
                if i.opcode == "send" and between:
                    kind = between.group(1).lower().replace("_", "-")
                if kind not in COLLECTIVES or not self._times[name]:
                    continue
                shape = tuple(_SHAPE.findall(i.shape))
                if i.opcode == "send":
                    shape = shape[:1]  # the others are what the device and the host count with
                if i.opcode in ("all-gather-start", "collective-permute-start"):
                    # The shape lists operands, results, and scalars that the device counts with.
                    arrays = [(item, dims) for item, dims in shape if dims]
                    shape = tuple(arrays[len(arrays) // 2 :])
                channel = re.search(r"channel_id=(\d+)", i.rest)
                key = kind, shape, channel.group(1) if channel else (name, i.name)
                times, _ = found.get(key, (0, None))
                if self._times[name] >= times:
                    found[key] = self._times[name], (_source(i.rest), self._crosses(i))
        sums = collections.Counter()
        for (kind, shape, _), (times, of_source) in found.items():
            sums[kind, shape, of_source] += times
        collectives = [
            Collective(
                kind,
                " ".join(f"{item}[{dims}]" for item, dims in shape),
                calls,
                calls * sum(_bytes(*part) for part in shape),
                source,
                crosses,
            )
            for (kind, shape, (source, crosses)), calls in sums.items()
        ]
        return sorted(collectives, key=lambda c: -c.bytes)

    def _crosses(self, collective: _Instruction) -> bool:
        """Whether devices of several slices take part in the same exchange."""
        if collective.opcode == "send":
            return True
        if len(set(self._slices)) < 2:
            return False
        groups = device_groups(collective.rest, len(self._slices))
        return any(len({self._slices[device] for device in group}) > 1 for group in groups)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.endswith("{") and not line.startswith("HloM"):
            words = line.removeprefix("ENTRY ").split()
            current = words[0].lstrip("%")
            computations[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif " = " in line and line[0].isspace():
            computations[current].append(_instruction(line.strip()))
    return computations, entry


def _instruction(line: str) -> _Instruction:
    name, value = line.removeprefix("ROOT ").split(" = ", 1)
    if value.startswith("("):
        end = _closing(value, 0) + 1
    else:
        end = value.index(" ")
    shape, rest = value[:end], value[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    inside = rest[1 : _closing(rest, 0)] if rest else ""
    operands = re.findall(r"%?([A-Za-z_][\w.\-]*)(?=,|$)", re.sub(r"/\*.*?\*/", "", inside))
    return _Instruction(name.lstrip("%"), shape, opcode.strip(), operands, rest)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    return len(text) - 1


def _called(instruction: _Instruction) -> list[str]:
    if "=" not in instruction.rest:
        return []
    names = []
    for match in re.finditer(
        r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}",
        instruction.rest,
    ):
        names += [match.group(1)] if match.group(1) else match.group(2).replace("%", "").split(", ")
    return names


def _constant(instruction: _Instruction) -> int | None:
    """The value of an integer constant."""
    match = instruction.opcode == "constant" and re.match(r"\((\d+)\)", instruction.rest)
    return int(match.group(1)) if match else None


def _parameters(inside: list[_Instruction]) -> list[_Instruction]:
    """The parameters of a computation in the order of its operands."""
    found = [i for i in inside if i.opcode == "parameter"]
    return sorted(found, key=lambda i: int(re.match(r"\((\d+)\)", i.rest).group(1)))


def _is_in_place(i: _Instruction) -> bool:
    """Whether it gives its only operand another name: within a fusion, other tiles of a layout."""
    return len(i.operands) == 1 and "output_to_operand_aliasing={{}: (0, {})}" in i.rest


def _kernel_name(i: _Instruction) -> str:
    """The name that a hand-written kernel was given, or the target of the call."""
    given = re.search(r'\bname = "([^"]+)"|"kernel_name"\s*:\s*"([^"]+)"', i.rest)
    if given:
        return given.group(1) or given.group(2)
    return re.search(r'custom_call_target="([^"]*)"', i.rest).group(1)


def _short_shape(shape: str) -> str:
    return " ".join(f"{item}[{dims}]" for item, dims in _SHAPE.findall(shape))


def _shape_bytes(shape: str) -> int:
    return sum(_bytes(*part) for part in _SHAPE.findall(shape))


def _dims(shape: str) -> list[int]:
    return [int(d) for d in _SHAPE.search(shape).group(2).split(",") if d]


def _bytes(kind: str, dims: str) -> int:
    bits = _ITEM_BITS.get(kind) if kind in _ITEM_BITS else int(re.search(r"\d+", kind).group())
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _dot_flops(i: _Instruction, shapes: dict[str, str]) -> int:
    lhs = _dims(shapes[i.operands[0]])
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
    inner = math.prod(lhs[int(d)] for d in contracted.group(1).split(",") if d) if contracted else 1
    return 2 * math.prod(_dims(i.shape)) * inner


def _convolution_flops(i: _Instruction, shapes: dict[str, str]) -> int:
    """2 x output x input features x the taps of the window that meet the input."""
    lhs, rhs, out = (_dims(s) for s in (shapes[i.operands[0]], shapes[i.operands[1]], i.shape))
    lhs_labels, rhs_labels, out_labels = re.search(
        r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", i.rest
    ).groups()
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(f.split("=") for f in window.group(1).split()) if window else {}
    total = rhs[rhs_labels.index("i")] * out[out_labels.index("b")] * out[out_labels.index("f")]
    spatial = sorted(c for c in lhs_labels if c.isdigit())
    for axis, label in enumerate(spatial):

        def field(name, default, axis=axis):
            return fields[name].split("x")[axis] if name in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        size, stride = int(field("size", 1)), int(field("stride", 1))
        dilate, spread = int(field("rhs_dilate", 1)), int(field("lhs_dilate", 1))
        length = (lhs[lhs_labels.index(label)] - 1) * spread + 1
        total *= sum(
            1
            for o in range(out[out_labels.index(label)])
            for k in range(size)
            if 0 <= (at := o * stride + k * dilate - low) < length and at % spread == 0
        )
    return 2 * total


def _is_of(i: _Instruction, functions: Sequence[str]) -> bool:
    """Whether a jitted function with one of these names made an instruction."""
    if not functions:
        return False
    return bool(re.search(rf'op_name="[^"]*\bjit\(({"|".join(functions)})\)', i.rest))


def _source(rest: str) -> str:
    """The tail of the operation's name, without the wrappers of transformations."""
    name = re.search(r'op_name="([^"]*)"', rest)
    if not name:
        return ""
    parts = [p for p in name.group(1).split("/") if p not in ("while", "body", "closed_call")]
    backward = "backward " if "transpose(" in name.group(1) else ""
    return backward + "/".join(parts[-2:])
