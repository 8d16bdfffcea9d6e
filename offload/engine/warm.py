"""The hot experts of the run before, in a small file beside the pack's manifest."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from offload.cache.heat import Heat
from offload.files import write_whole
from offload.quant.pack import PackInfo

HOT = "hot.json"
VERSION = 1
MOST_BYTES = 2**24  # of the file: 100,000 experts take three million
MOST_USES = 400.0  # uses that halve every 256 tokens add up to 370 at most


def read_hot(pack: Path, info: PackInfo) -> list[tuple[int, int, float]]:
    """(layer, expert, decayed uses) of the run before, the hottest first.

    Empty if the file is missing, foreign or damaged.
    """
    file = pack / HOT
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            return []
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            return []
        hot = [(int(layer), int(expert), float(uses)) for layer, expert, uses in found["hot"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return []  # without the file the first tokens are slower, and that is all
    sizes = [layer.num_experts for layer in info.layers]
    known = {
        (layer, expert): min(uses, MOST_USES)
        for layer, expert, uses in hot
        if 0 <= layer < len(sizes) and 0 <= expert < sizes[layer] and uses > 0
    }
    return sorted(
        ((layer, expert, uses) for (layer, expert), uses in known.items()),
        key=lambda row: (-row[2], row[:2]),
    )


def write_hot(pack: Path, heat: Heat) -> None:
    """Save the present heat. Of two processes the last one's stays; a failure is ignored."""
    hot = [(*key, round(heat.of(*key), 4)) for key in heat.hottest()]
    if hot:
        with contextlib.suppress(OSError):  # a pack may be in a folder that is read-only
            write_whole(pack / HOT, json.dumps({"version": VERSION, "hot": hot}).encode())
