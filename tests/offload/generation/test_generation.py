"""Which prompts are accepted, when an answer ends, its figures, and agreement with transformers."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

import offload
from offload import GenerationError, GenerationResponse, generate, stream_generate
from offload.engine.handle import offload_of
from offload.generation.prompt import encode_prompt, end_tokens
from tests.conftest import BEGIN, END, PAD, Script, make_tokenizer
from tests.tiny import EXPERTS, LAYERS, K

PROMPT = "Why is the sky blue? שלום 👋"
CONTEXT = 64
HELLO = [{"role": "user", "content": "hello"}]


def _load(checkpoint: Path, packs: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"expert_bits": 16, "expert_slots": 5, "context": CONTEXT, **options}
    return offload.load(checkpoint, device="cpu", pack_dir=packs, **given)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def loaded(mixtral: Path, packs: Path) -> Iterator[PreTrainedModel]:
    model, _ = _load(mixtral, packs)
    yield model
    model.offload.close()


@pytest.fixture
def model(loaded: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The tiny model, unquantised, five slots; its generation_config may be replaced."""
    monkeypatch.setattr(loaded, "generation_config", loaded.generation_config)
    return loaded


def _tokens(model: PreTrainedModel, prompt: Any, **options: Any) -> list[int]:
    return [step.token for step in stream_generate(model, None, prompt, **options)]


# --- agreement with transformers -----------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["mixtral", "gpt_oss"])
def test_greedy_is_transformers_own_greedy(
    checkpoint: str, packs: Path, request: pytest.FixtureRequest
) -> None:
    model, tokenizer = _load(request.getfixturevalue(checkpoint), packs)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    ours = list(stream_generate(model, tokenizer, PROMPT, max_new_tokens=20))
    length = inputs["input_ids"].shape[1]
    assert [step.token for step in ours] == theirs[0, length:].tolist()
    assert "".join(step.text for step in ours) == generate(
        model, tokenizer, PROMPT, max_new_tokens=20
    )
    offload_of(model).engine.cache.check_integrity()
    model.offload.close()


def test_greedy_agrees_under_the_checkpoints_repetition_penalty(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = _tokens(model, list(range(30)), max_new_tokens=20)
    model.generation_config = GenerationConfig(repetition_penalty=1.7, pad_token_id=PAD)
    theirs = model.generate(torch.arange(30)[None], do_sample=False, max_new_tokens=20)
    ours = _tokens(model, list(range(30)), max_new_tokens=20)
    assert ours == theirs[0, 30:].tolist() != plain


def test_transformers_generate_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    inputs = tokenizer([PROMPT], return_tensors="pt")
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=12).tolist())
    assert outs[0] == outs[1] != outs[2]
    offload_of(model).engine.cache.check_integrity()


# --- prompts -------------------------------------------------------------------------------------


def test_a_text_prompt_is_taken_as_it_stands(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script
) -> None:
    script.say("ok")
    assert generate(model, tokenizer, PROMPT) == "ok"
    assert script.prompt == PROMPT


def test_messages_go_through_the_chat_template(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script
) -> None:
    messages = [{"role": "system", "content": "be brief"}, *HELLO]
    generate(model, tokenizer, messages)
    assert script.prompt == "<system>be brief</system><user>hello</user><assistant>"


def test_ids_are_given_to_the_model_as_they_are(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script
) -> None:
    for ids in ([BEGIN, 72, 105], (BEGIN, 72, 105)):
        generate(model, tokenizer, ids)
    assert script.prompts == [[BEGIN, 72, 105]] * 2


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: Any
) -> None:
    with pytest.raises(GenerationError, match="prompt is empty"):
        stream_generate(model, tokenizer, prompt)


@pytest.mark.parametrize("ids", [[1, 10**6], [1, -1]])
def test_ids_the_model_does_not_have_are_refused(model: PreTrainedModel, ids: list[int]) -> None:
    with pytest.raises(GenerationError):
        list(stream_generate(model, None, ids, max_new_tokens=1))


