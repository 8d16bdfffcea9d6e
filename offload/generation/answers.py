"""Prompts from a file of lines, answers to another that is whole after a kill at any moment.

Knows: JSON lines, what of a file is complete. Does not know: models.

A line of the answers is the prompt's own object with the answer added, so a reader needs one file,
and going on with other prompts than before is noticed. Other options than before (a seed, a
temperature, a model) are not: the file does not hold them.
"""

from __future__ import annotations

import contextlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from offload.errors import SourceError
from offload.files import MOST_CHARACTERS, user_path
from offload.generation.stream import Message
from offload.quant.errors import OffloadError

ADDED = ("answer", "finish_reason", "prompt_tokens", "generated_tokens")


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """The objects in `file`, each with a "prompt" or "messages"; a line may be a plain string.

    Raises `SourceError` that names the line.
    """
    prompts, number = [], 0
    try:
        with user_path(file).open(encoding="utf-8-sig") as handle:
            read_line = partial(handle.readline, MOST_CHARACTERS + 1)
            for number, line in enumerate(iter(read_line, ""), start=1):
                if len(line) > MOST_CHARACTERS:
                    raise SourceError(
                        f"{file}, line {number} has more than {MOST_CHARACTERS} characters: give "
                        "shorter prompts, one a line"
                    )
                if line.strip():
                    where = f"{file}, line {number}"
                    prompts.append(_without_answer(_parsed(line, where), where))
    except OSError as error:
        raise SourceError(f"cannot read the prompts from {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text after line {number}: {error}") from None
    if not prompts:
        raise SourceError(f"{file} has no prompts: write one JSON object a line")
    return prompts


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
        return _checked({"prompt": given} if isinstance(given, str) else given)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise SourceError(
            f'{where}: write a text, {{"prompt": "..."}} or {{"messages": '
            f'[{{"role": "user", "content": "..."}}]}} in JSON, on one line'
        ) from None


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    if "messages" in given:
        if not given["messages"]:
            raise ValueError("no messages")
        for message in given["messages"]:
            if not (isinstance(message["role"], str) and isinstance(message["content"], str)):
                raise TypeError("not a text")
    elif not isinstance(given["prompt"], str) or not given["prompt"]:
        raise TypeError("not a text")
    return given


def _without_answer(given: dict[str, Any], where: str) -> dict[str, Any]:
    """`given`, in which nothing has a name that an answer is given by. Raises `SourceError`."""
    for name in ADDED:
        if name in given:
            raise SourceError(
                f"{where} has a value {name!r} already, which the answer's would replace: give it "
                "another name, or take it out"
            )
    return given


def messages_of(given: dict[str, Any], system: str) -> list[Message]:
    """The conversation that a line asks to be continued; `system` where it has no own."""
    said: list[Message] = given.get("messages") or [{"role": "user", "content": given["prompt"]}]
    if system and said[0]["role"] != "system":
        return [{"role": "system", "content": system}, *said]
    return said


class AnswersFile:
    """Answers appended one line at a time, by one process."""

    def __init__(self, file: Path) -> None:
        """Open `file`, or make it; nothing in it is changed. Raises `OffloadError`."""
        self._path = user_path(file)
        if self._path.exists() and not self._path.is_file():
            raise OffloadError(f"{file} is no file: name one that the answers can be kept in")
        lock_file = Path(f"{self._path}.lock")
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            lock_file.touch()  # filelock takes a folder that is read-only for another's lock
        except OSError as error:
            raise OffloadError(f"cannot write {file}: {error.strerror}") from None
        self._lock = FileLock(lock_file)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            os.close(self._file)
            raise OffloadError(f"{file} is being written by another process") from None
        self._end = 0  # of the last whole line

    def done(self, prompts: list[dict[str, Any]]) -> int:
        """How many prompts are answered already; half a line at the end is cut off.

        Raises `OffloadError` where the file holds anything but answers to these prompts: then
        nothing is cut, since it is not ours.
        """
        data = self._path.read_bytes()
        *lines, half = data.split(b"\n")
        answered = [_answers(line, given) for line, given in zip(lines, prompts, strict=False)]
        wrong = answered.index(False) if False in answered else len(answered)
        if wrong < len(lines) or (half and not _begins(half, prompts[wrong : wrong + 1])):
            raise OffloadError(
                f"{self._path}, line {wrong + 1} is no answer to that line's prompt: name another "
                "file, or move this one away"
            )
        self._end = len(data) - len(half)
        os.ftruncate(self._file, self._end)
        return len(lines)

    def append(self, given: dict[str, Any], added: dict[str, Any]) -> None:
        """One more answer, on the disk when this returns; a full disk leaves whole lines."""
        line = _encoded(_asked(given) | added)
        try:
            _write(self._file, line + b"\n", self._end)
            os.fsync(self._file)
        except BaseException as error:  # Ctrl-C comes anywhere
            os.ftruncate(self._file, self._end)
            if not isinstance(error, OSError):
                raise
            raise OffloadError(
                f"cannot write {self._path}: {error.strerror}; the answers so far are whole, the "
                "same command goes on from there"
            ) from None
        self._end += len(line) + 1

    def close(self) -> None:
        """Let others write. The answers are on the disk since `append` returned."""
        os.close(self._file)
        with contextlib.suppress(OSError):  # while it is ours: who opened it meanwhile notices
            Path(self._lock.lock_file).unlink()
        self._lock.release()


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ADDED}


def _encoded(line: dict[str, Any]) -> bytes:
    """`line` as JSON, readable; escaped where it holds what is no text (half a surrogate pair)."""
    try:
        return json.dumps(line, ensure_ascii=False).encode()
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
    """Whether `half` a line is how an answer to the one in `prompts` begins."""
    heads = [_encoded(_asked(given) | {"answer": ""}).removesuffix(b'"}') for given in prompts]
    return any(half.startswith(head) or head.startswith(half) for head in heads)


def _write(file: int, data: bytes, at: int) -> None:
    while data:
        size = os.pwrite(file, data, at)
        data, at = data[size:], at + size
