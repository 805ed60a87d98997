"""Takes tokens as they are sampled and gives text out as soon as it is certain.

A character may span tokens and a tokenizer may look back, so text is held until it ends in a whole
character. Text that could be the beginning of a stop string is held until it cannot be one.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # bytes that are no whole character decode to this
LONGEST_BEGINNING = 3  # bytes of a character that may still become whole
# The most pushes in a row without a whole character at the end. Without a limit, bytes that never
# make a character, and special tokens without text, would be decoded again with each new token.
MOST_WAITS = 16


class TextStream:
    """The text of one completion under way.

    Args:
      decode: token ids -> text.
      stop: stop strings; the text ends before the first of them that appears.
      min_tokens: no text ends at a stop string before this many tokens.

    Attributes:
      text: all text that was given out.
      num_tokens: tokens taken; tokens after a stop string are not taken.
      stopped: whether a stop string ended the text.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), min_tokens: int = 0
    ):
        self._decode, self._stop, self._min_tokens = decode, tuple(stop), min_tokens
        self._tokens: list[int] = []
        # Tokens before `_done` are decoded. Those from `_context` on are decoded again with the new
        # ones, since a tokenizer may write a token in another way at the start of a text.
        self._context = self._done = 0
        self._waits = 0  # pushes since `_done` moved
        self._given = 0  # characters given out of the text after `_done`
        self._held = ""
        self.text = ""
        self.stopped = False

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def push(self, tokens: Sequence[int]) -> str:
        """Takes further tokens; returns the text that is certain now."""
        if not self._stop:
            return self._push(tokens)
        return "".join(self._push([token]) for token in tokens if not self.stopped)

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.stopped:
            return ""
        return self._give(self._held + self._new_text()[self._given :], last=True)

    def _push(self, tokens: Sequence[int]) -> str:
        self._tokens.extend(int(token) for token in tokens)
        new = self._new_text()
        beginning = len(new) - len(new.rstrip(REPLACEMENT))
        settled = (new and not beginning) or self._waits >= MOST_WAITS
        certain = new if settled else new[: len(new) - min(beginning, LONGEST_BEGINNING)]
        fresh = certain[self._given :]
        self._given = max(len(certain), self._given)
        self._waits = 0 if settled else self._waits + 1
        if settled:
            self._context, self._done, self._given = self._done, len(self._tokens), 0
        return self._give(self._held + fresh) if fresh or self._held else ""

    def _new_text(self) -> str:
        """What the tokens since `_done` add to the text before them."""
        context = self._decode(self._tokens[self._context : self._done])
        return self._decode(self._tokens[self._context :])[len(context) :]

    def _give(self, text: str, last: bool = False) -> str:
        """Gives text out up to a stop string, or up to the beginning of a possible one."""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        self.stopped = bool(found) and self.num_tokens >= self._min_tokens
        if found:
            end = min(found)
        else:
            end = len(text) - (0 if last else self._possible_stop(text))
        self._held = "" if self.stopped else text[end:]
        self.text += text[:end]
        return text[:end]

    def _possible_stop(self, text: str) -> int:
        """The number of characters at the end of the text that may be the beginning of a stop."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stop)), 0)
