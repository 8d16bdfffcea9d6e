"""How many layers of a model are measured: as many as memory, disk and time allow.

Knows: what a layer takes where. Does not know: how it is measured.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import psutil
import torch

from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.shapes import Case
from benchmarks.synthetic_packs import pack_bytes
from offload.quant.scheme import Scheme

SCHEME = Scheme(4)
RAM_SHARE = 0.7  # of what is free: a record is in pinned memory, and a layer in the page cache
VRAM_SHARE = 0.85  # of what is free, for all experts and the dense weights
VRAM_KEPT = 3 * 2**30  # KV cache, workspace, graphs
REHEARSED_LAYERS = 2


@dataclass(frozen=True)
class Sizes:
    """A model as it is measured."""

    layers: int
    of_layers: int
    limit: str  # what forces fewer layers; empty: nothing does
    record_bytes: int
    layer_bytes: int


def sizes_of(case: Case, setting: Setting) -> Sizes:
    """The most layers that fit. The disk holds one layer: the others are links to it."""
    one, two = (pack_bytes(case.config_of(n, setting.rehearse), SCHEME) for n in (1, 2))
    layer_bytes, record_bytes, beside = one
    dense_layer = two[2] - beside
    beside -= dense_layer
    if setting.rehearse:
        return Sizes(REHEARSED_LAYERS, case.layers, "rehearsal", record_bytes, layer_bytes)
    vram = int(torch.cuda.mem_get_info()[0] * VRAM_SHARE) - VRAM_KEPT
    disk = int(shutil.disk_usage(setting.work).free * 0.9) - layer_bytes
    rooms = {
        "": case.layers,
        "GPU memory": (vram - beside) // (layer_bytes + dense_layer),
        "RAM": int(psutil.virtual_memory().available * RAM_SHARE) // (layer_bytes + dense_layer),
        "disk": (disk - beside) // dense_layer,
        "time": setting.pack_bytes // layer_bytes,
    }
    limit = min(rooms, key=lambda name: rooms[name])
    return Sizes(max(1, rooms[limit]), case.layers, limit, record_bytes, layer_bytes)
