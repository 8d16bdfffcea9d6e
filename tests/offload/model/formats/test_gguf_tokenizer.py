"""Tokenizers made of GGUF metadata give the ids of llama.cpp and of the models' tokenizer.json.

Expected ids and pieces were checked with llama.cpp itself, on files with this metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from offload.errors import CheckpointError
from offload.loading import load_tokenizer
from offload.model.formats.gguf import GgufFile
from offload.model.formats.gguf_splits import SPLITS
from offload.model.formats.gguf_tokenizer import end_tokens, gguf_tokenizer

# A part of Mixtral's vocabulary, under its ids: enough pieces for the texts below.
MIXTRAL = {
    **{
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "\u2581\u2581": 259,
        "\u2581t": 261,
        "in": 262,
        "\u2581s": 268,
    },
    **{"ing": 288, "le": 291, "el": 301, "ad": 316, "ac": 323, "\u2581H": 382, "\u2581W": 394},
    **{
        "\u2581le": 462,
        "ell": 479,
        "ace": 561,
        "\u2581sp": 668,
        "\u2581[": 733,
        "IN": 775,
        "wo": 809,
    },
    **{"ST": 920, "\u2581Wh": 943, "\u2581two": 989, "\u2581lead": 1736, "\u2581space": 2764},
    **{"\u2581Why": 4315, "ello": 4508, "\u2581leading": 5374, "\u2581Hi": 15359, "Hello": 16230},
    **{"INST": 16289, "\u2581": 28705, "e": 28706, "t": 28707, "a": 28708, "o": 28709, "i": 28710},
    **{
        "n": 28711,
        "s": 28713,
        "l": 28714,
        "d": 28715,
        "h": 28716,
        "c": 28717,
        "p": 28720,
        "g": 28721,
    },
    **{
        "y": 28724,
        "w": 28727,
        "S": 28735,
        "I": 28737,
        "T": 28738,
        "/": 28748,
        "N": 28759,
        "H": 28769,
    },
    **{"W": 28780, "[": 28792, "]": 28793, "?": 28804, "!": 28808},
    **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)},
}
PROMPT = "<s>[INST] Hi [/INST]Hello!</s>[INST] Why? [/INST]"
PROMPT_IDS = [
    *(1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793, 16230, 28808, 2),
    *(733, 16289, 28793, 4315, 28804, 733, 28748, 16289, 28793),
]
BYTES = list(bytes_to_unicode().values())
TEXT = (
    "I'LL say12345: x2\n\n  \tIt's \u00c9t\u00e9Ab 3//\n\u4f60\u597d, \u05e9\u05b8"
    "\u05dc\u05d5\u05dd!  a\u0301c_d one two\u4f60x\u0531y"
)


def _write(
    file: Path, kind: str, tokens: list[str], kinds: list[int] | None = None, **fields: Any
) -> Path:
    """Write a GGUF file that has only a tokenizer; `fields` are the other tokenizer.ggml.*."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds or [1] * len(tokens))
    for name, value in fields.items():
        key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
        add: dict[type, Callable[[str, Any], None]] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def _mixtral(file: Path, *, more: dict[str, int] | None = None, **fields: Any) -> Path:
    """Write `MIXTRAL`, and `more` tokens with their kinds from the id 28000 on."""
    size = max(MIXTRAL.values()) + 1
    tokens = [f"<unused{i}>" for i in range(size)]
    kinds = [5] * size
    for token, i in MIXTRAL.items():
        tokens[i], kinds[i] = token, 1 if i > 258 else 6
    kinds[:3] = [2, 3, 3]
    for i, (token, kind) in enumerate((more or {}).items(), start=28000):
        tokens[i], kinds[i] = token, kind
    scores = [-1e9 if set(token) == {"\u2581"} else 259.0 - i for i, token in enumerate(tokens)]
    return _write(file, "llama", tokens, kinds, scores=scores, **fields)


def _words(file: Path, *, kinds: dict[str, int] | None = None, **fields: Any) -> Path:
    """Write a byte-level vocabulary without merges, with `kinds` of further tokens."""
    tokens = [*BYTES, *(kinds or {})]
    merges = fields.pop("merges", ["\u0120 a"])
    tokens += [merge.replace(" ", "") for merge in merges]
    listed = [1] * 256 + list((kinds or {}).values()) + [1] * len(merges)
    return _write(file, "gpt2", tokens, listed, merges=merges, **fields)


