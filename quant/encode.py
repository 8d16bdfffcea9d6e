"""Turns a matrix's weights into packed bytes, in the calling thread, on a GPU or in processes.

A matrix is cut into chunks of rows. Its shape alone decides where, so its bytes are the same
however many processes encode it.

Letters: N rows of a matrix, R rows of a chunk (padded to whole tiles), K columns, g columns of a
group, s groups that share a step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from offload.quant.codes import TILE_ROWS, encode_scales, pack, padded_rows
from offload.quant.errors import PackError
from offload.quant.hqq import CPU, quantize
from offload.quant.record import RecordLayout, view_record, view_rows
from offload.quant.scheme import Scheme

CHUNK_WEIGHTS = 2**20  # a chunk has about this many weights; one CPU core needs 0.1 s for them


class EncodedRows(NamedTuple):
    """A chunk of a matrix as a record holds it."""

    weight: Tensor  # [R / 64, K * bits * 8] uint8
    scales: Tensor  # [K/g, R, 2] bfloat16, or uint8 if there are steps
    steps: Tensor | None  # [K/g/s, R, 4] bfloat16


class Encoder(Protocol):
    """Something that encodes chunks, `width` of them at a time."""

    width: int

    def submit(self, weight: Tensor, scheme: Scheme) -> Future[EncodedRows]:
        """Begin `encode_rows(weight, scheme)`; `weight` must not change before the result."""


def encode_rows(weight: Tensor, scheme: Scheme, device: torch.device = CPU) -> EncodedRows:
    """Encode `weight` [R, K] of any floating-point dtype; the solver runs on `device`.

    Rows added as padding are zero bytes.
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
    """Rows in a chunk of a matrix with `columns` columns: whole tiles of about `CHUNK_WEIGHTS`."""
    return TILE_ROWS * max(1, CHUNK_WEIGHTS // (TILE_ROWS * columns))


class DeviceEncoder:
    """Encodes on one device in a thread of its own, while the caller reads and writes files."""

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


class WorkerEncoder:
    """Encodes in `count` processes; use as a context manager.

    Threads would gain nothing, because hqq's solver is many small operations with Python between
    them. Results raise `BrokenExecutor` if a process has died, and if that error leaves the
    context, the context raises `PackError` in its place.
    """

    def __init__(self, count: int) -> None:
        from loky import ProcessPoolExecutor  # imported here: running a model does not need it

        self.width = count
        # The system closes this process's end of the pipe when the process ends, even by a kill.
        theirs, self._ours = Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            count,
            initializer=_prepare_process,
            initargs=(theirs,),
            # PYTHONSAFEPATH keeps Python from importing a `quant.py` in the current folder.
            env={"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        )
        try:
            with _children_ignore_interrupts():
                self._pool.submit(int)  # the first call starts all processes
        except BaseException:
            self.close()
            raise

    def submit(self, weight: Tensor, scheme: Scheme) -> Future[EncodedRows]:
        # Pickling a tensor would send its whole storage; a numpy array sends only its own values.
        data = weight.contiguous().view(-1).view(torch.uint8).numpy()
        future: Future[EncodedRows] = self._pool.submit(
            _encode_array, data, weight.dtype, weight.shape, scheme
        )
        return future

    def close(self) -> None:
        """End all processes at once, whatever they are doing."""
        self._pool.shutdown(kill_workers=True)
        self._ours.close()

    def __enter__(self) -> WorkerEncoder:
        return self

    def __exit__(self, kind: object, value: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(value, BrokenExecutor):
            raise PackError(
                "a quantising process ended, perhaps for lack of memory: free some memory and run "
                "the same command again, which continues where it stopped"
            ) from value


def _encode_array(data: Any, dtype: torch.dtype, shape: torch.Size, scheme: Scheme) -> EncodedRows:
    return encode_rows(torch.from_numpy(data).view(dtype).view(shape), scheme)


def _prepare_process(parent: Connection) -> None:
    """Make this quantising process end with its parent; loky would let it outlive a killed parent.

    Nothing is ever sent through `parent`, so a read ends only when the parent's end is closed.
    """
    torch.set_num_threads(1)

    def wait() -> None:
        with contextlib.suppress(EOFError, OSError):
            parent.recv_bytes()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Block Ctrl-C in processes that are started in this context; they inherit the block.

    The process that starts them handles Ctrl-C. The others would print tracebacks if it came while
    they import torch.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # starting it later would unblock Ctrl-C again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class PendingRecord:
    """An expert whose matrices are being encoded; `write` puts them into its record."""

    def __init__(
        self,
        layout: RecordLayout,
        matrices: Mapping[str, tuple[Tensor, Tensor | None]],
        encoder: Encoder,
    ) -> None:
        """Begin to encode `matrices`, which has `(weight [N, K], bias [N])` for each name."""
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
        """How many pieces of work the expert was cut into."""
        return sum(map(len, self._chunks.values()))

    def write(self, out: Tensor) -> None:
        """Wait until all is encoded, then write the record into `out` [record_bytes] uint8."""
        out.zero_()  # gaps between matrices are zero, so that equal experts give equal bytes
        for name, view in view_record(out, self._layout).items():
            weight, bias = self._matrices[name]
            if view.scales is None:
                view.weight.copy_(weight)
            row = 0
            for chunk in self._chunks.get(name, ()):
                encoded = chunk.result()
                end = row + encoded.scales.shape[1]
                part = view_rows(view, row, end)
                for place, data in zip(
                    (part.weight, part.scales, part.steps), encoded, strict=True
                ):
                    if place is not None and data is not None:
                        place.copy_(data)
                row = end
            if view.bias is not None:
                assert bias is not None, f"layout has a bias for {name}, the checkpoint has none"
                view.bias.copy_(bias)
