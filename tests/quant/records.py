"""Records that a test encodes itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from offload.quant.encode import HereEncoder, PendingRecord
from offload.quant.record import RecordLayout


def encode_record(
    out: Tensor, layout: RecordLayout, matrices: Mapping[str, tuple[Tensor, Tensor | None]]
) -> None:
    """Write one expert into `out` [record_bytes] uint8, in this thread."""
    PendingRecord(layout, matrices, HereEncoder()).write(out)
