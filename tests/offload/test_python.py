"""What a user of Python meets: names, types, refusals and pictures are told in Python's words."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from offload.errors import OptionError
from offload.keywords import ELSEWHERE, in_keywords
from offload.loading import Loaded
from offload.quant.errors import OffloadError
from tests.conftest import save_with_tokenizer


@pytest.fixture(scope="module")
def loaded(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    packs = tmp_path_factory.mktemp("packs")
    options: Any = {"device": "cpu", "dtype": "float32", "pack_dir": packs}
    with offload.load(mixtral, expert_slots=0.25, **options) as loaded:
        yield loaded


def test_only_public_names_are_offered() -> None:
    assert dir(offload) == sorted(offload.__all__)
    assert {"load", "generate", "stream_generate", "GenerationResponse"} <= set(dir(offload))
    assert all(getattr(offload, name) is not None for name in dir(offload))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a word as context": ({"context": "4k"}, r"context is '4k': .* a whole number, like 4096"),
    "no context": ({"context": -1}, "context: -1 is less than 0"),
    "half a context": ({"context": 64.5}, "context is 64.5: it must be a whole number"),
    "a switch as context": ({"context": True}, "context is True"),
    "a micro-batch of none": ({"ubatch_size": None}, "ubatch_size is None"),
    "threads": ({"threads": 0}, "threads: 0 is less than 1"),
    "RAM without a unit": ({"ram": "5"}, "'5' without a unit means bytes: write one"),
    "RAM as a number": ({"ram": 48}, "48 without a unit means bytes: write one"),
    "RAM in half bytes": ({"ram": 2.5}, "ram is 2.5: it must be a text or a whole number"),
    "more than all experts": ({"expert_slots": 1.5}, "1.5 is not a share of the experts"),
    "a word as a switch": ({"warm_start": "no"}, "warm_start is 'no': it must be True or False"),
    "a number as bits": ({"bits": 4}, "bits is 4: it must be a text"),
    "a type by a wrong name": ({"dtype": "fp16"}, "dtype is 'fp16': it must be one of auto,"),
    "a type of Python": ({"dtype": float}, "dtype is <class 'float'>: it must be"),
    "a set of GPUs": ({"gpus": {0, 1}}, "gpus is {0, 1}: it must be a text or a list"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_value_gets_one_sentence(what: str) -> None:
    options, told = WRONG[what]
    with pytest.raises(OffloadError, match=told) as refused:
        offload.load("demo", **options)
    assert "--" not in str(refused.value)


@pytest.mark.parametrize("source", [None, 7, ["demo"], b"demo"])
def test_what_is_no_name_of_a_model_gets_one_sentence(source: Any) -> None:
    with pytest.raises(OffloadError, match=r"the model is .*: name one, as a text or a path"):
        offload.load(source)


def test_names_of_other_libraries_lead_to_ours(loaded: Loaded) -> None:
    known = {
        offload.load: set(offload.options.LoadKeywords.__annotations__),
        offload.generate: {"max_new_tokens", "temperature", "stop_strings", "repetition_penalty"},
    }
    for function, names in known.items():
        arguments = ["demo"] if function is offload.load else [*loaded, "Hi!"]
        for ours in names & set(ELSEWHERE):
            for theirs in ELSEWHERE[ours].split():
                with pytest.raises(OptionError, match=rf"no keyword '{theirs}': write {ours}="):
                    function(*arguments, **{theirs: 1})
    for function in (offload.generate, offload.stream_generate):
        name = function.__name__
        with pytest.raises(TypeError, match=rf"{name}\(\) has no keyword 'tempreature': .*temper"):
            function(*loaded, "Hi!", tempreature=1)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=rf"help\({name}\) lists the keywords"):
            function(*loaded, "Hi!", zzz=1)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_new_tokens": "5"}, "max_new_tokens is '5': it must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be a whole number, at least 1"),
        ({"temperature": "hot"}, "temperature is 'hot': it must be a number"),
        ({"stop_strings": 5}, "stop_strings is 5: give a text or a list"),
        ({"stop_strings": [5]}, r"stop_strings is \[5\]: give a text or a list"),
    ],
)
def test_a_wrong_argument_of_generate_gets_one_sentence(
    wrong: dict[str, Any], told: str, loaded: Loaded
) -> None:
    for function in (offload.generate, offload.stream_generate):
        with pytest.raises(offload.GenerationError, match=told):
            function(*loaded, "Hi!", **wrong)


def test_what_load_has_not_returned_is_told(loaded: Loaded, mixtral: Path) -> None:
    model, tokenizer = loaded
    with pytest.raises(OffloadError, match="a str that load has not returned"):
        offload.generate("demo", tokenizer, "Hi!")  # type: ignore[call-overload]
    with pytest.raises(OffloadError, match="the tokenizer is 'Hi!': give the one"):
        offload.generate(model, "Hi!", "Hi!")  # type: ignore[call-overload]
    with pytest.raises(OffloadError, match="num_return_sequences is '2'"):
        offload.generate(*loaded, "Hi!", num_return_sequences="2")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("flags", "keywords"),
    [
        ("lower --ctx-size, --expert-slots", "lower context=, expert_slots="),
        ("give --ctx-size 64, or --expert-slots 25%", 'give context=64, or expert_slots="25%"'),
        ("use --gpus 0,1 (or --engine auto)", 'use gpus="0,1" (or engine="auto")'),
        ("pass --trust-remote-code if", "pass trust_remote_code=True if"),
        ("--no-warm-start: off", "warm_start=False: off"),
        ("--temp and --repeat-penalty", "temperature= and repetition_penalty="),
        ("--n-predict 5", "max_new_tokens=5"),
        ("a--b, --no-such-flag 7, --debug", "a--b, --no-such-flag 7, --debug"),
    ],
)
def test_flags_become_keywords(flags: str, keywords: str) -> None:
    assert in_keywords(flags) == keywords


def test_messages_name_keywords_once_load_was_called_and_flags_in_a_command(
    loaded: Loaded, mixtral_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import cli

    assert str(OffloadError("lower --ctx-size")) == "lower --ctx-size"
    with pytest.raises(OffloadError):
        offload.load("demo", context=-1)
    assert str(OffloadError("lower --ctx-size")) == "lower context="
    record = logging.getLogger("offload").makeRecord(
        "offload", logging.WARNING, "", 0, "use %s", ("--gpus 0,1",), None
    )
    assert logging.getLogger("offload").filter(record)
    assert record.getMessage() == 'use gpus="0,1"'
    assert cli.main(["generate", str(mixtral_pack), "-p", "long" * 20, "-c", "8"]) == 1
    assert "--ctx-size" in capsys.readouterr().err
    assert str(OffloadError("lower --ctx-size")) == "lower context="


def test_a_with_block_closes_the_model(mixtral_pack: Path) -> None:
    with offload.load(mixtral_pack) as (model, tokenizer):
        assert offload.generate(model, tokenizer, "Hi!", max_new_tokens=2) is not None
    assert model.offload.engine.closed
    again, _ = offload.load(mixtral_pack)
    with again.offload as handle:
        assert handle is again.offload
    assert again.offload.engine.closed
    assert repr(again.offload).endswith("closed)")
    assert "closed" in again.offload._repr_html_()


def test_threads_are_those_that_were_asked_for(mixtral_pack: Path) -> None:
    before = torch.get_num_threads()
    try:
        with offload.load(mixtral_pack, threads=2) as (model, _):
            assert torch.get_num_threads() == 2
            assert model.offload.threads is None, "their number is fixed"
    finally:
        torch.set_num_threads(before)


def test_a_share_of_the_experts_may_be_a_number(loaded: Loaded) -> None:
    info = loaded.model.offload.pack.info
    assert loaded.model.offload.fit.slots == round(info.total_experts / 4)


def test_auto_is_the_type_of_the_config(mixtral_pack: Path) -> None:
    with offload.load(mixtral_pack, dtype="auto") as (model, _):
        assert model.dtype == torch.float32
    with offload.load(mixtral_pack, dtype="bfloat16") as (model, _):
        assert model.dtype == torch.bfloat16


def test_what_is_printed_is_one_short_line(loaded: Loaded) -> None:
    *_, step = offload.stream_generate(*loaded, "Hi!", max_new_tokens=3)
    for thing in (step, step.experts, loaded.model.offload, loaded.model.offload.stats()):
        text = repr(thing)
        assert len(text) < 160
        assert "\n" not in text
    assert repr(step.experts).startswith("Stats(6/24 slots, hits ")
    assert "finish_reason='length'" in repr(step)


def test_a_notebook_shows_a_cell_for_each_expert(loaded: Loaded) -> None:
    shown = loaded.model.offload._repr_html_()
    info = loaded.model.offload.pack.info
    assert shown.count('title="layer ') == info.total_experts
    assert shown.count("<tr>") == len(info.layers)
    assert f"of {info.total_experts} experts in memory" in shown


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "deepcopy": (copy.deepcopy, "cannot be copied or pickled"),
    "copy": (copy.copy, "cannot be copied or pickled"),
    "pickle": (pickle.dumps, "cannot be copied or pickled"),
    "half": (lambda model: model.half(), r"computes in torch.float32: .* dtype=torch.float16"),
    "bfloat16": (lambda model: model.bfloat16(), "load it again with dtype=torch.bfloat16"),
    "double": (lambda model: model.double(), "load it again with dtype=torch.float64"),
    "to a type": (lambda model: model.to(dtype=torch.float16), "dtype=torch.float16"),
    "to a device": (lambda model: model.to("meta"), "is on cpu: load it again with device='meta'"),
    "cuda": (lambda model: model.cuda(), "is on cpu: load it again with device='cuda'"),
    "experts": (lambda model: model.set_experts_implementation("eager"), "from their pack"),
    "saving": (lambda model: model.save_pretrained("x"), "copy the folder of the pack"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_lose_the_experts_is_refused_and_changes_nothing(
    what: str, loaded: Loaded
) -> None:
    act, told = REFUSED[what]
    before = offload.generate(*loaded, "Hi!", max_new_tokens=4)
    with pytest.raises(OffloadError, match=told):
        act(loaded.model)
    assert offload.generate(*loaded, "Hi!", max_new_tokens=4) == before


def test_what_changes_nothing_is_allowed(loaded: Loaded) -> None:
    model = loaded.model
    assert model.to("cpu") is model.float() is model.cpu() is model.to(torch.float32) is model
    model.set_experts_implementation("offload")


@pytest.mark.parametrize("bits", ["experts=4", "q4"])
def test_parameters_are_counted_with_those_in_records(
    bits: str, mixtral: Path, tmp_path: Path
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(mixtral)
    with offload.load(mixtral, bits=bits, pack_dir=tmp_path) as (model, _):
        assert model.num_parameters() == whole.num_parameters()
        without = whole.num_parameters(exclude_embeddings=True)
        assert model.num_parameters(exclude_embeddings=True) == without
        assert model.num_parameters(only_trainable=True) == 0


def test_concurrent_calls_leave_nothing_on_the_model_and_do_not_see_one_another(
    loaded: Loaded,
) -> None:
    model = loaded.model
    prompts = [["one", "and two"], ["three three three", "4"], ["five", "six and seven"]]
    options: Any = {"max_new_tokens": 6, "temperature": 1.5, "repetition_penalty": 1.3}
    alone = [
        offload.generate(*loaded, batch, seed=seed, **options) for seed, batch in enumerate(prompts)
    ]
    config, settings = model.generation_config, model.generation_config.to_dict()
    together: dict[int, list[str]] = {}

    def call(seed: int) -> None:
        together[seed] = offload.generate(*loaded, prompts[seed], seed=seed, **options)

    for _ in range(3):
        calls = [threading.Thread(target=call, args=(seed,)) for seed in range(len(prompts))]
        for each in calls:
            each.start()
        for each in calls:
            each.join()
        assert [together[seed] for seed in range(len(prompts))] == alone
    assert model.generation_config is config
    assert config.to_dict() == settings


def test_prompts_of_a_model_that_sees_padding_are_answered_as_each_alone(tmp_path: Path) -> None:
    compressed = ["compressed_sparse_attention"] * 3
    checkpoint = save_with_tokenizer("deepseek_v4", tmp_path / "model", layer_types=compressed)
    options: Any = {"device": "cpu", "dtype": "float32", "pack_dir": tmp_path}
    with offload.load(checkpoint, expert_bits=16, **options) as loaded:
        prompts = [[7, 8, 9], [*range(5, 45)], [11] * 20, [9, 8, 7]]
        alone = [offload.generate(*loaded, prompt, max_new_tokens=8) for prompt in prompts]
        assert offload.generate(*loaded, prompts, max_new_tokens=8) == alone
