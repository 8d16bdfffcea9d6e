"""A matrix's weights to packed bytes, in chunks of rows that can be worked on anywhere.

Knows: quantise, pack, scales. Does not know: records (`quant.record`), processes (`quant.workers`).
Chunks are cut by the matrix's shape alone, so the bytes are the same however many work on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from offload.quant.codes import TILE_ROWS, encode_scales, pack, padded_rows
from offload.quant.hqq import CPU, quantize
from offload.quant.record import MatrixView, RecordLayout, view_record
from offload.quant.scheme import Scheme
from torch import Tensor

CHUNK_WEIGHTS = 2**20  # about; 0.1 s of a CPU core's work


class EncodedRows(NamedTuple):
    """Rows of a matrix as a record holds them; R rows padded to whole tiles."""

    weight: Tensor  # [R / 64, K * bits * 8] uint8
    scales: Tensor  # [K/g, R, 2] bfloat16, or uint8 when there are steps
    steps: Tensor | None  # [K/g/s, R, 4] bfloat16


class Encoder(Protocol):
    """Where chunks are worked on, `width` of them at a time."""

    width: int

    def submit(self, weight: Tensor, scheme: Scheme) -> Future[EncodedRows]:
        """Begin `encode_rows(weight, scheme)`; `weight` must not change until it is done."""


def encode_rows(weight: Tensor, scheme: Scheme, device: torch.device = CPU) -> EncodedRows:
    """Encode `weight` [R, K] of any floating-point dtype; padding rows are zero bytes.

    `device` is where the solver runs.
    """
    rows, columns = weight.shape
    stored = padded_rows(rows)
    solved = quantize(weight, scheme.bits, scheme.group_size, device)
    codes = torch.zeros(stored, columns, dtype=torch.uint8)
    codes[:rows] = solved.codes
    pairs = torch.stack((solved.scale.t(), solved.offset.t()), dim=-1)  # [K/g, R, 2]
    padding = (0, 0, 0, stored - rows)
    steps = None
    if scheme.scale_bits == 8:
        scales, steps = encode_scales(pairs)
        steps = torch.nn.functional.pad(steps, padding)
    else:
        scales = pairs.to(torch.bfloat16)
    return EncodedRows(pack(codes, scheme.bits), torch.nn.functional.pad(scales, padding), steps)


def chunk_rows(columns: int) -> int:
    """Rows of a chunk of a matrix with `columns` columns: whole tiles, about `CHUNK_WEIGHTS`."""
    return TILE_ROWS * max(1, CHUNK_WEIGHTS // (TILE_ROWS * columns))


class DeviceEncoder:
    """Encodes on one device in a thread, so that reading and writing go on meanwhile."""

    width = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "offload-encode")

    def submit(self, weight: Tensor, scheme: Scheme) -> Future[EncodedRows]:
        return self._thread.submit(encode_rows, weight, scheme, self._device)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class HereEncoder:
    """Encodes in the calling thread."""

    width = 1

    def submit(self, weight: Tensor, scheme: Scheme) -> Future[EncodedRows]:
        future: Future[EncodedRows] = Future()
        future.set_result(encode_rows(weight, scheme))
        return future


class PendingRecord:
    """An expert that is being encoded: `write` puts it into its record."""

    def __init__(
        self,
        layout: RecordLayout,
        matrices: Mapping[str, tuple[Tensor, Tensor | None]],
        encoder: Encoder,
    ) -> None:
        """Begin to encode. `matrices`: each name in `layout` -> `(weight [N, K], bias [N])`."""
        self._layout = layout
        self._matrices = matrices
        self._chunks: dict[str, list[Future[EncodedRows]]] = {}
        for matrix in layout.matrices:
            if matrix.group_size:
                scheme = Scheme(matrix.bits, matrix.group_size, matrix.scale_bits)
                parts = matrices[matrix.name][0].split(chunk_rows(matrix.columns))
                self._chunks[matrix.name] = [encoder.submit(part, scheme) for part in parts]

    @property
    def chunks(self) -> int:
        """How many pieces of work it was cut into."""
        return sum(map(len, self._chunks.values()))

    def write(self, out: Tensor) -> None:
        """Wait for what was begun and write it into `out` [record_bytes] uint8."""
        out.zero_()  # padding included: equal experts are equal bytes
        for name, view in view_record(out, self._layout).items():
            weight, bias = self._matrices[name]
            if view.scales is None:
                view.weight.copy_(weight)
            else:
                _put_chunks(view, self._chunks[name])
            if view.bias is not None:
                assert bias is not None, f"layout has a bias for {name}, the checkpoint has none"
                view.bias.copy_(bias)


def _put_chunks(view: MatrixView, chunks: list[Future[EncodedRows]]) -> None:
    assert view.scales is not None
    tile = row = 0
    for chunk in chunks:
        encoded = chunk.result()
        tiles, rows = encoded.weight.shape[0], encoded.scales.shape[1]
        view.weight[tile : tile + tiles] = encoded.weight
        view.scales[:, row : row + rows] = encoded.scales
        if view.steps is not None and encoded.steps is not None:
            view.steps[:, row : row + rows] = encoded.steps
        tile, row = tile + tiles, row + rows