def _reopened(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """`tokenizer` as a pack keeps it."""
    tokenizer.save_pretrained(folder)
    opened = load_tokenizer(folder, trust_remote_code=False)
    assert opened is not None
    return opened


# --- SentencePiece -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (PROMPT, PROMPT_IDS),
        (" leading space", [28705, 5374, 2764]),
        ("  two", [259, 989]),
        ("Hi", [15359]),
        ("Hi\n\u00e9", [15359, 13, 198, 172]),
        ("</s> Hi</s>", [2, 28705, 15359, 2]),
        ("", []),
    ],
)
def test_a_sentencepiece_vocabulary_gives_the_ids_of_mixtral(
    text: str, ids: list[int], tmp_path: Path
) -> None:
    made = gguf_tokenizer(_mixtral(tmp_path / "t.gguf"))
    for tokenizer in (made, _reopened(made, tmp_path / "saved")):
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        assert tokenizer(text).input_ids == [1, *ids]
        assert tokenizer.decode(tokenizer("Hi two").input_ids, skip_special_tokens=True) == "Hi two"


def test_the_metadata_says_what_goes_around_a_text(tmp_path: Path) -> None:
    made = gguf_tokenizer(
        _mixtral(
            tmp_path / "t.gguf",
            add_space_prefix=False,
            add_bos_token=False,
            add_eos_token=True,
            bos_token_id=1,
            eos_token_id=2,
            chat_template="{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]",
        )
    )
    for tokenizer in (made, _reopened(made, tmp_path / "saved")):
        assert tokenizer("Hello").input_ids == [16230, 2]
        assert tokenizer.decode(tokenizer(" Hi").input_ids, skip_special_tokens=True) == " Hi"
        said = [{"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(said, tokenize=False) == "<s>[INST] Hi [/INST]"


def test_control_tokens_are_special_and_user_defined_ones_are_text(tmp_path: Path) -> None:
    made = gguf_tokenizer(_mixtral(tmp_path / "t.gguf", more={"<think>": 4, "[TOOL]": 3}))
    for tokenizer in (made, _reopened(made, tmp_path / "saved")):
        ids = tokenizer("<think>Hi[TOOL]two").input_ids
        assert ids == [1, 28000, 15359, 28001, 989]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "<think> Hi two"
        assert "[TOOL]" in tokenizer.all_special_tokens
        assert "<think>" not in tokenizer.all_special_tokens


# --- words and merges ----------------------------------------------------------------------------

PIECES = {  # llama.cpp's names of rules, and what each makes of TEXT
    "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling": (
        "I|'|LL| say|12345|:| x|2|\n\n  |\t|It|'s| \xc9t\xe9Ab| 3|//|\n|\u4f60\u597d|,| \u05e9|"
        "\u05b8|\u05dc\u05d5\u05dd|!| | a|\u0301|c|_|d| one| two\u4f60x\u0531y"
    ),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": (
        "I|'|LL| say|1|2|3|4|5|:| x|2|\n\n  |\t|It|'s| \xc9t\xe9Ab| |3|//|\n|\u4f60\u597d|,| "
        "\u05e9|\u05b8|\u05dc\u05d5\u05dd|!| | a|\u0301|c|_|d| one| two\u4f60x\u0531y"
    ),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 "
    "glm5 chatglm-bpe": (
        "I|'LL| say|123|45|:| x|2|\n\n|  |\tIt|'s| \xc9t\xe9Ab| |3|//\n|\u4f60\u597d|,| \u05e9|"
        "\u05b8\u05dc\u05d5\u05dd|!| | a|\u0301c|_d| one| two\u4f60x\u0531y"
    ),
    "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2 bailingmoe "
    "bailingmoe2 llada-moe": (
        "I|'LL| say|1|2|3|4|5|:| x|2|\n\n|  |\tIt|'s| \xc9t\xe9Ab| |3|//\n|\u4f60\u597d|,| \u05e9"
        "|\u05b8\u05dc\u05d5\u05dd|!| | a|\u0301c|_d| one| two\u4f60x\u0531y"
    ),
    "qwen35": (
        "I|'LL| say|1|2|3|4|5|:| x|2|\n\n|  |\tIt|'s| \xc9t\xe9Ab| |3|//\n|\u4f60\u597d|,| \u05e9"
        "\u05b8\u05dc\u05d5\u05dd|!| | a\u0301c|_d| one| two\u4f60x\u0531y"
    ),
    "laguna": (
        "I|'LL| say|1|2|3|4|5|:| x|2|\n\n|  |\tIt|'s| \xc9t\xe9Ab| |3|//|\n|\u4f60\u597d|,| "
        "\u05e9|\u05b8\u05dc\u05d5\u05dd|!| | a|\u0301c|_d| one| two\u4f60x\u0531y"
    ),
    "exaone-moe": (
        "I|'LL| say|1|2|3|4|5|:| x|2|\n\n|  |\tIt|'s| \xc9t\xe9Ab| |3|//\n|\u4f60\u597d|,| \u05e9"
        "\u05b8\u05dc\u05d5\u05dd|!| | a\u0301c|_d one two\u4f60x\u0531y"
    ),
    "gpt-4o llama4 kanana2 talkie minimax-m2": (
        "I'LL| say|123|45|:| x|2|\n\n|  |\tIt's| \xc9t\xe9|Ab| |3|//\n|\u4f60\u597d|,| \u05e9"
        "\u05b8\u05dc\u05d5\u05dd|!| | a\u0301c|_d| one| two\u4f60x|\u0531y"
    ),
    "tiny_aya cohere2moe": (
        "I'LL| say|12|345|:| x|2|\n\n|  |\tIt's| \xc9t\xe9|Ab| |3|//\n|\u4f60\u597d|,| \u05e9"
        "\u05b8\u05dc\u05d5\u05dd|!| | a\u0301c|_d| one| two\u4f60x|\u0531y"
    ),
    "tekken": (
        "I|'LL| say|1|2|3|4|5|:| x|2|\n\n|  |\tIt|'s| \xc9t\xe9|Ab| |3|//\n|\u4f60\u597d|,| "
        "\u05e9\u05b8\u05dc\u05d5\u05dd|!| | a\u0301c|_d| one| two\u4f60x|\u0531y"
    ),
    "kimi-k2": (
        "I'LL| say|123|45|:| x|2|\n\n|  |\tIt's| \xc9t\xe9|Ab| |3|//\n|\u4f60\u597d|,| \u05e9"
        "\u05b8\u05dc\u05d5\u05dd|!| | a\u0301c|_d| one| two|\u4f60|x|\u0531y"
    ),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": (
        "I|'LL| say|123|45|:| x|2|\n\n|  |\tIt|'s| \xc9t\xe9Ab| |3|//\n|\u4f60\u597d|,| \u05e9"
        "\u05b8\u05dc\u05d5\u05dd|!| | a\u0301c|_d| one| two|\u4f60|x\u0531y"
    ),
    "deepseek-llm": (
        "I|'|LL| say|12345|:| x|2|\n|\n|  |\tIt|'|s| \xc9|t|\xe9|Ab| |3|//|\n|\u4f60\u597d|,| "
        "\u05e9\u05b8\u05dc\u05d5\u05dd|!| | a|\u0301|c|_|d| one| two|\u4f60|x|\u0531|y"
    ),
    "deepseek-coder": (
        "I|'|LL| say|1|2|3|4|5|:| x|2|\n|\n|  |\tIt|'|s| \xc9t\xe9Ab| |3|//|\n|\u4f60\u597d|,| "
        "\u05e9|\u05b8|\u05dc\u05d5\u05dd|!| | a|\u0301|c|_|d| one| two|\u4f60|x\u0531y"
    ),
    "afmoe": (
        "I|'LL| say|12|345|:| x|2|\n\n|  |\tIt|'s| \xc9t\xe9Ab| |3|//\n|\u4f60\u597d|,| \u05e9"
        "\u05b8\u05dc\u05d5\u05dd|!| | a\u0301c|_d| one| two|\u4f60|x\u0531y"
    ),
    "default": (
        "I|'|LL| say|123|45|:| x|2|\n\n  |\t|It|'|s| \xc9t\xe9Ab| |3|//|\n|\u4f60\u597d|,| \u05e9"
        "|\u05b8|\u05dc\u05d5\u05dd|!| | a|\u0301|c|_|d| one| two\u4f60x\u0531y"
    ),
}


