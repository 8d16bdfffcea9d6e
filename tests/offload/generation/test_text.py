"""The pieces of a text join to the whole; none splits a character or shows a stop string."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from offload.generation.text import TextStream
from tests.conftest import END, make_tokenizer, random_splits

BROKEN = "\ufffd"
TEXT = st.text(
    st.sampled_from("aZ 0\n\t\0é\u07ff\u05e9\u05dc\u0800€字\uffff👋🏽\U0010ffff\u200d\u0301")
)
WORDS = st.text(st.sampled_from("ab-שלום👋🏽é \n"), max_size=30)
TOKENIZER = make_tokenizer()


@dataclass
class Pieces:
    """A tokenizer whose tokens are arbitrary byte strings; a token id is an index in `pieces`."""

    pieces: list[bytes]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def _in_pieces(pieces: list[bytes], stops: tuple[str, ...] = ()) -> list[str]:
    """The text that the stream returns after each token and at the end, until it stops."""
    stream = TextStream(Pieces(pieces), stops)  # type: ignore[arg-type]
    shown = []
    for token in range(len(pieces)):
        shown.append(stream.push(token))
        if stream.stopped:
            break
    return [*shown, stream.finish()]


def _in_bytes(data: bytes, stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(TOKENIZER, stops)
    shown = []
    for byte in data:
        shown.append(stream.push(byte))
        if stream.stopped:
            break
    return [*shown, stream.finish()]


@given(TEXT)
def test_bytes_become_the_whole_text_and_never_part_of_a_character(text: str) -> None:
    shown = _in_bytes(text.encode())
    assert "".join(shown) == text == TOKENIZER.decode(list(text.encode()))
    assert all(text.startswith(part) for part in accumulate(shown))
    assert BROKEN not in "".join(shown)


@given(TEXT, st.randoms(use_true_random=False))
def test_text_is_whole_wherever_tokens_cut_its_bytes(text: str, chooser: random.Random) -> None:
    shown = _in_pieces(random_splits(text.encode(), chooser))
    assert "".join(shown) == text
    assert all(text.startswith(part) for part in accumulate(shown))


@given(st.binary(max_size=40))
def test_bytes_that_are_not_text_give_the_full_decode_without_its_unfinished_end(
    data: bytes,
) -> None:
    """Whatever bytes a model produces, no text appears twice, is lost, or changes later."""
    shown = _in_bytes(data)
    full = TOKENIZER.decode(list(data))
    assert "".join(shown) == full.rstrip(BROKEN)
    assert all(full.startswith(part) for part in accumulate(shown))
    assert not any(part.endswith(BROKEN) for part in shown)


def test_a_character_appears_with_its_last_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer)
    assert [stream.push(byte) for byte in "ש👋".encode()] == ["", "ש", "", "", "", "👋"]
    assert stream.finish() == ""


def test_a_character_that_never_became_whole_is_dropped(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    stream = TextStream(tokenizer)
    shown = [stream.push(byte) for byte in b"ok" + "👋".encode()[:3]]
    assert shown == ["o", "k", "", "", ""]
    assert stream.finish() == ""


def test_special_and_unknown_tokens_show_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in (*b"a", END, 319, *"é".encode(), END)]
    assert "".join(shown) + stream.finish() == "aé"


def test_spaces_between_tokens_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "  two  spaces , a comma . 's\n\n\tend "
    assert "".join(_in_bytes(text.encode())) == text


@given(WORDS, st.text(st.sampled_from("ab-שלום👋🏽é \n"), min_size=1, max_size=6))
def test_text_ends_before_the_stop_string(text: str, stop: str) -> None:
    assert "".join(_in_bytes(text.encode(), (stop,))) == text.partition(stop)[0]


@given(
    before=WORDS,
    stop=st.text(st.sampled_from("ab-שלום👋🏽é \n"), min_size=1, max_size=6),
    after=WORDS,
    chooser=st.randoms(use_true_random=False),
)
def test_stop_strings_are_found_wherever_tokens_cut_them(
    before: str, stop: str, after: str, chooser: random.Random
) -> None:
    text = before + stop + after
    shown = _in_pieces(random_splits(text.encode(), chooser), (stop,))
    assert "".join(shown) == text.partition(stop)[0]


@given(
    text=WORDS,
    stops=st.lists(st.text(st.sampled_from("ab-ש👋"), min_size=1, max_size=4), max_size=3),
    chooser=st.randoms(use_true_random=False),
)
def test_no_stop_string_is_ever_shown(text: str, stops: list[str], chooser: random.Random) -> None:
    shown = "".join(_in_pieces(random_splits(text.encode(), chooser), tuple(stops)))
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not any(stop in text for stop in stops):
        assert shown == text


def test_a_possible_beginning_of_a_stop_string_is_held_back_for_a_while() -> None:
    stream = TextStream(TOKENIZER, ["STOP"])
    assert [stream.push(byte) for byte in b"aSTO"] == ["a", "", "", ""]
    assert stream.push(ord("x")) == "STOx"
    assert [stream.push(byte) for byte in b"ST"] == ["", ""]
    assert stream.finish() == "ST"
    assert not stream.stopped


def test_a_stop_string_that_overlaps_its_own_beginning_is_found() -> None:
    assert "".join(_in_bytes(b"aabaabaaab..", ("aabaaab",))) == "aab"


def test_a_stop_string_before_part_of_a_character_is_not_shown() -> None:
    """The last token ends the stop string and begins a character that never comes."""
    assert "".join(_in_pieces([b"hello ", b"END\xe2"], ("END",))) == "hello "


@pytest.mark.parametrize("stops", [(), ("",)])
def test_without_stop_strings_nothing_is_held_back(stops: tuple[str, ...]) -> None:
    assert _in_bytes(b"abc", stops) == ["a", "b", "c", ""]