@pytest.mark.parametrize("text", ["\udcff", "before \udc80 after"])
def test_text_that_is_not_utf_8_is_refused(
    text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for prompt in (text, [{"role": "user", "content": text}]):
        with pytest.raises(GenerationError, match="not UTF-8"):
            stream_generate(model, tokenizer, prompt)


def test_without_a_chat_template_messages_are_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(GenerationError, match="no chat template: give the prompt as a text"):
        stream_generate(model, tokenizer, HELLO)


def test_the_error_quotes_what_a_template_refuses(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(GenerationError, match="template refused the messages: roles must alt"):
        stream_generate(model, tokenizer, HELLO)


def test_a_tokenizer_with_a_damaged_setting_is_one_line_of_error() -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = "many"
    for prompt in ("hello", HELLO):
        with pytest.raises(GenerationError, match=r"cannot read the prompt \(TypeError: .*damaged"):
            encode_prompt(tokenizer, prompt)


# --- no tokenizer --------------------------------------------------------------------------------


def test_a_checkpoint_without_tokenizer_gives_none_and_works_with_ids(
    mixtral: Path, packs: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    names = shutil.ignore_patterns("tokenizer*", "*.jinja", "special_tokens*")
    shutil.copytree(mixtral, bare, ignore=names)
    model, tokenizer = _load(bare, packs)
    assert tokenizer is None
    steps = list(stream_generate(model, tokenizer, [72, 105], max_new_tokens=5))
    assert [step.text for step in steps] == [""] * len(steps)
    assert [step.token for step in steps] == _tokens(model, [72, 105], max_new_tokens=5)
    model.offload.close()


@pytest.mark.parametrize("prompt", ["text", HELLO])
def test_without_tokenizer_text_is_refused(model: PreTrainedModel, prompt: Any) -> None:
    with pytest.raises(GenerationError, match="no tokenizer: give token ids"):
        stream_generate(model, None, prompt)


def test_without_tokenizer_there_is_no_text_to_return(model: PreTrainedModel) -> None:
    with pytest.raises(GenerationError, match="no tokenizer: use stream_generate"):
        generate(model, None, [72, 105])


def test_without_tokenizer_stop_strings_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(GenerationError, match="stop strings need a tokenizer"):
        stream_generate(model, None, [72, 105], stop_strings="x")


# --- when it ends --------------------------------------------------------------------------------


def test_ends_at_the_end_token_of_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script
) -> None:
    script.say("done")
    steps = list(stream_generate(model, tokenizer, "a"))
    assert [step.text for step in steps] == ["d", "o", "n", "e", ""]
    assert [step.finish_reason for step in steps] == [None] * 4 + ["stop"]
    assert steps[-1].token == END


@pytest.mark.parametrize("ends", [ord("c"), [ord("z"), ord("c")], [ord("c"), END]])
def test_one_end_token_or_several(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script, ends: Any
) -> None:
    model.generation_config = GenerationConfig(eos_token_id=ends)
    script.say("abcz")
    steps = list(stream_generate(model, tokenizer, "a"))
    assert "".join(step.text for step in steps) == "ab"
    assert steps[-1].finish_reason == "stop"


def test_token_0_can_be_the_end_token(model: PreTrainedModel, script: Script) -> None:
    model.generation_config = GenerationConfig(eos_token_id=0)
    script.ids = [65, 0, 66]
    assert _tokens(model, [1]) == [65, 0]


def test_without_one_in_generation_config_the_tokenizers_end_token_counts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script
) -> None:
    model.generation_config = GenerationConfig()
    script.say("ab")
    assert generate(model, tokenizer, "a", max_new_tokens=9) == "ab"
    assert len(_tokens(model, [1], max_new_tokens=9)) == 9


@pytest.mark.parametrize("named", [0, [], [ord("z")]])
def test_the_tokenizers_end_token_counts_beside_others(
    named: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    script: Script,
) -> None:
    model.generation_config = GenerationConfig(eos_token_id=named)
    script.say("ab")
    assert generate(model, tokenizer, "a", max_new_tokens=9) == "ab"


@pytest.mark.parametrize("copied", [True, False])
def test_an_id_of_the_config_counts_if_it_is_a_special_token(
    copied: bool,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A config's class names an id where the file does not, and transformers copies it."""
    for id, ends in ((ord("c"), {END}), (BEGIN, {BEGIN, END})):
        monkeypatch.setattr(model.config, "eos_token_id", id)
        copy = GenerationConfig.from_model_config(model.config)
        model.generation_config = copy if copied else GenerationConfig(eos_token_id=END)
        assert end_tokens(model, tokenizer) == ends


@pytest.mark.parametrize("limit", [1, 3])
def test_ends_after_max_new_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script, limit: int
) -> None:
    script.say("abcdef")
    steps = list(stream_generate(model, tokenizer, "a", max_new_tokens=limit))
    assert "".join(step.text for step in steps) == "abcdef"[:limit]
    assert steps[-1].finish_reason == "length"
    assert steps[-1].generation_tokens == limit == len(steps)


def test_an_end_token_at_the_limit_counts_as_a_stop(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script
) -> None:
    script.say("ab")
    *_, last = stream_generate(model, tokenizer, "a", max_new_tokens=3)
    assert last.finish_reason == "stop"


def test_max_new_tokens_comes_from_generation_config_when_not_given(
    model: PreTrainedModel, script: Script
) -> None:
    model.generation_config = GenerationConfig(max_new_tokens=4)
    script.ids = [65] * 50
    assert len(_tokens(model, [1])) == 4
    assert len(_tokens(model, [1], max_new_tokens=6)) == 6


@pytest.mark.parametrize("limit", [0, -1, "many", 1.5])
def test_less_than_one_new_token_is_refused(model: PreTrainedModel, limit: Any) -> None:
    with pytest.raises(GenerationError, match=f"max_new_tokens is {limit!r}"):
        stream_generate(model, None, [1], max_new_tokens=limit)


def test_ends_where_the_context_ends(model: PreTrainedModel, script: Script) -> None:
    script.ids = [65] * 1000
    steps = list(stream_generate(model, None, [1] * (CONTEXT - 3), max_new_tokens=1000))
    assert len(steps) == 3
    assert steps[-1].finish_reason == "length"


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1])
def test_a_prompt_that_fills_the_context_is_refused_with_the_flag(
    model: PreTrainedModel, length: int
) -> None:
    with pytest.raises(GenerationError, match=f"{length} tokens .* {CONTEXT}.*--ctx-size"):
        stream_generate(model, None, [1] * length)