@pytest.mark.parametrize("name", sorted(SPLITS.keys() - {"gemma4", "sarvam-moe"}))
def test_a_text_is_split_by_the_rule_that_the_file_names(name: str, tmp_path: Path) -> None:
    made = gguf_tokenizer(_words(tmp_path / "t.gguf", pre=name))
    split = made.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    wanted = next(pieces for names, pieces in PIECES.items() if name in names.split())
    assert "|".join(TEXT[begin:end] for _, (begin, end) in split) == wanted


def test_merges_stay_inside_the_pieces(tmp_path: Path) -> None:
    ids = {}
    for name in ("gpt-2", "smollm"):
        made = gguf_tokenizer(_words(tmp_path / "t.gguf", pre=name, merges=["1 2", "12 3"]))
        opened = _reopened(made, tmp_path / name)
        ids[name] = opened("123").input_ids
        assert ids[name] == made("123").input_ids
        assert opened.decode(opened(TEXT).input_ids) == TEXT
    assert ids == {"gpt-2": [257], "smollm": [16, 17, 18]}


def test_a_word_of_the_vocabulary_may_stand_without_merges(tmp_path: Path) -> None:
    for name, ids in (("glm4", [256]), ("chatglm-bpe", [71, 78])):
        made = gguf_tokenizer(_words(tmp_path / "t.gguf", pre=name, kinds={"ho": 1}))
        assert _reopened(made, tmp_path / name)("ho").input_ids == ids


