"""One thing that `offload doctor` looked at, and what to do about it."""

from dataclasses import dataclass, field
from typing import Any

OK, SLOW, MISSING = "ok", "slow", "missing"


@dataclass(frozen=True)
class Finding:
    """What was found; `remedy` is empty if all is well, and `data` holds the numbers in `value`."""

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
