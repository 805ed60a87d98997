"""Control tokens (`<|im_end|>`) in texts of users are text: they cannot end a turn or begin one.

They are hidden from chat templates and from the tokenizer's search for such tokens. A text without
them has the ids that the tokenizer gives it.
"""

import functools
import re
import secrets
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

# Added tokens of this form are control tokens even where the tokenizer calls them no special ones.
_CONTROL_FORM = re.compile(r"<[|｜].+[|｜]>")
_TEXT, _MEANT = "1", "2"  # the kinds of placeholders


class Mixed(str):
    """A text that is in part of the user's and in part of the operator's, who means what he writes.

    Attributes:
      trusted: [start, end) of the operator's parts.
    """

    trusted: tuple[tuple[int, int], ...]

    def __new__(cls, parts: Sequence[tuple[str, bool]]):
        """Joins parts, each with whether it is the operator's."""
        self = super().__new__(cls, "".join(text for text, _ in parts))
        spans, start = [], 0
        for text, is_trusted in parts:
            if is_trusted:
                spans.append((start, start + len(text)))
            start += len(text)
        self.trusted = tuple(spans)
        return self

    @staticmethod
    def joined(separator: str, texts: Sequence[str]) -> "Mixed":
        """Texts, some of them `Mixed`, with the operator's separator between them."""
        parts = []
        for text in texts:
            parts += [(separator, True)] if parts else []
            start = 0
            for first, last in getattr(text, "trusted", ()):
                parts += [(text[start:first], False), (text[first:last], True)]
                start = last
            parts.append((text[start:], False))
        return Mixed(parts)


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that a text of a user must not be able to write, longest first."""
    found = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip() and (token.special or _CONTROL_FORM.fullmatch(token.content))
    }
    found |= {token for token in tokenizer.all_special_tokens if token.strip()}
    return tuple(sorted(found, key=lambda token: (-len(token), token)))


class Hiding:
    """Writes control tokens in texts as placeholders, and tokenises what becomes of them.

    A placeholder is a number that nobody can guess, so that templates and JSON leave it as it is.
    """

    def __init__(self, tokenizer: Any):
        self.tokens = control_tokens(tokenizer)
        self._added = {t.content: t for t in tokenizer.added_tokens_decoder.values()}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._control_ids = set(tokenizer.convert_tokens_to_ids(list(self.tokens)))
        self._control_ids.discard(tokenizer.unk_token_id)  # what is not known is no forgery
        self._control = re.compile("|".join(map(re.escape, self.tokens)) or r"(?!)")
        self._nonce = str(10**19 + secrets.randbelow(9 * 10**19))
        self._placeholder = re.compile(rf"{self._nonce}([12])([0-9]{{6}})")
        self._foreign = re.compile(rf"{self._nonce}(?![34][0-9]{{6}})")

    def found(self, text: str) -> str:
        """The first control token in the text; "" for none."""
        match = self._control.search(text)
        return match[0] if match else ""

    def hide(self, text: str, table: list[str]) -> str:
        """The text with placeholders for its control tokens; the operator's stay control tokens.

        Args:
          text: it may be `Mixed`.
          table: what the placeholders stand for; added to.
        """
        trusted = getattr(text, "trusted", ())

        def hidden(match: re.Match) -> str:
            start, end = match.span()
            meant = any(first <= start and end <= last for first, last in trusted)
            return self._put(match[0], _MEANT if meant else _TEXT, table)

        return self._control.sub(hidden, str(text))

    def hide_seams(self, texts: list[str], table: list[str]) -> list[str]:
        """Hides the beginning of what becomes a control token where texts are joined.

        A template may cut the spaces at their ends.
        """
        stripped = [text.strip() for text in texts]
        joined = "".join(stripped)
        starts = [0]
        for text in stripped:
            starts.append(starts[-1] + len(text))
        texts = list(texts)
        for match in reversed(list(self._control.finditer(joined))):
            place = max(p for p, text in enumerate(stripped) if text and starts[p] <= match.start())
            kept = match.start() - starts[place]
            body = texts[place].rstrip()
            cut = len(body) - (len(stripped[place]) - kept)
            hidden = self._put(body[cut:], _TEXT, table)
            texts[place] = body[:cut] + hidden + texts[place][len(body) :]
        return texts

    def with_meant(self, text: str, table: list[str]) -> str:
        """The text with the operator's control tokens in the places of their placeholders."""
        return self._placeholder.sub(lambda m: table[int(m[2])] if m[1] == _MEANT else m[0], text)

    def hides(self, text: str) -> bool:
        """Whether there is a placeholder of a user's control token in the text."""
        return f"{self._nonce}{_TEXT}" in text

    def token_ids(self, text: str, table: list[str], *, add_special_tokens: bool) -> list[int]:
        """The ids of a rendered text with placeholders.

        Raises:
          ValueError: where the tokenizer knows no way to write a control token as text.
        """
        if self._backend is None:
            raise ValueError(f"this tokenizer cannot write {table[0]!r} as text")
        text = self.with_meant(text, table)
        # Those that stand there now are of the template and the operator.
        text = self._control.sub(lambda m: self._stand_in(self.tokens.index(m[0])), text)
        # A model whose vocabulary has the control token as a word needs it in two pieces.
        for seam in ("", self._seam):
            literal = functools.partial(_literal, table=table, seam=seam)
            plain = self._placeholder.sub(literal, text)
            if self._foreign.search(plain):
                raise ValueError("the chat template changes a text in which control tokens stand")
            ids = self._twin.encode(plain, add_special_tokens=False).ids
            if self._control_ids.isdisjoint(ids):
                if add_special_tokens:
                    ids = self._twin.encode(plain, add_special_tokens=True).ids
                seam_id = self._twin.token_to_id(self._seam)
                return [self._meant.get(i, i) for i in ids if i != seam_id]
        raise ValueError(f"this tokenizer cannot write {table[0]!r} as text")

    def _put(self, text: str, kind: str, table: list[str]) -> str:
        table.append(text)
        return f"{self._nonce}{kind}{len(table) - 1:06d}"

    def _stand_in(self, number: int) -> str:
        return f"{self._nonce}3{number:06d}"

    @property
    def _seam(self) -> str:
        return f"{self._nonce}4000000"

    @functools.cached_property
    def _twin(self):
        """The tokenizer that takes control tokens for text, and their stand-ins for them."""
        from tokenizers import AddedToken, Tokenizer

        twin = Tokenizer.from_str(self._backend.to_str())
        twin.no_padding()
        twin.no_truncation()
        twin.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in self.tokens]
        )
        stand_ins = []
        for number, token in enumerate(self.tokens):
            like = self._added.get(token)
            strips = {"lstrip": like.lstrip, "rstrip": like.rstrip} if like else {}
            stand_ins.append(AddedToken(self._stand_in(number), normalized=False, **strips))
        twin.add_tokens([*stand_ins, AddedToken(self._seam, normalized=False)])
        twin.encode_special_tokens = True
        return twin

    @functools.cached_property
    def _meant(self) -> dict[int, int]:
        """The ids of stand-ins, and of what they stand for."""
        return {
            self._twin.token_to_id(self._stand_in(number)): self._backend.token_to_id(token)
            for number, token in enumerate(self.tokens)
        }


