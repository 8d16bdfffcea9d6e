"""One thing that was looked at, and what to do about it.

Knows: verdicts. Does not know: what is looked at, how it is printed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, SLOW, MISSING = "ok", "slow", "missing"


@dataclass(frozen=True)
class Finding:
    """`remedy` is empty where all is well; `data` are the figures behind `value`."""

    name: str
    value: str
    verdict: str = OK
    remedy: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "verdict": self.verdict,
            "remedy": self.remedy or None,
            **self.data,
        }