def test_merges_of_characters_fall_back_on_bytes(tmp_path: Path) -> None:
    """Gemma 4's kind: spaces as SentencePiece writes them, and merges from the file."""
    tokens = ["\u2581", "a", "b", "\u2581a", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [1] * 4 + [6] * 256
    file = _write(tmp_path / "t.gguf", "gemma4", tokens, kinds, merges=["\u2581 a"])
    made = gguf_tokenizer(file)
    for tokenizer in (made, _reopened(made, tmp_path / "saved")):
        assert tokenizer("b a\n\u00e9").input_ids == [2, 3, 14, 199, 173]
        assert tokenizer.decode([2, 3, 14, 199, 173]) == "b a\n\u00e9"


def test_the_rule_of_an_old_file_is_the_default_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = gguf_tokenizer(_words(tmp_path / "old.gguf")).backend_tokenizer
    assert "tokenizer.ggml.pre" in caplog.text
    caplog.clear()
    new = gguf_tokenizer(_words(tmp_path / "new.gguf", pre="default")).backend_tokenizer
    assert not caplog.text
    assert old.to_str() == new.to_str()


@pytest.mark.parametrize("name", ["none", "qwen9"])
def test_a_rule_that_is_not_known_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"by the rule '{name}'.*safetensors"):
        gguf_tokenizer(_words(tmp_path / "t.gguf", pre=name))


@pytest.mark.parametrize("kind", ["rwkv", "bert", "t5"])
def test_another_kind_of_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"of the kind '{kind}'.*safetensors"):
        gguf_tokenizer(_write(tmp_path / "t.gguf", kind, ["a", "b"]))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"kinds": {"a": 1}}, "twice"),
        ({"merges": ["hh"]}, "substring not found"),
        ({"merges": ["xy z"]}, "xy"),
    ],
)
def test_a_damaged_vocabulary_is_refused(change: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be used.*{what}"):
        gguf_tokenizer(_words(tmp_path / "t.gguf", pre="qwen2", **change))


def test_fewer_kinds_than_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="2 tokens and 1 kinds"):
        gguf_tokenizer(_write(tmp_path / "t.gguf", "llama", ["a", "b"], [1]))


# --- end tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "fields", "ends"),
    [
        ({"<x>": 3, "<y>": 3}, {"eos_token_id": 256}, ["<x>"]),
        ({"<x>": 3, "<y>": 3}, {"eos_token_id": 256, "eot_token_id": 257}, ["<x>", "<y>"]),
        ({"<x>": 3, "<y>": 3}, {"eos_token_id": 257, "eom_token_id": 256}, ["<y>", "<x>"]),
        ({"<x>": 3, "<|im_end|>": 3}, {"eos_token_id": 256}, ["<x>", "<|im_end|>"]),
        ({"<x>": 3, "<|eot_id|>": 1}, {"eos_token_id": 256}, ["<x>", "<|eot_id|>"]),
        ({"<x>": 3, "</s>": 1}, {"eos_token_id": 256}, ["<x>"]),  # struck-out text in HTML
        ({"<x>": 3, "</s>": 3}, {"eos_token_id": 256}, ["<x>", "</s>"]),
        ({"<x>": 3}, {"eos_token_id": 999}, []),
        ({"<|end|>": 3, "<|user|>": 3}, {}, ["<|end|>"]),
        ({"<|end|>": 3, "<|return|>": 3, "<|call|>": 3}, {}, ["<|return|>", "<|call|>"]),
    ],
)
def test_an_answer_ends_where_llama_cpp_ends_it(
    kinds: dict[str, int], fields: dict[str, int], ends: list[str], tmp_path: Path
) -> None:
    file = _words(tmp_path / "t.gguf", pre="qwen2", kinds=kinds, **fields)
    tokenizer = gguf_tokenizer(file)
    assert tokenizer.convert_ids_to_tokens(end_tokens(GgufFile(file))) == ends
    assert all(tokenizer(end).input_ids == [256 + list(kinds).index(end)] for end in ends)
    assert (
        tokenizer.decode(tokenizer("a" + "".join(ends)).input_ids, skip_special_tokens=True) == "a"
    )


def test_sentencepiece_has_usual_ids_where_the_file_names_none(tmp_path: Path) -> None:
    file = _mixtral(tmp_path / "t.gguf")
    tokenizer = gguf_tokenizer(file)
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert named == ("<s>", "</s>", "<unk>")
    assert end_tokens(GgufFile(file)) == [2]
