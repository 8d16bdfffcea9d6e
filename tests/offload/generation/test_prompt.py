"""Chat templates in their sandbox, and what a KV cache kept between turns saves."""

from __future__ import annotations

import _thread
import threading
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import offload
from offload.errors import GenerationError
from offload.generation.prompt import PromptCache, encode_prompt
from offload.generation.stream import stream_generate
from tests.conftest import make_tokenizer
from tests.tiny import save_tiny

MESSAGES = [{"role": "user", "content": "hi"}]

# --- chat templates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_does_not_leave_its_sandbox(template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(GenerationError, match="template"):
        encode_prompt(tokenizer, MESSAGES)


def test_ctrl_c_stops_a_template_that_never_ends() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    ctrl_c = threading.Timer(0.3, _thread.interrupt_main)
    ctrl_c.start()
    with pytest.raises(KeyboardInterrupt):
        encode_prompt(tokenizer, MESSAGES)
    ctrl_c.join()


# --- the KV cache between turns ------------------------------------------------------------------


def _filled(length: int) -> DynamicCache:
    cache = DynamicCache()
    keys = torch.arange(length, dtype=torch.float32).view(1, 1, length, 1)
    cache.update(keys, keys, 0)
    return cache


@pytest.mark.parametrize(
    ("held", "prompt", "kept"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3),  # goes on
        ([1, 2, 3], [1, 2, 9, 4], 2),  # differs
        ([1, 2, 3], [1, 2, 3], 2),  # the same: one token is read for its logits
        ([1, 2, 3], [1], 0),
        ([1, 2, 3], [7, 8], 0),
        ([], [1, 2], 0),
    ],
)
def test_the_common_beginning_is_kept(held: list[int], prompt: list[int], kept: int) -> None:
    prompt_cache = PromptCache()
    prompt_cache.keep(held, _filled(len(held)) if held else None)
    cache, count = prompt_cache.take(prompt)
    assert count == kept
    assert (cache is None) == (kept == 0)
    if kept:
        assert cache.get_seq_length() == kept
    assert prompt_cache.take(prompt) == (None, 0), "what was taken is not there twice"


def test_a_cache_that_cannot_be_cut_back_serves_only_prompts_that_continue_it() -> None:
    class Sum(DynamicCache):
        is_croppable = False

    cache = Sum()
    prompt_cache = PromptCache()
    prompt_cache.keep([1, 2, 3], cache)
    assert prompt_cache.take([1, 2, 3, 4]) == (cache, 3)
    prompt_cache.keep([1, 2, 3], cache)
    assert prompt_cache.take([1, 2, 4]) == (None, 0)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_next"])
def test_a_second_turn_reads_only_what_is_new(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "checkpoint")
    model, _ = offload.load(
        tmp_path / "checkpoint", device="cpu", expert_slots=3, pack_dir=tmp_path / "packs"
    )
    prompt_cache = PromptCache()

    def answer(ids: list[int], cache: PromptCache | None) -> tuple[list[int], int]:
        steps = list(
            stream_generate(model, None, ids, max_new_tokens=6, temperature=0, prompt_cache=cache)
        )
        return [step.token for step in steps], steps[-1].cached_tokens

    first, cached = answer([*range(5, 25)], prompt_cache)
    assert cached == 0
    follow = [*range(5, 25), *first, 30, 31]
    second, cached = answer(follow, prompt_cache)
    assert cached == 20 + len(first) - 1, "the last token was said, not read"
    assert second == answer(follow, None)[0]
    model.offload.close()
