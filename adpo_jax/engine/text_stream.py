"""Takes tokens as they are sampled and gives text out as soon as it is certain.

A character may span tokens and a tokenizer may look back, so text is held until it ends in a whole
character. SentencePiece even takes back whole characters for as long as the bytes behind them are
none. Text that could be the beginning of a stop string is held until it cannot be one.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # bytes that are no whole character decode to this
LONGEST_CHARACTER = 4  # bytes, and with that tokens
# The most pushes in a row without a whole character at the end. Without a limit, bytes that never
# make a character, and special tokens without text, would be decoded again with each new token.
MOST_WAITS = 16


def end_of_prompt(decode: Callable[[list[int]], str], prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt that are whole characters; [] where there are none."""
    ends = (list(prompt[-count:]) for count in range(LONGEST_CHARACTER, 0, -1))
    texts = ((end, decode(end)) for end in ends)
    return next((end for end, text in texts if text and REPLACEMENT not in text), [])


class TextStream:
    """The text of one completion under way.

    Args:
      decode: token ids -> text.
      stop: stop strings; the text ends before the first of them that appears.
      min_tokens: no text ends at a stop string before this many tokens.
      before: tokens that the text follows, as `end_of_prompt` gives them; a tokenizer may leave a
        space out at the start of a text.

    Attributes:
      text: all text that was given out.
      num_tokens: tokens taken; tokens after a stop string are not taken.
      stopped: whether a stop string ended the text.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        before: Sequence[int] = (),
    ):
        self._decode, self._stop, self._min_tokens = decode, tuple(stop), min_tokens
        self._tokens, self._num_before = list(before), len(before)
        # Tokens before `_done` are decoded. Those from `_context` on are decoded again with the new
        # ones, since a tokenizer may write a token in another way at the start of a text.
        self._context, self._done = 0, len(before)
        self._waits = 0  # pushes since `_done` moved
        self._held = ""
        self.text = ""
        self.stopped = False

    @property
    def num_tokens(self) -> int:
        return len(self._tokens) - self._num_before

    def push(self, tokens: Sequence[int]) -> str:
        """Takes further tokens; returns the text that is certain now."""
        if not self._stop:
            return self._push(tokens)
        return "".join(self._push([token]) for token in tokens if not self.stopped)

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.stopped:
            return ""
        return self._give(self._held + self._new_text(len(self._tokens)), last=True)

    def _push(self, tokens: Sequence[int]) -> str:
        self._tokens.extend(int(token) for token in tokens)
        end, new = self._settled()
        if end == self._done and self._waits < MOST_WAITS:
            self._waits += 1
            return self._give(self._held) if self._held else ""
        self._waits, self._context, self._done = 0, self._done, end
        return self._give(self._held + new)

    def _settled(self) -> tuple[int, str]:
        """The last place up to which the text is certain, and what is new there.

        That is the end of a whole character, or after many waits whatever there is. It is `_done`
        where nothing is certain yet.
        """
        newest = len(self._tokens)
        for end in range(newest, max(self._done, newest - LONGEST_CHARACTER), -1):
            new = self._new_text(end)
            if new and not new.endswith(REPLACEMENT):
                return end, new
        if self._waits >= MOST_WAITS:
            return newest, self._new_text(newest)
        return self._done, ""

    def _new_text(self, end: int) -> str:
        """What the tokens from `_done` to `end` add to the text before them."""
        context = self._decode(self._tokens[self._context : self._done])
        text = self._decode(self._tokens[self._context : end])
        # Where they change the text that was given out before them, they are text of their own.
        if text.startswith(context):
            return text[len(context) :]
        return self._decode(self._tokens[self._done : end])

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
