"""Names that people type lead to a model, or to a sentence that says which one was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload import SourceError
from offload.model.checkpoint import Checkpoint, ExpectedSource
from offload.model.ids import HubName, hub_name, known_model
from offload.model.known import BY_ID, BY_NAME, BY_OLLAMA, KNOWN, KnownModel
from offload.model.names import find_here
from offload.model.seam import build_on_meta, find_experts, model_class
from offload.pack.describe import PackSource
from offload.pack.recipe import Recipe

EVERY = pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)


@EVERY
def test_a_known_model_has_the_weights_it_is_published_with(known: KnownModel) -> None:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[known.model_type](**known.values, dtype="bfloat16")
    model = build_on_meta(config, model_class(config, known.name, False))
    experts = find_experts(model)
    checkpoint = Checkpoint(ExpectedSource(model), model, experts)
    info = PackSource(known.name, "", checkpoint, model, experts).describe(Recipe())
    # Biases of experts and scales of published weights are not counted.
    assert info.parameters == pytest.approx(known.weights, rel=1e-3)
    assert 0.5 < known.download_bytes / known.weights < 2.2


def test_names_are_of_one_model_each() -> None:
    assert len(BY_NAME) == len(KNOWN)
    assert len(BY_ID) == sum(1 + len(known.also) for known in KNOWN)
    assert {id.casefold() for id in BY_OLLAMA.values()} <= BY_ID.keys()
    assert not BY_OLLAMA.keys() & BY_NAME.keys()


@EVERY
def test_a_short_name_is_the_model_in_any_case(known: KnownModel) -> None:
    for name in (known.name, known.name.upper(), known.id, known.id.rpartition("/")[2]):
        assert hub_name(name).id == known.id
        assert known_model(name) is known


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", ("Qwen/Qwen3-30B-A3B-Instruct-2507", "", "")),
        ("Qwen3-30B-A3B-Instruct-2507", ("Qwen/Qwen3-30B-A3B-Instruct-2507", "", "")),
        ("a/b:Q4_K_M", ("a/b", "", "Q4_K_M")),
        ("a/b/c/d-Q8_0.gguf", ("a/b", "c/d-Q8_0.gguf", "")),
        ("https://huggingface.co/a/b", ("a/b", "", "")),
        ("https://huggingface.co/a/b/tree/main", ("a/b", "", "")),
        ("huggingface.co/a/b:Q4_0", ("a/b", "", "Q4_0")),
        ("https://huggingface.co/a/b/blob/v2/x.gguf", ("a/b", "x.gguf", "")),
    ],
)
def test_a_name_on_the_hub_is_read(text: str, name: tuple[str, str, str]) -> None:
    found = hub_name(text)
    assert (found.id, found.file, found.quant) == name
    assert found.revision == ("v2" if "v2" in text else None)


def test_a_model_that_is_known_needs_all_of_its_weights() -> None:
    assert known_model("Qwen/Qwen3-30B-A3B:Q4_K_M") is None
    assert known_model("nobody/nothing") is None
    assert HubName("x", "a/b", quant="Q4_0").model == "a/b:Q4_0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dmo", "unknown model 'dmo': did you mean demo?"),
        ("qwen3-30b-a3", "did you mean qwen3-30b-a3b?"),
        ("gptoss-20b", "did you mean gpt-oss-20b?"),
        ("qwen3:30b", "'qwen3:30b' is ollama's name: write Qwen/Qwen3-30B-A3B-Thinking-2507"),
        ("deepseek-r1:671b", "write deepseek-ai/DeepSeek-R1"),
        ("mixtral", "write mistralai/Mixtral-8x7B-Instruct-v0.1"),
        ("gpt-oss-120b:q4", "write gpt-oss-120b --bits q4"),
        ("demo.gguf", "there is no file demo.gguf: did you mean demo?"),
        ("./nowhere", "there is no folder ./nowhere: check the path"),
        ("a/b/c", "there is no folder a/b/c"),
        (
            "llama3",
            "unknown model 'llama3': give a folder, a .gguf file, a hub id (owner/name), or",
        ),
        ("two words", "unknown model 'two words'"),
        ("https://huggingface.co/a", "is not the page of a model"),
        ("https://huggingface.co/a/b/blob/main/config.json", "is one file of a model"),
    ],
)
def test_an_unknown_name_is_told_with_what_was_meant(text: str, words: str) -> None:
    with pytest.raises(SourceError) as caught:
        hub_name(text)
    assert words in str(caught.value)


def test_a_path_or_pack_with_a_typo_is_told_with_the_right_one(
    tmp_path: Path, mixtral_pack: Path
) -> None:
    (tmp_path / "my-model.gguf").touch()
    (tmp_path / "Mixtral-mine-q4").symlink_to(mixtral_pack)
    with pytest.raises(SourceError, match=r"did you mean .*/my-model\.gguf\?"):
        find_here(str(tmp_path / "mymodel.gguf"))
    with pytest.raises(SourceError, match=r"did you mean Mixtral-mine-q4\?"):
        find_here("mixtral-mine-q3", tmp_path)
