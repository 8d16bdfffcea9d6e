"""Telling thoughts from answers, however the text is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.generation.thinking import MARKS, Piece, Voices, marks_are_special
from tests.conftest import make_tokenizer

SPECIALS = ("<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>")


def _joined(pieces: list[Piece]) -> list[tuple[str, bool]]:
    """Neighbours of one voice put together."""
    groups = itertools.groupby(pieces, key=lambda piece: piece.thought)
    return [("".join(piece.text for piece in group), thought) for thought, group in groups]


def _voices(text: str, size: int, prompt: str = "") -> list[tuple[str, bool]]:
    voices = Voices(prompt, SPECIALS)
    pieces = [p for at in range(0, len(text), size) for p in voices.push(text[at : at + size])]
    return _joined([*pieces, *voices.finish()])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("opening_closing", MARKS, ids=lambda marks: marks[0])
def test_what_is_between_marks_is_thought(opening_closing: tuple[str, str], size: int) -> None:
    opening, closing = opening_closing
    text = f"{opening}\nhm, 1 < 2\n{closing}\n\nTwo <b>."
    assert _voices(text, size) == [("hm, 1 < 2\n", True), ("Two <b>.", False)]


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_prompt_can_open_the_thoughts(size: int) -> None:
    given = "<|im_start|>assistant\n<think>\n"
    assert _voices("hm</think>Yes", size, given) == [("hm", True), ("Yes", False)]


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_an_answer_without_thoughts_loses_its_channel_s_name(size: int) -> None:
    assert _voices("<|channel|>final<|message|>Yes<|return|>", size) == [("Yes", False)]


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_call_of_a_tool_ends_the_thoughts_and_names_the_tool(size: int) -> None:
    analysis = "<|start|>assistant<|channel|>analysis<|message|>"
    text = f"<|channel|>analysis<|message|>hm<|end|>{analysis}so<|end|><|start|>assistant"
    call = "<|channel|>commentary to=functions.weather<|message|>{}"
    found = _voices(text + call, size)
    assert found == [("hmso", True), ("commentary to=functions.weather{}", False)]


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_marks_around_an_answer_are_dropped(size: int) -> None:
    text = "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Yes<|END_RESPONSE|>"
    assert _voices(text, size) == [("hm", True), ("Yes", False)]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_an_answer_may_speak_of_marks(size: int) -> None:
    text = "Models write <think> first, then </think>."
    assert _voices(text, size) == [(text, False)]
    assert _voices(f"<think>hm</think>{text}", size) == [("hm", True), (text, False)]
    assert _voices("\n <think>hm</think>Yes", size)[-2:] == [("hm", True), ("Yes", False)]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_special_token_opens_thoughts_anywhere(size: int) -> None:
    text = "First.<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final"
    assert _voices(f"{text}<|message|>Yes", size) == [
        ("First.", False),
        ("hm", True),
        ("Yes", False),
    ]


def test_marks_are_special_where_one_begins_with_a_special_token() -> None:
    tokenizer = make_tokenizer()
    assert not marks_are_special(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert not marks_are_special(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>"]})
    assert marks_are_special(tokenizer)


def test_thoughts_that_never_end_are_thoughts() -> None:
    assert _voices("<think>hm </thi", 1) == [("hm </thi", True)]


@given(st.text(alphabet="<think>/ab\n|", max_size=60), st.integers(1, 8))
def test_cutting_the_text_elsewhere_changes_nothing(text: str, size: int) -> None:
    assert _voices(text, size) == _voices(text, 1000)
