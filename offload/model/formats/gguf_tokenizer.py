"""Builds the tokenizer that a GGUF file describes, so that it gives llama.cpp's ids.

A file holds the vocabulary with scores or merges, and the name of the rule that splits a text into
words. transformers' own converter takes GPT-2's rule for a name that it does not know, knows few
architectures, and loses the space that SentencePiece puts in front of a text.
"""

import logging
import math
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from offload.errors import CheckpointError
from offload.lines import is_memory, reason
from offload.model.formats.gguf import GgufFile
from offload.model.formats.gguf_splits import BEGINNING, CHARACTERS, SPLITS, WHOLE

logger = logging.getLogger("offload")

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6  # in tokenizer.ggml.token_type; 1 is a plain token
_ENDS = frozenset(  # tokens that end a turn or a text wherever a vocabulary has them
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>"),
        *("<|calls|>", "<end_of_turn>", "<|eom_id|>", "<|endoftext|>", "<EOT>", "_<EOT>"),
        *("[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>"),
        *("<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[", "<|fim_pad|>"),
        *("<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>"),
        "<|file_sep|>",
    )
)
_NAMED = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # transformers' names
_SPACE = "\u2581"  # SentencePiece's sign for a space


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the GGUF file `path`. Raises `CheckpointError`."""
    file = GgufFile(path)
    pieces = file.fields.get("tokenizer.ggml.model") == "llama"
    rule = None if pieces else _rule(file)
    try:
        tokens, kinds = _vocabulary(file)
        ids = token_ids(file)
        named = {f"{_NAMED[name]}_token": tokens[ids[name]] for name in _NAMED if name in ids}
        backend = _pieces(file, tokens, kinds) if rule is None else _words(file, tokens, rule)
        special = [t for t, k in zip(tokens, kinds, strict=True) if k in (_UNKNOWN, _CONTROL)]
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        user = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER]
        backend.add_tokens([AddedToken(token, normalized=False) for token in user])
        begins = file.fields.get("tokenizer.ggml.add_bos_token", rule is None or rule in BEGINNING)
        template = file.fields.get("tokenizer.chat_template")
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **named,
            extra_special_tokens=[token for token in special if token not in named.values()],
            add_bos_token=begins is True and "bos" in ids,
            add_eos_token=file.fields.get("tokenizer.ggml.add_eos_token") is True and "eos" in ids,
            chat_template=template if isinstance(template, str) else None,
            clean_up_tokenization_spaces=False,
            padding_side="left",
        )
    except Exception as error:  # whatever the tokenizers library raises on a damaged vocabulary
        if is_memory(error):
            raise
        raise CheckpointError(
            f"the tokenizer in {path} cannot be used ({reason(error)}): fetch the file again, or "
            "use the model's safetensors checkpoint"
        ) from None


def _rule(file: GgufFile) -> str:
    """The name of the rule that splits a text into words. Raises `CheckpointError`."""
    kind, rule = (file.fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind not in ("gpt2", "gemma4"):
        raise CheckpointError(
            f"{file.path} has a tokenizer of the kind {kind!r}; llama, gpt2 and gemma4 are read: "
            "use the model's safetensors checkpoint"
        )
    if kind == "gemma4":
        return "gemma4"
    if not rule:
        logger.warning(
            "%s does not say how text is split into words (tokenizer.ggml.pre); llama.cpp's old "
            "rule is used, and answers may suffer: prefer a file that was converted anew",
            file.path,
        )
        return "default"
    if not isinstance(rule, str) or rule not in SPLITS:
        raise CheckpointError(
            f"{file.path} splits text into words by the rule {rule!r} (tokenizer.ggml.pre), which "
            "is not known: use the model's safetensors checkpoint"
        )
    return rule


def token_ids(file: GgufFile) -> dict[str, int]:
    """The ids of a file's special tokens by llama.cpp's names for them: bos, eos, eot and so on."""
    usual = {"bos": 1, "eos": 2, "unknown": 0}  # SentencePiece's
    found = usual if file.fields.get("tokenizer.ggml.model") == "llama" else {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        token = file.fields.get(f"tokenizer.ggml.{name}_token_id")
        if type(token) is int:
            found[name] = token
    size = file.fields.get("tokenizer.ggml.tokens")
    most = size if type(size) is int else math.inf
    return {name: token for name, token in found.items() if 0 <= token < most}


def end_tokens(file: GgufFile) -> list[int]:
    """The ids that end an answer: of the text's end, of a turn's end, and of words known as such.

    Raises `ValueError` when the vocabulary is damaged.
    """
    ids = token_ids(file)
    tokens, kinds = _vocabulary(file)
    words = _ENDS & set(tokens)
    if {"<|return|>", "<|call|>"} <= words or {"<|calls|>", "<|flush|>"} <= words:
        words -= {"<|end|>"}  # in the harmony format it ends the thoughts, and the answer follows
    found = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    pairs = enumerate(zip(tokens, kinds, strict=True))
    found += [i for i, (t, k) in pairs if t in words or (t == "</s>" and k == _CONTROL)]
    return list(dict.fromkeys(found))


def _vocabulary(file: GgufFile) -> tuple[list[str], list[int]]:
    """The tokens of a file and their kinds. Raises `ValueError`."""
    listed: list[str] = file.read_list("tokenizer.ggml.tokens")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(listed)]  # llama.cpp's name
    if len(set(tokens)) < len(tokens):
        raise ValueError("a token is there twice")
    kinds = file.read_list("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise ValueError(f"there are {len(tokens)} tokens and {len(kinds)} kinds")
    pairs = zip(tokens, kinds, strict=True)
    return tokens, [_CONTROL if token in _ENDS else kind for token, kind in pairs]


def _pieces(file: GgufFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """A SentencePiece tokenizer: of neighbours in the text, those with the best score are joined.

    A pair's rank stands for the score of what it makes. Every text, also one after a special token,
    begins with a space.
    """
    scores = file.read_list("tokenizer.ggml.scores") or [0.0] * len(tokens)
    joined = {t for t, k in zip(tokens, kinds, strict=True) if k not in (_UNKNOWN, _CONTROL, _BYTE)}
    merges = [
        (token[:cut], token[cut:])
        for _, token in sorted(zip(scores, tokens, strict=True), key=lambda pair: -pair[0])
        if token in joined
        for cut in range(1, len(token))
        if token[:cut] in joined and token[cut:] in joined
    ]
    unknown = token_ids(file).get("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced = file.fields.get("tokenizer.ggml.add_space_prefix", True)
    _write_spaces(tokenizer, spaced=spaced)
    return tokenizer


def _write_spaces(tokenizer: Tokenizer, *, spaced: bool) -> None:
    """Write spaces as SentencePiece does, and `spaced`, one more in front of the text."""
    before = [normalizers.Prepend(_SPACE)] if spaced else []
    after = [decoders.Strip(" ", 1, 0)] if spaced else []
    bytes_first = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence([*bytes_first, *after])


def _words(file: GgufFile, tokens: list[str], rule: str) -> Tokenizer:
    """A tokenizer of words that `rule` splits off, with the merges of the file."""
    listed: list[str] = file.read_list("tokenizer.ggml.merges")
    cuts = [merge.index(" ", 1) for merge in listed]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(m[:cut], m[cut + 1 :]) for m, cut in zip(listed, cuts, strict=True)],
            byte_fallback=rule in CHARACTERS,
            ignore_merges=rule in WHOLE,
        )
    )
    splits: list[Any] = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in SPLITS[rule]]
    if rule in CHARACTERS:
        _write_spaces(tokenizer, spaced=False)
    else:
        splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return tokenizer
