"""Options are stated once: `load`, its keywords, the flags and docs/options.md agree."""

from __future__ import annotations

import argparse
import inspect
import pkgutil
import pydoc
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload import options
from offload.bench.command import SWEPT, BenchOptions, combinations
from offload.flags import add_options, default_text, options_from, options_of, words_of
from offload.loading import load_and_tell, load_with
from offload.main import COMMANDS, build_parser
from offload.options import LoadKeywords, LoadOptions
from offload.quality.command import CheckOptions
from tests import options_page

MODULES = [pkgutil.resolve_name(place.partition(":")[0]) for place, _ in COMMANDS.values()]
KINDS = {
    kind
    for module in (options, *MODULES)
    for kind in vars(module).values()
    if is_dataclass(kind) and isinstance(kind, type) and kind.__name__.endswith("Options")
}


def given(kind: type, *words: str, **settings: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, kind, **settings)
    return parser.parse_args(words)


def test_the_keywords_for_type_checkers_are_the_fields_in_order() -> None:
    written = {name: kind.__forward_arg__ for name, kind in LoadKeywords.__annotations__.items()}
    assert list(written.items()) == [(each.name, each.type) for each in fields(LoadOptions)]
    assert not LoadKeywords.__required_keys__


def test_the_signature_of_load_shows_every_option_with_its_default() -> None:
    source, *keywords = inspect.signature(offload.load).parameters.values()
    assert (source.name, source.kind) == ("source", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert {word.kind for word in keywords} == {inspect.Parameter.KEYWORD_ONLY}
    assert {word.name: word.default for word in keywords} == {
        each.name: each.default for each in fields(LoadOptions)
    }
    shown = pydoc.render_doc(offload.load, renderer=pydoc.plaintext)
    assert "ubatch_size: 'int' = 2048" in shown
    assert "help(offload.options.LoadOptions)" in shown


def test_the_help_of_the_options_explains_each() -> None:
    text = " ".join(pydoc.render_doc(LoadOptions, renderer=pydoc.plaintext).split())
    for _, spelling in options_of(LoadOptions):
        assert " ".join(spelling.help.split()) in text.replace(" | ", " ")


def test_an_unknown_keyword_is_named() -> None:
    with pytest.raises(TypeError, match="'vrm'"):
        offload.load("demo", vrm=1)  # type: ignore[call-arg]


def test_a_type_checker_knows_the_keywords(tmp_path: Path) -> None:
    calls = tmp_path / "calls.py"
    calls.write_text('from offload import load\nload("x", vram="20GiB")\nload("x", vrm=1)\n')
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", calls],
        capture_output=True,
        text=True,
        cwd=options_page.PAGE.parents[1],
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1
    assert ':3: error: Unexpected keyword argument "vrm" for "load"' in errors[0]


@pytest.mark.parametrize("kind", sorted(KINDS, key=str))
def test_every_option_is_explained_and_what_is_not_given_keeps_its_default(kind: type) -> None:
    for each, spelling in options_of(kind):
        assert spelling.help, each.name
    words = ["--against", "x"] if kind is CheckOptions else []
    expected = kind(**{"against": "x"} if words else {})
    assert options_from(given(kind, *words), kind) == expected


def test_flags_are_read_as_values() -> None:
    words = ("-c", "64", "--no-warm-start", "--lookahead", "--vram", "8GiB", "--expert-bits", "3")
    assert options_from(given(LoadOptions, *words), LoadOptions) == LoadOptions(
        context=64, warm_start=False, lookahead=True, vram="8GiB", expert_bits=3
    )
    bench = options_from(given(BenchOptions, "-p", "8,4", "-p", "2", "-pg", "6,2"), BenchOptions)
    assert (bench.n_prompt, bench.n_gen, bench.pg) == ((8, 4, 2), (128,), ((6, 2),))


def test_the_help_shows_the_default_that_a_command_has_of_its_own() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, LoadOptions, ["context"], context=512)
    assert options_from(parser.parse_args([]), LoadOptions).context == 512
    assert "(default: 512)" in " ".join(parser.format_help().split())


