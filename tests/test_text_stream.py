"""Text of tokens that arrive one by one."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adpo_jax.data import arithmetic
from adpo_jax.engine.text_stream import TextStream

TOKENIZER = arithmetic.make_tokenizer()
WORDS = st.text(alphabet="ab €😀\n", max_size=20)


def in_bytes(ids) -> str:
    """Every token is a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces_of(tokens, cuts):
    places = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    return [tokens[a:b] for a, b in itertools.pairwise(places)]


@given(WORDS, st.lists(st.integers(0, 99)))
def test_the_pieces_of_a_text_make_the_text_however_it_is_cut(text, cuts):
    stream, tokens = TextStream(in_bytes), list(text.encode())
    shown = "".join(stream.push(piece) for piece in pieces_of(tokens, cuts)) + stream.finish()
    assert shown == stream.text == text
    assert stream.num_tokens == len(tokens)


@given(WORDS, st.lists(st.text(alphabet="ab€\n", min_size=1, max_size=3), min_size=1))
def test_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(text, stop):
    stream, shown = TextStream(in_bytes, stop), ""
    for byte in text.encode():
        shown += stream.push([byte])
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
    assert stream.num_tokens == len(text[:end].encode())


@given(st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_text_neither_raise_nor_get_lost(tokens):
    stream = TextStream(in_bytes)
    shown = "".join(stream.push([token]) for token in tokens) + stream.finish()
    assert shown.replace("\ufffd", "") == in_bytes(tokens).replace("\ufffd", "")


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
    assert "".join(stream.push([byte]) for byte in b"\xff\xff\xff\xff\xff\xff") != ""
    stream.push(list(b"ab and more"))
    assert (stream.stopped, stream.num_tokens) == (True, 8)
