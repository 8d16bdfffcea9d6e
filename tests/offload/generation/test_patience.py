"""Programs that came with a model are stopped; their results and errors are their own."""

from __future__ import annotations

import _thread
import time

import pytest
from transformers import PreTrainedTokenizerFast

import offload.generation.stream
from offload.errors import GenerationError
from offload.generation.patience import OutOfPatience, patiently
from offload.generation.stream import encode_prompt
from tests.conftest import make_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


def test_results_and_errors_come_through() -> None:
    assert patiently(lambda: 3, seconds=1, most_bytes=2**30) == 3
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 // 0, seconds=1, most_bytes=2**30)


def test_what_takes_too_long_is_stopped() -> None:
    def forever() -> None:
        while True:
            time.sleep(0)

    before = _thread._count()
    with pytest.raises(OutOfPatience):
        patiently(forever, seconds=0.1, most_bytes=2**30)
    assert _thread._count() == before


def test_a_thread_that_ends_before_it_begins_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where memory runs out in its first instructions."""
    start = _thread.start_new_thread
    monkeypatch.setattr(_thread, "start_new_thread", lambda *_: start(lambda: None, ()))
    monkeypatch.setattr("offload.generation.patience.BEGIN_SECONDS", 0.1)
    with pytest.raises(MemoryError):
        patiently(lambda: 3, seconds=5, most_bytes=2**30)


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr(offload.generation.stream, "TEMPLATE_SECONDS", 1.0)
    monkeypatch.setattr(offload.generation.stream, "TEMPLATE_BYTES", 2**27)
    return make_tokenizer()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
    ],
    ids=["time", "memory"],
)
def test_a_hostile_template_is_given_up(template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template
    with pytest.raises(GenerationError, match="broken or hostile"):
        encode_prompt(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_does_not_leave_its_sandbox(
    template: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(GenerationError, match="template"):
        encode_prompt(tokenizer, MESSAGES)
