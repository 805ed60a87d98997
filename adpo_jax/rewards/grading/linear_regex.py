"""Regular expressions matched in linear time, whatever the text.

A pattern becomes a nondeterministic automaton (Thompson 1968), and that a deterministic one, built
state by state as texts need it (as in RE2). Each character of a text is then one step: there is no
backtracking to blow up on `(a+)+$`. What cannot be matched so (backreferences, lookaround, word
boundaries) is refused.
"""

import functools

MAX_STATES = 500  # of the automaton of a pattern
_MAX_CACHED = 20_000  # steps remembered; beyond that the memory starts anew
_SHORTHANDS = {
    "s": frozenset(" \t\n\r\f\v"),
    "d": frozenset("0123456789"),
    "w": frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"),
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_ANY = (frozenset(), True)

# A set of characters: those listed, or with True all others.
CharSet = tuple[frozenset, bool]


class LinearRegex:
    """A pattern that a whole text must match, `.` being any character at all.

    Raises:
      ValueError: the pattern is malformed, too large, or needs backtracking.
    """

    def __init__(self, pattern: str):
        self.pattern = pattern
        # Of each state: the set of characters it takes and the state after it, or the states that
        # it stands for without taking any.
        self._steps: list[tuple[CharSet, int] | None] = []
        self._jumps: list[list[int]] = []
        start, self._end = _Compiler(pattern, self).compile()
        self._start = self._closure([start])
        self._cache: dict[tuple[frozenset, str], frozenset] = {}

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches. Takes time linear in its length."""
        current, cache = self._start, self._cache
        for char in text:
            following = cache.get((current, char))
            if following is None:
                if len(cache) > _MAX_CACHED:
                    cache.clear()
                following = cache[current, char] = self._after(current, char)
            if not following:
                return False
            current = following
        return self._end in current

    def _after(self, states: frozenset, char: str) -> frozenset:
        reached = []
        for state in states:
            step = self._steps[state]
            if step is not None and (char in step[0][0]) != step[0][1]:
                reached.append(step[1])
        return self._closure(reached)

    def _closure(self, states: list[int]) -> frozenset:
        seen = set(states)
        todo = list(states)
        while todo:
            for state in self._jumps[todo.pop()]:
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
        return frozenset(seen)

    def add_state(self, step: tuple[CharSet, int] | None = None, jumps: tuple = ()) -> int:
        if len(self._steps) >= MAX_STATES:
            raise ValueError(f"pattern {self.pattern!r} is too large")
        self._steps.append(step)
        self._jumps.append(list(jumps))
        return len(self._steps) - 1

    def add_jump(self, state: int, target: int) -> None:
        self._jumps[state].append(target)


class _Compiler:
    """Recursive descent over the pattern; each rule gives a tree, built into states at the end."""

    def __init__(self, pattern: str, automaton: LinearRegex):
        self.pattern = pattern
        self.automaton = automaton
        self.position = 0

    def compile(self) -> tuple[int, int]:
        if self.pattern.startswith("(?s)"):
            self.position = 4
        if self.peek() == "^":
            self.position += 1
        tree = self.alternatives(depth=0)
        if self.position < len(self.pattern):
            self.refuse("unbalanced )")
        end = self.automaton.add_state()
        return self.build(tree, end), end

    def refuse(self, what: str):
        raise ValueError(f"pattern {self.pattern!r}, character {self.position}: {what}")

    def peek(self) -> str:
        return self.pattern[self.position : self.position + 1]

    def next(self) -> str:
        char = self.peek()
        if not char:
            self.refuse("unexpected end")
        self.position += 1
        return char

    def alternatives(self, depth: int) -> tuple:
        if depth > 20:
            self.refuse("nested too deeply")
        options = [self.sequence(depth)]
        while self.peek() == "|":
            self.position += 1
            options.append(self.sequence(depth))
        return ("any of", options) if len(options) > 1 else options[0]

    def sequence(self, depth: int) -> tuple:
        parts = []
        while self.peek() not in ("", "|", ")"):
            if self.peek() == "$" and self.position == len(self.pattern) - 1:
                self.position += 1
                break
            parts.append(self.repeated(self.atom(depth)))
        return ("all of", parts)

    def repeated(self, tree: tuple) -> tuple:
        char = self.peek()
        if char not in ("*", "+", "?", "{"):
            return tree
        self.position += 1
        if char == "{":
            end = self.pattern.find("}", self.position)
            low, comma, high = self.pattern[self.position : end].partition(",")
            if end < 0 or not low.isdecimal() or (high and not high.isdecimal()):
                self.refuse("wanted {m}, {m,} or {m,n}; write \\{ for the brace itself")
            self.position = end + 1
            least, most = int(low), int(high) if high else None if comma else int(low)
        else:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        if self.peek() == "?":  # lazy repeats match the same texts
            self.position += 1
        if self.peek() in ("*", "+", "{"):
            self.refuse("a repeat of a repeat")
        if max(least, most or 0) > MAX_STATES:
            self.refuse("too many repeats")
        return ("repeat", tree, least, most)

    def atom(self, depth: int) -> tuple:
        char = self.next()
        if char == ".":
            return ("char", _ANY)
        if char == "[":
            return ("char", self.char_class())
        if char == "\\":
            return ("char", self.escape())
        if char == "(":
            return self.group(depth)
        if char in "*+?{^$":
            self.refuse(f"{char!r} has no meaning here; write \\{char} for the character itself")
        return ("char", (frozenset(char), False))

    def group(self, depth: int) -> tuple:
        if self.peek() == "?":
            self.position += 1
            kind = self.next()
            if kind == "P" and self.peek() == "<":
                name_end = self.pattern.find(">", self.position)
                self.position = name_end + 1 if name_end > 0 else len(self.pattern)
            elif kind != ":":
                self.refuse("lookaround, flags and conditions cannot be matched in linear time")
        tree = self.alternatives(depth + 1)
        if self.peek() != ")":
            self.refuse("unclosed (")
        self.position += 1
        return tree

    def escape(self) -> CharSet:
        char = self.next()
        if char.lower() in _SHORTHANDS:
            return _SHORTHANDS[char.lower()], char.isupper()
        if char in _CONTROLS:
            return frozenset(_CONTROLS[char]), False
        if char.isalnum():
            self.refuse(f"\\{char} is not supported")
        return frozenset(char), False

    def char_class(self) -> CharSet:
        negated = self.peek() == "^"
        self.position += negated
        chars: set[str] = set()
        complemented = False
        first = True
        while first or self.peek() != "]":
            first = False
            char = self.next()
            if char == "\\":
                listed, inverse = self.escape()
                if inverse and not chars:
                    complemented, chars = True, set(listed)
                    continue
                if inverse and listed <= chars:
                    complemented, chars = True, set()  # [\\s\\S]: any character
                    continue
                if inverse:
                    self.refuse("a negated shorthand among other characters")
                low = next(iter(listed)) if len(listed) == 1 else None
            else:
                listed, low = frozenset(char), char
            if (
                low
                and self.peek() == "-"
                and self.pattern[self.position + 1 :][:1] not in ("]", "")
            ):
                self.position += 1
                high = self.next()
                if high == "\\":
                    high = next(iter(self.escape()[0]))
                if not ord(low) <= ord(high) <= ord(low) + 1000:
                    self.refuse("bad range")
                listed = frozenset(map(chr, range(ord(low), ord(high) + 1)))
            chars = chars - listed if complemented else chars | listed
        self.position += 1
        return frozenset(chars), complemented != negated

    def build(self, tree: tuple, after: int) -> int:
        """Adds the states of a tree that lead to the state `after`; gives where they start."""
        add = self.automaton.add_state
        if tree[0] == "char":
            return add(step=(tree[1], after))
        if tree[0] == "all of":
            for part in reversed(tree[1]):
                after = self.build(part, after)
            return after
        if tree[0] == "any of":
            return add(jumps=tuple(self.build(option, after) for option in tree[1]))
        _, body, least, most = tree
        if most is None:
            loop = add(jumps=(after,))
            self.automaton.add_jump(loop, self.build(body, loop))
            after = loop
        else:
            for _ in range(most - least):
                after = add(jumps=(after, self.build(body, after)))
        for _ in range(least):
            after = self.build(body, after)
        return after


@functools.lru_cache(64)
def compile_linear(pattern: str) -> LinearRegex:
    """The automaton of a pattern, made once."""
    return LinearRegex(pattern)
