"""Conversations kept as readable JSON under the runtime's home.

Knows: names, files, what such a file holds. Does not know: what a chat does with it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offload.errors import ChatError
from offload.files import write_whole
from offload.generation import Message
from offload.home import offload_home
from offload.sampling import PARAMETERS, Sampling

NAME = re.compile(r"[\w.-]+")
UNUSABLE = (ValueError, OverflowError, RecursionError)  # what JSON and its numbers may raise


@dataclass(frozen=True)
class SavedChat:
    """What a conversation is taken up with again."""

    system: str
    sampling: Sampling
    messages: list[Message]

    def save(self, name: str) -> Path:
        """Write it as `name`, and return the file. Raises `ChatError`."""
        file = _file(name)
        data = {
            "system": self.system,
            "parameters": {name: getattr(self.sampling, name) for name in PARAMETERS},
            "messages": self.messages,
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(data, indent=1, ensure_ascii=False).encode())
        except (OSError, UnicodeEncodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ChatError(f"cannot write {file}: {reason}") from None
        return file

    @classmethod
    def load(cls, name: str) -> SavedChat:
        """The conversation saved as `name`. Raises `ChatError` or what `Sampling` raises."""
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
            return cls(str(data["system"]), replace(Sampling(), **given), messages)
        except OSError:
            raise ChatError(f"there is no saved conversation {name!r} ({file})") from None
        except (LookupError, TypeError, AttributeError, *UNUSABLE) as error:
            raise ChatError(f"{file} is not a saved conversation ({error!r})") from None


def saved_names() -> list[str]:
    """Names that `SavedChat.load` takes."""
    return sorted(file.stem for file in (offload_home() / "conversations").glob("*.json"))


def _file(name: str) -> Path:
    if not NAME.fullmatch(name) or name.startswith("."):
        raise ChatError("give the conversation a name of letters, digits, dots and dashes")
    return offload_home() / "conversations" / f"{name}.json"
