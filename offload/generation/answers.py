"""Reads prompts from a file of JSON lines, and adds answers to another, also after a killed run.

A line of the answers is the prompt's own object with the answer added. So a reader needs only one
file, and an attempt to continue it with different prompts is noticed. A different seed, temperature
or model is not noticed, because the file does not hold them.
"""

import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from offload.errors import SourceError
from offload.files import MOST_CHARACTERS, user_path
from offload.generation.conversation import SHAPES, conversation_of
from offload.quant.errors import OffloadError

ADDED = ("answer", "thinking", "finish_reason", "prompt_tokens", "generated_tokens")
# What OpenAI's requests have beside the messages, and the flag that does it for all lines.
FLAGS = {
    "temperature": "--temp",
    "top_p": "--top-p",
    "max_tokens": "-n",
    "max_completion_tokens": "-n",
    "stop": "-r",
    "seed": "-s",
}


def read_prompt_lines(file: Path) -> list[dict[str, Any]]:
    """Read the JSON lines of `file`: objects with a "prompt" or with "messages", or plain strings.

    A plain string becomes an object with that "prompt". Raises `SourceError`, which names the line.
    """
    prompts, number = [], 0
    try:
        with user_path(file).open(encoding="utf-8-sig") as handle:
            read_line = partial(handle.readline, MOST_CHARACTERS + 1)
            for number, line in enumerate(iter(read_line, ""), start=1):
                where = f"{file}, line {number}"
                if len(line) > MOST_CHARACTERS:
                    raise SourceError(
                        f"{where} has more than {MOST_CHARACTERS} characters: give shorter "
                        "prompts, one per line"
                    )
                if line.strip():
                    prompts.append(_prompt_in(line, where))
    except OSError as error:
        raise SourceError(f"cannot read the prompts from {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text after line {number}: {error}") from None
    if not prompts:
        raise SourceError(f"{file} has no prompts: write one JSON object per line")
    return prompts


def _prompt_in(line: str, where: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        given = None
    if isinstance(given, str):
        given = {"prompt": given}
    try:
        if not isinstance(given, dict):
            raise ValueError(SHAPES)
        conversation_of(given, "")
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from None
    for name in ADDED:
        if name in given:
            raise SourceError(
                f"{where} has a value {name!r} already, which the answer's would replace: rename "
                "or remove it"
            )
    return given


def not_followed(prompts: list[dict[str, Any]]) -> str:
    """A line about settings that stand in the prompts and have no effect; "" if there are none."""
    names = [name for name in FLAGS if any(name in given for given in prompts)]
    flags = dict.fromkeys(FLAGS[name] for name in names)
    return f"{', '.join(names)} in the lines of -f: use {', '.join(flags)} instead" if names else ""


class AnswersOut:
    """Answers as JSON lines on stdout."""

    def done(self, _: list[dict[str, Any]]) -> int:
        """No prompt is answered already."""
        return 0

    def append(self, given: dict[str, Any], added: dict[str, Any]) -> None:
        """Print the object `given` with `added`."""
        coding = sys.stdout.encoding or "utf-8"
        print(_encoded(_asked(given) | added, coding).decode(coding), flush=True)

    def close(self) -> None:
        """Nothing is held."""


class AnswersFile:
    """A file to which one process at a time appends answers, line by line."""

    def __init__(self, file: Path) -> None:
        """Open or create `file`, without changing what it holds. Raises `OffloadError`."""
        self._path = user_path(file)
        if self._path.exists() and not self._path.is_file():
            raise OffloadError(f"{file} is not a file: name one for the answers")
        lock_file = Path(f"{self._path}.lock")
        self._is_new = not self._path.exists()
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            lock_file.touch()  # filelock would report a read-only folder as a lock that is held
        except OSError as error:
            raise OffloadError(f"cannot write {file}: {error.strerror}") from None
        self._lock = FileLock(lock_file)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            os.close(self._file)
            raise OffloadError(f"{file} is being written by another process") from None
        self._end = 0  # offset behind the last whole line

    def done(self, prompts: list[dict[str, Any]]) -> int:
        """Return how many of `prompts` are answered already, and cut off half a line at the end.

        Raises `OffloadError` if the file holds anything but answers to these prompts. Then nothing
        is cut off, because the file may be somebody else's.
        """
        data = self._path.read_bytes()
        *lines, half = data.split(b"\n")
        answered = [_answers(line, given) for line, given in zip(lines, prompts, strict=False)]
        wrong = answered.index(False) if False in answered else len(answered)
        if wrong < len(lines) or (half and not _begins(half, prompts[wrong : wrong + 1])):
            raise OffloadError(
                f"{self._path} exists and does not match the prompts (line {wrong + 1}): choose "
                "another -o, or move it away"
            )
        self._end = len(data) - len(half)
        os.ftruncate(self._file, self._end)
        return len(lines)

    def append(self, given: dict[str, Any], added: dict[str, Any]) -> None:
        """Write the object `given` with `added` as a line, and return when it is on the disk.

        A write that fails leaves only whole lines. Raises `OffloadError`, for example if the disk
        is full.
        """
        line = _encoded(_asked(given) | added) + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            os.fsync(self._file)
        except BaseException as error:  # Ctrl-C may arrive at any point
            os.ftruncate(self._file, self._end)
            if not isinstance(error, OSError):
                raise
            raise OffloadError(
                f"cannot write {self._path}: {error.strerror}; the answers so far are whole, and "
                "the same command continues from there"
            ) from None
        self._end += len(line)

    def close(self) -> None:
        """Let other processes write the file; one that was made for nothing is removed."""
        os.close(self._file)
        if self._is_new and not self._path.stat().st_size:
            self._path.resolve().unlink()
        # The lock file is removed while it is still locked. A process that opened it meanwhile
        # notices that it holds a lock on a removed file.
        lock_file = Path(self._lock.lock_file)
        with contextlib.suppress(OSError):
            if not lock_file.stat().st_size:  # else it is somebody's own, like uv.lock
                lock_file.unlink()
        self._lock.release()


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ADDED}


def _encoded(line: dict[str, Any], coding: str = "utf-8") -> bytes:
    """`line` as readable JSON, or as escaped JSON if `coding` lacks one of its characters, like
    half a surrogate pair."""
    try:
        return json.dumps(line, ensure_ascii=False).encode(coding)
    except UnicodeEncodeError:
        return json.dumps(line).encode()


def _answers(line: bytes, given: dict[str, Any]) -> bool:
    """Whether `line` is an answer to `given`."""
    try:
        answer = json.loads(line)
        return "answer" in answer and _encoded(_asked(answer)) == _encoded(_asked(given))
    except (ValueError, RecursionError, AttributeError, TypeError):
        return False


def _begins(half: bytes, prompts: list[dict[str, Any]]) -> bool:
    """Whether `half` a line is the beginning of an answer to a prompt of `prompts`."""
    heads = [_encoded(_asked(given) | {"answer": ""}).removesuffix(b'"}') for given in prompts]
    return any(half.startswith(head) or head.startswith(half) for head in heads)
