"""An expert on its way into its record.

Knows: how a record's matrices are cut into chunks, and where encoded rows go. Does not know: how
rows are encoded (`quant.encode`), nor where.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

from offload.quant.encode import EncodedRows, Encoder, chunk_rows
from offload.quant.record import MatrixView, RecordLayout, view_record
from offload.quant.scheme import Scheme
from torch import Tensor


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
