"""Text of tokens that arrive one by one."""

import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from adpo_jax.data import arithmetic
from adpo_jax.engine.text_stream import TextStream, end_of_prompt

TOKENIZER = arithmetic.make_tokenizer()
WORDS = st.text(alphabet="ab €😀\n", max_size=20)


def in_bytes(ids) -> str:
    """Every token is a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


# As SentencePiece with byte fallback has them (Gemma, Llama 2, Mistral): words, and bytes.
PIECES = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁a", "a", "b", "▁", "\n"]
SENTENCE_PIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
)


def in_pieces(ids) -> str:
    """A run of bytes is text as a whole, or as many replacements as it has bytes."""
    return SENTENCE_PIECE.decode([PIECES[i] for i in ids])


def as_pieces(text: str) -> list[int]:
    text = text.replace(" ", "▁")
    known = ([PIECES.index(c)] if c in PIECES else list(c.encode()) for c in text)
    return [i for ids in known for i in ids]


def without_first_space(ids) -> str:
    """As Llama 2 and Mistral do."""
    return in_pieces(ids).removeprefix(" ")


WAYS = {"bytes": (in_bytes, lambda text: list(text.encode())), "pieces": (in_pieces, as_pieces)}


def pieces_of(tokens, cuts):
    places = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    return [tokens[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("way", WAYS)
@given(text=WORDS, cuts=st.lists(st.integers(0, 99)))
def test_the_pieces_of_a_text_make_the_text_however_it_is_cut(way, text, cuts):
    decode, encode = WAYS[way]
    stream, tokens = TextStream(decode), encode(text)
    shown = "".join(stream.push(piece) for piece in pieces_of(tokens, cuts)) + stream.finish()
    assert shown == stream.text == text
    assert stream.num_tokens == len(tokens)


@pytest.mark.parametrize("way", WAYS)
@given(text=WORDS, stop=st.lists(st.text(alphabet="ab€\n", min_size=1, max_size=3), min_size=1))
def test_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(way, text, stop):
    decode, encode = WAYS[way]
    stream, shown = TextStream(decode, stop), ""
    for token in encode(text):
        shown += stream.push([token])
        assert text.startswith(shown)
    shown += stream.finish()
    # The first to be complete ends the text; of several at once, the one that began first.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert (shown, stream.stopped) == (text, False)
        return
    end = min(ends)
    assert stream.stopped
    assert shown == text[: min(text.find(s) for s in stop if s in text[:end])]
    assert stream.num_tokens == len(encode(text[:end]))


@pytest.mark.parametrize("way", WAYS)
@given(tokens=st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_text_neither_raise_nor_get_lost(way, tokens):
    decode, _ = WAYS[way]
    stream = TextStream(decode)
    shown = "".join(stream.push([token]) for token in tokens) + stream.finish()
    if way == "bytes":
        assert shown == decode(tokens)
        return
    # A character that was given out is not taken back for what follows it, nor given again.
    least, given_out, most = (
        collections.Counter(text.replace("\ufffd", ""))
        for text in (decode(tokens), shown, in_bytes(tokens))
    )
    assert least <= given_out <= most
    assert len(shown) <= len(tokens)


def cleaned_up(ids) -> str:
    """As `clean_up_tokenization_spaces` does: what follows may take a space back."""
    return in_pieces(ids).replace(" a ", "a")


@pytest.mark.parametrize(
    ("decode", "before", "tokens", "text"),
    [
        (in_pieces, "", "你好".encode()[:4], "你\ufffd"),
        (in_pieces, "你", "好".encode()[:1], "\ufffd"),
        (cleaned_up, "", [PIECES.index("▁a"), *as_pieces(" b")], " a b"),
    ],
)
def test_no_text_is_given_again_where_it_changes_behind_what_was_given(
    decode, before, tokens, text
):
    before = end_of_prompt(decode, as_pieces(before))
    stream = TextStream(decode, before=before)
    assert "".join(stream.push([token]) for token in tokens) + stream.finish() == text


@pytest.mark.parametrize("text", ["Ann has 3 apples.", "3+4=7 so 7*2=14"])
def test_a_real_tokenizer_gives_its_text_back(text):
    stream = TextStream(TOKENIZER.decode)
    ids = TOKENIZER(text)["input_ids"]
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == TOKENIZER.decode(ids)


@pytest.mark.parametrize("token", [0xFF, 256])
def test_no_token_is_decoded_over_and_over_in_text_that_never_ends_in_a_character(token):
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return in_bytes([i for i in ids if i < 256])

    stream = TextStream(decode)
    for i in range(500):
        stream.push([0xE2 if not i else token])
    shown = stream.text + stream.finish()
    assert max(decoded) < 50
    assert len(shown) == (1 if token == 256 else 500)


def test_a_stop_string_waits_for_min_tokens_and_the_text_still_ends_before_it():
    stream = TextStream(in_bytes, ["ab"], min_tokens=6)
    shown = [stream.push([byte]) for byte in b"xabcdefg"]
    assert "".join(shown) == "x"
    assert (stream.stopped, stream.num_tokens) == (True, 6)


def test_a_stop_string_is_found_among_bytes_that_are_no_text():
    stream = TextStream(in_bytes, ["ab"])
    stream.push(list(b"\xff\xff\xff\xff\xff\xffab and more"))
    assert (stream.stopped, stream.num_tokens) == (True, 8)
    assert stream.text == "\ufffd" * 6


def test_text_that_goes_on_with_bytes_that_are_none_is_given_on_at_once():
    stream, smile = TextStream(in_pieces), list("🙂".encode())
    shown = [stream.push([token]) for token in [*as_pieces("a"), *smile, 0xFF, *as_pieces(" b")]]
    assert "".join(shown[:5]) == "a🙂"
    assert (shown[-2][-1], shown[-1]) == (" ", "b")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("b a", " a b"), ("b a", "a"), ("", "a a"), ("a€你", " 你"), ("a", "€ a"), ("🙂", "€")],
)
def test_a_text_goes_on_behind_its_prompt(prompt, text):
    before = end_of_prompt(without_first_space, as_pieces(prompt))
    stream = TextStream(without_first_space, before=before)
    tokens = as_pieces(text)
    assert "".join(stream.push([token]) for token in tokens) + stream.finish() == text
    assert stream.num_tokens == len(tokens)