def swept(*words: str) -> list[LoadOptions]:
    return combinations(build_parser(("bench",)).parse_args(["bench", "demo", *words]))


def test_a_sweep_is_every_combination_the_last_changing_first() -> None:
    words = ("--expert-bits", "8,4", "--expert-slots", "25%", "--policy", "lru,lfru", "-c", "77")
    common = {"expert_slots": "25%", "context": 77, "warm_start": False}
    assert swept(*words) == [
        LoadOptions(expert_bits=bits, policy=policy, **common)  # type: ignore[arg-type]
        for bits in (8, 4)
        for policy in ("lru", "lfru")
    ]
    assert swept() == [LoadOptions(warm_start=False)]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--lookahead"], [True]),
        (["--no-lookahead"], [False]),
        (["--lookahead", "on,off,auto"], [True, False, None]),
    ],
)
def test_lookahead_is_a_switch_and_a_list_in_a_sweep(
    words: list[str], values: list[bool | None]
) -> None:
    assert [setting.lookahead for setting in swept(*words)] == values


@pytest.mark.parametrize("words", [("--expert-slots", "25%,many"), ("--policy", "lru,best")])
def test_a_sweep_refuses_at_once_what_could_not_be_loaded(words: tuple[str, str]) -> None:
    with pytest.raises(offload.OffloadError):
        swept(*words)


def test_every_swept_option_is_explained_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        build_parser(("bench",)).parse_args(["bench", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for each, spelling in options_of(LoadOptions):
        if each.name in SWEPT:
            told = default_text(each.default, spelling)
            assert f"{spelling.help} (default: {told})" in shown


def test_words_that_are_written_are_read_as_the_same_options() -> None:
    asked = LoadOptions(
        vram="8GiB", context=64, bits="q4", local_files_only=True, warm_start=False, lookahead=True
    )
    names = [each.name for each, spelling in options_of(LoadOptions) if spelling.flags]
    assert options_from(given(LoadOptions, *words_of(asked, names)), LoadOptions) == asked
    assert words_of(LoadOptions(), names) == []


@pytest.mark.parametrize("wrong", [{"policy": "slru"}, {"engine": "gpu"}])
def test_an_unknown_policy_or_engine_is_refused_with_the_known_ones(wrong: dict[str, str]) -> None:
    with pytest.raises(offload.UnsupportedModelError, match=r"choose \w+ or"):
        replace(LoadOptions(), **wrong)


@pytest.mark.parametrize("flag", ["--allocation", "--predictor", "--layers-ahead"])
def test_options_that_left_are_usage_errors(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        build_parser(("chat",)).parse_args(["chat", "demo", flag, "1"])
    assert left.value.code == 2
    assert flag in capsys.readouterr().err


def test_a_fit_keeps_the_options_that_it_was_made_from(mixtral_pack: Path) -> None:
    asked = LoadOptions(device="cpu", ram="1GiB", context=77, dtype=torch.float32)
    model, _ = load_with(mixtral_pack, asked)
    assert model.offload.fit.options == asked
    assert model.offload.fit.ram == 2**30
    model.offload.close()


def test_a_command_that_loads_a_model_says_what_each_card_holds(
    mixtral_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = LoadOptions(gpus=("cpu", "cpu"), ram="2GiB")
    model, tokenizer, seconds = load_and_tell(str(mixtral_pack), asked)
    assert tokenizer is not None
    assert seconds > 0
    assert capsys.readouterr().err.startswith("GPU 0: ")
    model.offload.close()


def test_the_page_of_options_is_up_to_date() -> None:
    assert options_page.PAGE.read_text(encoding="utf-8") == options_page.page()
    assert {kind for kind, _ in options_page.SECTIONS.values()} == KINDS
