"""Everything that reads files and texts made by others, each as a function of `Choices`.

A target may end well or with an error of `ALLOWED` in one line. Anything else is a bug.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast

from offload.cache.trace.file import TraceWriter, read
from offload.cache.trace.synthetic import SHAPES, Routing, synthesize
from offload.cache.trace.trace import CacheError
from offload.chat.chat import Chat
from offload.chat.commands import obey
from offload.chat.display import Plain
from offload.chat.terminal import _History
from offload.engine.history import read_hot
from offload.generation.answers import AnswersFile, read_prompt_lines
from offload.generation.prompt import encode_prompt
from offload.main import build_parser
from offload.model import sources
from offload.model.formats.gguf import GgufFile
from offload.model.formats.gguf_config import gguf_config
from offload.model.formats.gguf_tokenizer import end_tokens, gguf_tokenizer
from offload.model.formats.safetensors import SafetensorsSource
from offload.model.layout import INDEX, weight_files
from offload.model.sources import check_generation_config
from offload.model.tokenizer import load_tokenizer
from offload.pack.recipe import Recipe
from offload.quality.baseline import FORMAT, TOLERANCES, VERSION, read_baseline
from offload.quant.errors import OffloadError
from offload.quant.manifest import MANIFEST, manifest_check
from offload.quant.pack import Pack
from offload.quant.scheme import Scheme
from offload.sampling import PARAMETERS, Sampling
from offload.units import parse_bytes, parse_slots
from tests.fuzz.choices import NASTY, Choices, harmed_bytes, harmed_json, harmed_text, harmed_value

Target = Callable[[Choices], object]
ALLOWED = (OffloadError, CacheError)

TEMPLATE_PARTS = (
    "{{ ", " }}", "{% ", " %}", "{%- ", "{# ", " #}", "messages", "m.content", "m['role']", "for m in messages",
    "endfor", "if add_generation_prompt", "endif", "else", "set x = ", "[]", "x", "'a'", "''.__class__", "|",
    "tojson", "length", "upper", "items", " + ", " * ", "9999999", "range(9)", "raise_exception('no')",
    "cycler.__init__.__globals__", "self", "import 'os' as os", "include '/etc/passwd'", "namespace()", "(", ")",
    "strftime_now('%Y')", "\n", "שלום", "\x00", "generation",
)  # fmt: skip
VALUES = (
    "demo", "25%", "lru", "global", "device", "48GiB", "0,1", "-1", "0", "1", "4", "99999999999999999999", "1e400", "nan",
    "", "--", "-", "\udc80", "a,b", "1,2", "../..", "q4", "=", "RTX 4090", "x16", "previous", "jsonl", "--no-such-flag",
)  # fmt: skip
BITS = ("q4", "q8", "fit", "experts", "attention", "head", "layers", ".", "0", "1", "-", "3", "=", "2", "8", "16", "g64",
        "s8", ",", "g", " ", "99999", "mixtral-offloading", "٤")  # fmt: skip
SIZE_PARTS = ("1", "20", "9" * 40, ".", "GiB", "MB", "%", "-", " ", "e9", "٤", "k", "", "\x00", "T")


class Targets:
    """Good input of every kind, made once in a folder, and the functions that damage and read it."""

    def __init__(
        self, folder: Path, pack: Path, checkpoint: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.folder = folder
        self._tokenizer = tokenizer
        self._pack = folder / "pack"
        shutil.copytree(pack, self._pack)
        self._info = Pack(self._pack).info
        self._manifest = json.loads((pack / MANIFEST).read_bytes())
        self._experts = (pack / "experts-00001.safetensors").read_bytes()
        self._checkpoint = folder / "checkpoint"
        shutil.copytree(checkpoint, self._checkpoint)
        self._weights = (checkpoint / "model.safetensors").read_bytes()
        self._config = json.loads((checkpoint / "config.json").read_bytes())
        self._sharded = folder / "sharded"
        self._sharded.mkdir()
        self._given = folder / "given"
        trace = synthesize(SHAPES["mixtral"], Routing(), 4)
        writer = TraceWriter(folder / "trace", trace.header)
        for event in trace.events:
            writer.append(event)
        writer.close()
        self._trace = (folder / "trace").read_bytes()
        self._gguf = _tiny_gguf(folder / "tiny.gguf")
        self._gguf_tokenizers = _gguf_tokenizers(folder / "tokenizer.gguf")
        self._parser = build_parser()
        self._arguments = _words(self._parser)
        tokenizer.save_pretrained(folder / "tokenizer")
        self._tokenizer_files = {
            file: json.loads(file.read_bytes())
            for file in sorted((folder / "tokenizer").glob("*.json"))
        }
        os.environ["OFFLOAD_HOME"] = str(folder / "home")
        (folder / "home" / "conversations").mkdir(parents=True)

    def all(self) -> dict[str, Target]:
        """The targets by name."""
        return {
            name.removeprefix("fuzz_"): getattr(self, name)
            for name in dir(self)
            if name.startswith("fuzz_")
        }

    def _write(self, data: bytes) -> Path:
        self._given.write_bytes(data)
        return self._given

    def fuzz_manifest(self, choices: Choices) -> None:
        manifest = harmed_value(self._manifest, choices)
        if isinstance(manifest, dict) and choices.number(
            4
        ):  # else only its checksum would be tested
            manifest.pop("check", None)
            manifest["check"] = manifest_check(manifest)
        (self._pack / MANIFEST).write_bytes(json.dumps(manifest).encode())
        try:
            Pack(self._pack).close()
        finally:
            (self._pack / MANIFEST).write_bytes(json.dumps(self._manifest).encode())

    def fuzz_expert_file(self, choices: Choices) -> None:
        file = self._pack / "experts-00001.safetensors"
        harmed = harmed_bytes(self._experts, choices, within=400)
        file.write_bytes(harmed[: len(self._experts)].ljust(len(self._experts), b"\0"))
        try:
            pack = Pack(self._pack)
            for expert in range(pack.info.layers[1].num_experts):
                pack.check_record(1, expert)
            pack.close()
        finally:
            file.write_bytes(self._experts)

    def fuzz_safetensors(self, choices: Choices) -> None:
        within = 8 + int.from_bytes(self._weights[:8], "little")
        file = self._checkpoint / "model.safetensors"
        file.write_bytes(harmed_bytes(self._weights, choices, within=within))
        source = SafetensorsSource(self._checkpoint)
        for name in source.names()[:8]:
            if source.stored_dtype(name) is not None:
                assert source.read(name).shape == source.shape(name)

    def fuzz_index(self, choices: Choices) -> None:
        good = {
            "metadata": {"total_size": 1},
            "weight_map": {"a": "model.safetensors", "b": "x.safetensors"},
        }
        (self._sharded / INDEX).write_bytes(harmed_json(good, choices))
        for name in weight_files(self._sharded):
            assert (self._sharded / name).resolve().parent == self._sharded.resolve()

    def fuzz_gguf(self, choices: Choices) -> None:
        path = self._write(harmed_bytes(self._gguf, choices, within=2000))
        file = GgufFile(path)
        for name in file.tensors:
            assert file.read(name).shape == file.shape(name)
        gguf_config(path)

    def fuzz_gguf_tokenizer(self, choices: Choices) -> None:
        good = choices.pick(self._gguf_tokenizers)
        path = self._write(harmed_bytes(good, choices, within=len(good)))
        tokenizer = gguf_tokenizer(path)
        end_tokens(GgufFile(path))
        encode_prompt(tokenizer, "hello <s>\u05e9\u05dc\u05d5\u05dd")

    def fuzz_config(self, choices: Choices) -> None:
        (self._checkpoint / "config.json").write_bytes(harmed_json(self._config, choices))
        sources.read_config("given", self._checkpoint, trust_remote_code=False)

    def fuzz_generation_config(self, choices: Choices) -> None:
        good = GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=[1, 2]).to_dict()
        (self._checkpoint / "generation_config.json").write_bytes(harmed_json(good, choices))
        check_generation_config(self._checkpoint)

    def fuzz_chat_template(self, choices: Choices) -> None:
        before = self._tokenizer.chat_template
        self._tokenizer.chat_template = harmed_text(TEMPLATE_PARTS, choices) + "!"
        try:
            encode_prompt(self._tokenizer, [{"role": "user", "content": "hi"}])
        finally:
            self._tokenizer.chat_template = before

    def fuzz_tokenizer(self, choices: Choices) -> None:
        file, good = choices.pick(sorted(self._tokenizer_files.items()))
        file.write_bytes(harmed_json(good, choices))
        try:
            tokenizer = load_tokenizer(file.parent, trust_remote_code=False)
            assert tokenizer is not None
            encode_prompt(tokenizer, [{"role": "user", "content": "שלום hi"}])
        finally:
            file.write_text(json.dumps(good))

    def fuzz_conversation(self, choices: Choices) -> None:
        good = {
            "system": "",
            "parameters": {name: getattr(Sampling(), name) for name in PARAMETERS},
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}],
            "settings": {"num_predict": 5, "think": None, "thoughts": True, "stop": ["END"]},
        }
        file = self.folder / "home" / "conversations" / "given.json"
        file.write_bytes(harmed_json(good, choices))
        chat = Chat(None, self._tokenizer, Sampling(), Plain(lambda _: None))  # type: ignore[arg-type]
        obey(chat, "/load given")
        assert all(isinstance(text, str) for text in chat.stop_strings)
        assert chat.max_new_tokens is None or chat.max_new_tokens > 0
        for message in chat.messages:
            assert isinstance(message["content"], str)

    def fuzz_history(self, choices: Choices) -> None:
        good = b"\n# 2026-01-01 00:00:00.000000\n+hello\n+two\n\n# x\n+more\n"
        list(_History(str(self._write(harmed_bytes(good, choices)))).load_history_strings())

    def fuzz_trace(self, choices: Choices) -> None:
        read(self._write(harmed_bytes(self._trace, choices)))

    def fuzz_baseline(self, choices: Choices) -> None:
        good = {
            "format": FORMAT,
            "version": VERSION,
            "figures": dict.fromkeys([*TOLERANCES, "reference_perplexity"], 1.0) | {"tokens": 9},
            "model": {"name": "a", "settings": {}},
            "reference": {"name": "b", "settings": {}},
            "prompts": {"sha256": "0"},
            "window": 512,
            "stride": 256,
            "tolerances": {name: {"relative": 0.1, "absolute": 0.1} for name in TOLERANCES},
        }
        read_baseline(self._write(harmed_json(good, choices)))

    def fuzz_hot_experts(self, choices: Choices) -> None:
        good = {"version": 1, "hot": [[0, 1, 2.5], [1, 0, 1.0]]}
        (self._pack / "hot.json").write_bytes(harmed_json(good, choices))
        for layer, expert, uses in read_hot(self._pack, self._info):
            assert 0 <= layer < len(self._info.layers)
            assert 0 <= expert < self._info.layers[layer].num_experts
            assert uses > 0

    def fuzz_prompts(self, choices: Choices) -> None:
        good: Any = {"prompt": "hi", "id": 3, "messages": [{"role": "user", "content": "a"}]}
        first = harmed_json(good, choices) if choices.number(2) else json.dumps(good).encode()
        prompts = read_prompt_lines(self._write(first + b"\n" + json.dumps("two").encode()))
        answer = prompts[0] | {"answer": "b"}
        line = harmed_json(answer, choices) if choices.number(2) else json.dumps(answer).encode()
        answers = AnswersFile(self._write(line + b"\n"[: choices.number(2)]))
        with contextlib.closing(answers):
            assert answers.done(prompts) <= len(prompts)

    def fuzz_arguments(self, choices: Choices) -> None:
        commands, flags = self._arguments
        words = [choices.pick((*commands, *VALUES))]
        for _ in range(choices.number(8)):
            words.append(choices.pick(VALUES if choices.number(2) else flags))
        silent = io.StringIO()
        with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
            try:
                self._parser.parse_args(words)
                code: object = 0
            except SystemExit as end:
                code = end.code
        assert code in (0, 2), f"exit code {code}"

    def fuzz_bits(self, choices: Choices) -> None:
        text = harmed_text(BITS, choices)
        with contextlib.suppress(OffloadError):
            assert Recipe.parse(str(Recipe.parse(text))) == Recipe.parse(text)
        with contextlib.suppress(ValueError):
            assert Scheme.parse(str(Scheme.parse(text))) == Scheme.parse(text)

    def fuzz_sizes(self, choices: Choices) -> None:
        text = harmed_text(SIZE_PARTS, choices, 6)
        with contextlib.suppress(OffloadError):
            assert (parse_bytes(text) or 0) >= 0
        assert (parse_slots(text, 100) or 0) >= 0

    def fuzz_saved_messages(self, choices: Choices) -> None:
        """Messages from a file written by others may be of any kind when a template gets them."""
        messages = harmed_value(
            [{"role": "user", "content": "hi"}, {"role": "a", "content": "b"}], choices
        )
        if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            encode_prompt(self._tokenizer, messages)


def _words(parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """The names of all commands and all their flags."""
    names, flags = [], list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names += list(action.choices)
            inner = [_words(command) for command in action.choices.values()]
            names += [name for below, _ in inner for name in below]
            flags += [flag for _, below in inner for flag in below]
    return sorted(set(names)), sorted(set(flags))


def _tiny_gguf(file: Path) -> bytes:
    from gguf import GGMLQuantizationType, GGUFWriter

    from tests.gguf_files import write_gguf
    from tests.tiny import save_tiny

    def fields(writer: GGUFWriter) -> None:
        writer.add_token_list(["a", "b"])
        writer.add_array("llama.numbers", [1, 2, 3])

    model = save_tiny("mixtral", file.with_suffix(""), num_hidden_layers=1)
    write_gguf(file, model, lambda name: GGMLQuantizationType.Q8_0, fields=fields)
    return file.read_bytes()


def _gguf_tokenizers(file: Path) -> list[bytes]:
    from gguf import GGUFWriter

    from tests.gguf_files import add_bpe, add_sentencepiece

    made = []
    for add in (add_bpe, add_sentencepiece):
        writer = GGUFWriter(file, "llama")
        add(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        made.append(file.read_bytes())
    return made


__all__ = ["ALLOWED", "NASTY", "Target", "Targets"]
