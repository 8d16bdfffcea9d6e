"""Saved conversations, as readable JSON files under the runtime's home folder."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.errors import ChatError
from offload.files import offload_home, write_whole
from offload.quant.errors import OffloadError
from offload.sampling import PARAMETERS, Sampling

if TYPE_CHECKING:
    from offload.generation.conversation import Message

NAME = re.compile(r"[\w.-]+")
# What reading JSON and converting its values raises.
UNUSABLE = (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Settings:
    """The settings of a conversation other than sampling."""

    num_predict: int | None  # most new tokens; None: all that fit
    think: bool | None  # passed to the chat template; None leaves the template's default
    thoughts: bool  # whether thoughts are shown
    stop: tuple[str, ...]

    @classmethod
    def of(cls, data: dict[str, Any]) -> Settings:
        """Check and convert a saved dictionary. Raises `KeyError`, `TypeError` or `ValueError`."""
        made = cls(data["num_predict"], data["think"], data["thoughts"], tuple(data["stop"]))
        count = made.num_predict
        if (
            not (count is None or (type(count) is int and count > 0))
            or type(made.think) not in (bool, type(None))
            or type(made.thoughts) is not bool
            or not all(type(text) is str for text in data["stop"])
            or type(data["stop"]) is not list
        ):
            raise ValueError(f"settings {data}")
        return made


@dataclass(frozen=True)
class SavedChat:
    """Everything that is needed to continue a conversation."""

    system: str
    sampling: Sampling
    messages: list[Message]
    settings: Settings | None = None  # None: the file comes from a version without settings

    def save(self, name: str) -> Path:
        """Write the conversation under `name` and return the file. Raises `ChatError`."""
        file = _file(name)
        data: dict[str, Any] = {
            "system": self.system,
            "parameters": asdict(self.sampling),
            "messages": self.messages,
        }
        if self.settings is not None:
            data["settings"] = asdict(self.settings)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(data, indent=1, ensure_ascii=False).encode())
        except (OSError, UnicodeEncodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ChatError(f"cannot write {file}: {reason}") from None
        return file

    @classmethod
    def load(cls, name: str) -> SavedChat:
        """Read the conversation saved under `name`. Raises `ChatError`, or the error of `Sampling`
        for parameters out of range."""
        file = _file(name)
        try:
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            messages = [
                {"role": str(m["role"]), "content": str(m["content"])}
                | ({"thinking": str(m["thinking"])} if "thinking" in m else {})
                for m in data["messages"]
            ]
            given: dict[str, Any] = {
                name: None if data["parameters"][name] is None else kind(data["parameters"][name])
                for name, kind in PARAMETERS.items()
            }
            settings = Settings.of(data["settings"]) if "settings" in data else None
            return cls(str(data["system"]), Sampling(**given), messages, settings)
        except FileNotFoundError:
            raise ChatError(f"there is no saved conversation {name!r} ({file})") from None
        except OSError as error:
            raise ChatError(f"cannot read {file}: {error.strerror or error}") from None
        except UNUSABLE as error:
            raise ChatError(f"{file} is not a saved conversation ({error!r})") from None


def saved_names() -> list[str]:
    """The names of all saved conversations, those saved last at the end."""
    files = (offload_home() / "conversations").glob("*.json")
    return [file.stem for file in sorted(files, key=lambda file: (file.stat().st_mtime, file.stem))]


def listing() -> list[tuple[str, str]]:
    """The name of each saved conversation, and when it was saved and how it begins."""
    rows = []
    for name in saved_names():
        try:
            messages = SavedChat.load(name).messages
            words = " ".join(messages[0]["content"].split()) if messages else ""
            begins = words if len(words) <= 40 else f"{words[:40]}..."
            text = f"{len(messages)} messages: {begins}"
        except OffloadError as error:
            text = str(error)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(_file(name).stat().st_mtime))
        rows.append((name, f"{when}, {text}"))
    return rows


def is_saved(name: str) -> bool:
    """Whether there is a conversation of this name. Raises `ChatError` if that is no name."""
    return os.path.lexists(_file(name))


def _file(name: str) -> Path:
    if not NAME.fullmatch(name) or name.startswith("."):
        raise ChatError("Usage: /save NAME or /load NAME (letters, digits, . and -)")
    return offload_home() / "conversations" / f"{name}.json"