# --- stop strings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        ("STOP", "hello "),
        (["STOP"], "hello "),
        (["never", "STOP", "O"], "hello ST"),
        ("ש", "hello STOP "),
        ("שלום 👋", "hello STOP "),
        ("👋 more", "hello STOP שלום "),
        ("never", "hello STOP שלום 👋 more"),
        ("more and more", "hello STOP שלום 👋 more"),
        ([], "hello STOP שלום 👋 more"),
        ("h", ""),
    ],
)
def test_stop_strings_end_the_text_and_are_not_part_of_it(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    script: Script,
    stops: Any,
    shown: str,
) -> None:
    script.say("hello STOP שלום 👋 more")
    steps = list(stream_generate(model, tokenizer, "a", stop_strings=stops))
    assert "".join(step.text for step in steps) == shown
    assert steps[-1].finish_reason == "stop"
    assert all(step.finish_reason is None for step in steps[:-1])


def test_nothing_is_computed_after_a_stop_string(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script
) -> None:
    script.say("abSTOPcd")
    steps = list(stream_generate(model, tokenizer, "a", stop_strings="STOP"))
    assert len(steps) == len("abSTOP")


def test_text_that_was_held_back_appears_at_the_limit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script
) -> None:
    script.say("abSTOP")
    assert generate(model, tokenizer, "a", stop_strings="STOP", max_new_tokens=5) == "abSTO"


def test_a_stop_string_in_the_prompt_does_not_count(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, script: Script
) -> None:
    script.say("OP")
    assert generate(model, tokenizer, "ST", stop_strings="STOP") == "OP"


# --- sampling ------------------------------------------------------------------------------------


def test_seeds_repeat_and_differ(model: PreTrainedModel) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 10}
    first, again, other = (_tokens(model, [1, 2], seed=seed, **options) for seed in (3, 3, 4))
    assert first == again != other


def test_parameters_out_of_range_are_refused_before_the_first_step(
    model: PreTrainedModel, script: Script
) -> None:
    with pytest.raises(GenerationError, match="top_p is 2"):
        stream_generate(model, None, [1], top_p=2.0)
    assert script.prompts == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_give_no_token(
    temperature: float, model: PreTrainedModel
) -> None:
    weight = model.lm_head.weight.data
    before = weight[7, 0].clone()
    weight[7, 0] = float("nan")
    try:
        with pytest.raises(GenerationError, match="logits are not finite"):
            next(stream_generate(model, None, [1, 2], temperature=temperature))
    finally:
        weight[7, 0] = before
    assert len(list(stream_generate(model, None, [1, 2], max_new_tokens=2))) > 0