def _literal(match: re.Match, table: list[str], seam: str) -> str:
    text = table[int(match[2])]
    return text[0] + seam + text[1:]


# Making one takes seconds for a large vocabulary, and a server renders one prompt at a time.
_HIDINGS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# What one hides another cannot find again, so that threads must not make two.
_MAKING = threading.Lock()


def hiding_of(tokenizer: Any) -> Hiding:
    """The one `Hiding` of a tokenizer; any thread may call this."""
    with _MAKING:
        if tokenizer not in _HIDINGS:
            _HIDINGS[tokenizer] = Hiding(tokenizer)
        return _HIDINGS[tokenizer]


def control_token_in(tokenizer: Any, value: Any) -> str:
    """The first control token in a text, or in the texts inside lists and dicts; "" for none."""
    return next(filter(None, map(hiding_of(tokenizer).found, texts_in(value))), "")


def text_token_ids(
    tokenizer: Any, texts: Sequence[str], *, allow_control_tokens: bool, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of plain texts, their control tokens as text unless they are allowed.

    Args:
      texts: those of users, or `Mixed`.
    """
    ids = tokenizer([str(text) for text in texts], add_special_tokens=add_special_tokens)
    ids = ids["input_ids"]
    if allow_control_tokens:
        return ids
    hiding = hiding_of(tokenizer)
    for row, text in enumerate(texts):
        if hiding.found(text):
            table: list[str] = []
            hidden = hiding.hide(text, table)
            if hiding.hides(hidden):
                ids[row] = hiding.token_ids(hidden, table, add_special_tokens=add_special_tokens)
    return ids


def texts_in(value: Any):
    """All texts in nested lists and dicts, keys of dicts too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def with_texts(value: Any, texts) -> Any:
    """`value` with its texts, in the order of `texts_in`, replaced by those of an iterator."""
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, Mapping):
        return {with_texts(k, texts): with_texts(v, texts) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [with_texts(item, texts) for item in value]
    return value
