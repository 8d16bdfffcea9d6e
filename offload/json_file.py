"""A JSON file that holds an object.

Knows: how such a file can be wrong. Does not know: what it is for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offload.errors import CheckpointError


def read_object(file: Path) -> dict[str, Any]:
    """The object in `file`. Raises `CheckpointError`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__} where an object belongs")
    except PermissionError:
        raise unreadable(file) from None
    except RecursionError:
        raise CheckpointError(
            f"{file} cannot be read (it is nested too deep): fetch it again"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): fetch it again") from None
    return value


def unreadable(file: Path) -> CheckpointError:
    """The error for a file that is there and may not be opened."""
    return CheckpointError(f"{file} may not be read by this user: change its permissions")
