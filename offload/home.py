"""Where this program keeps its files."""

from __future__ import annotations

import os
from pathlib import Path


def offload_home() -> Path:
    """`$OFFLOAD_HOME`, else `$XDG_CACHE_HOME/offload`, else `~/.cache/offload`."""
    if home := os.environ.get("OFFLOAD_HOME"):
        return Path(home).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "offload"