def test_sampling_parameters_may_be_whole_numbers(model: PreTrainedModel) -> None:
    options: dict[str, Any] = {"temperature": 1, "repetition_penalty": 2, "top_p": 1, "min_p": 0}
    assert len(_tokens(model, [1, 2], max_new_tokens=2, **options)) == 2


# --- figures -------------------------------------------------------------------------------------


def test_figures_are_consistent(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    steps = list(stream_generate(model, tokenizer, "abcdef", max_new_tokens=8))
    for count, step in enumerate(steps, start=1):
        assert isinstance(step, GenerationResponse)
        assert step.generation_tokens == count
        assert step.prompt_tokens == 6
        assert step.prompt_tps == steps[0].prompt_tps > 0
        assert step.peak_memory > 2**20
        assert step.experts.tokens == 6 + count - 1
        counts = step.experts.counts
        assert counts.hits + counts.misses == counts.requests > 0
        assert step.experts.total_experts == LAYERS * EXPERTS
    assert steps[0].generation_tps == 0
    assert all(step.generation_tps > 0 for step in steps[1:])
    pairs = itertools.pairwise(step.experts.counts.requests for step in steps)
    assert all(after - before == LAYERS * K for before, after in pairs)


def test_the_experts_figures_count_this_generation_alone(model: PreTrainedModel) -> None:
    first, second = (
        list(stream_generate(model, None, [1, 2, 3], max_new_tokens=4))[-1].experts
        for _ in range(2)
    )
    assert first.counts.requests == second.counts.requests
    assert first.tokens == second.tokens == 6


# --- interruptions and the end -------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 7])
def test_a_stream_that_breaks_off_does_not_disturb_the_next_one(
    model: PreTrainedModel, after: int
) -> None:
    expected = _tokens(model, list(b"a second prompt"), max_new_tokens=10)
    stream = stream_generate(model, None, list(b"a first one"), max_new_tokens=10)
    broken_off = list(itertools.islice(stream, after))
    assert len(broken_off) == after
    del stream
    assert _tokens(model, list(b"a second prompt"), max_new_tokens=10) == expected
    offload_of(model).engine.cache.check_integrity()


def test_two_streams_side_by_side_do_not_disturb_each_other(model: PreTrainedModel) -> None:
    prompts = (list(b"one"), list(b"two and more"))
    expected = [_tokens(model, prompt, max_new_tokens=8) for prompt in prompts]
    streams = [stream_generate(model, None, prompt, max_new_tokens=8) for prompt in prompts]
    steps = list(zip(*streams, strict=True))
    assert [[pair[i].token for pair in steps] for i in range(2)] == expected


@pytest.mark.parametrize("wait", [0, 5, 11])
def test_ctrl_c_while_waiting_for_an_expert_does_not_disturb_the_next_stream(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, wait: int
) -> None:
    expected = _tokens(model, list(b"a prompt"), max_new_tokens=10)
    transfer = offload_of(model).engine.transfer
    waits = itertools.count()

    def interrupted(ticket: Any) -> None:
        if next(waits) == wait:
            raise KeyboardInterrupt
        type(transfer).wait(transfer, ticket)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _tokens(model, list(b"another"), max_new_tokens=10)
    offload_of(model).engine.cache.check_integrity()
    assert _tokens(model, list(b"a prompt"), max_new_tokens=10) == expected


def test_a_closed_model_is_an_error(mixtral: Path, packs: Path) -> None:
    model, tokenizer = _load(mixtral, packs)
    under_way = stream_generate(model, tokenizer, PROMPT, max_new_tokens=5)
    next(under_way)
    model.offload.close()
    model.offload.close()
    with pytest.raises(GenerationError, match="closed: load it again"):
        generate(model, tokenizer, PROMPT)
    with pytest.raises(GenerationError, match="closed"):
        stream_generate(model, tokenizer, [1])
    with pytest.raises(GenerationError, match="closed"):
        next(under_way)
    with pytest.raises(GenerationError, match="closed"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
