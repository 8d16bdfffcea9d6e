"""Prompts from a file of lines, answers to another that is whole after a kill at any moment.

Knows: JSON lines, what of a file is complete. Does not know: models.

A line of the answers is the prompt's own object with the answer added, so a reader needs one file,
and going on with other prompts than before is noticed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from offload.errors import OffloadError, SourceError
from offload.files import read_text, user_path
from offload.generation import Message

ADDED = ("answer", "answers", "finish_reason", "prompt_tokens", "generated_tokens")


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """The objects in `file`, each with a "prompt" or "messages"; a line may be a plain string.

    Raises `SourceError` that names the line.
    """
    path = user_path(file)
    try:
        with path.open(encoding="utf-8") as handle:
            text = read_text(handle, str(file))
    except OSError as error:
        raise SourceError(f"cannot read the prompts from {file}: {error.strerror}") from None
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            prompts.append(_checked({"prompt": given} if isinstance(given, str) else given))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise SourceError(
                f'{file}, line {number}: write a text, {{"prompt": "..."}} or {{"messages": '
                f'[{{"role": "user", "content": "..."}}]}} in JSON, on one line'
            ) from None
    if not prompts:
        raise SourceError(f"{file} has no prompts: write one JSON object a line")
    return prompts


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


def messages_of(given: dict[str, Any], system: str) -> list[Message]:
    """The conversation that a line asks to be continued."""
    said = given.get("messages") or [{"role": "user", "content": given["prompt"]}]
    begin = [{"role": "system", "content": system}] if system else []
    return [*begin, *said]


class AnswersFile:
    """Answers appended one line at a time, by one process."""

    def __init__(self, file: Path) -> None:
        self._path = user_path(file)
        self._lock = FileLock(f"{self._path}.lock")
        try:
            self._lock.acquire(timeout=0)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except Timeout:
            raise OffloadError(f"{file} is being written by another process") from None
        except OSError as error:
            self._lock.release()
            raise OffloadError(f"cannot write {file}: {error.strerror}") from None
        self._end = 0  # of the last whole line

    def done(self, prompts: list[dict[str, Any]]) -> int:
        """How many prompts are answered already; half a line at the end is cut off.

        Raises `OffloadError` where the answers are not to these prompts.
        """
        data = self._path.read_bytes()
        self._end = data.rfind(b"\n") + 1
        os.ftruncate(self._file, self._end)
        lines = data[: self._end].split(b"\n")[:-1]
        for number, line in enumerate(lines):
            try:
                answer = json.loads(line)
                asked = {name: value for name, value in answer.items() if name not in ADDED}
                if asked != _asked(prompts[number]):
                    raise ValueError("another prompt")
            except (ValueError, RecursionError, AttributeError, IndexError):
                raise OffloadError(
                    f"{self._path}, line {number + 1} is no answer to that line's prompt: name "
                    "another file, or move this one away"
                ) from None
        return len(lines)

    def append(self, given: dict[str, Any], added: dict[str, Any]) -> None:
        """One more answer, on the disk when this returns; a full disk leaves whole lines."""
        line = json.dumps(_asked(given) | added, ensure_ascii=False).encode("utf-8", "replace")
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
        os.close(self._file)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ADDED}


def _write(file: int, data: bytes, at: int) -> None:
    while data:
        size = os.pwrite(file, data, at)
        data, at = data[size:], at + size
