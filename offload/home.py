"""Where this program keeps its files."""

from __future__ import annotations

import os
from pathlib import Path

from offload.files import user_path


def short(path: Path) -> str:
    """`path` as people write it, `~` for their home."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def offload_home() -> Path:
    """`$OFFLOAD_HOME`, else `$XDG_CACHE_HOME/offload`, else `~/.cache/offload`."""
    if home := os.environ.get("OFFLOAD_HOME"):
        return user_path(home)
    cache = os.environ.get("XDG_CACHE_HOME")
    return user_path(cache or "~/.cache") / "offload"
