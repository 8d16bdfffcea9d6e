"""A process that encodes rows: requests on stdin, answers on stdout, until stdin ends.

Knows: the bytes that pass between it and `quant.workers`. Run as `python -m quant.encode_worker`.
"""

from __future__ import annotations

import os
import struct
import sys
from typing import BinaryIO

import torch
from offload.quant.codes import TILE_ROWS
from offload.quant.encode import EncodedRows, encode_rows
from offload.quant.scheme import Scheme
from torch import Tensor

REQUEST = struct.Struct("<6q")  # rows, columns, dtype, bits, group size, bits of a scale
ANSWER = struct.Struct("<4q")  # stored rows, columns, groups, values of the steps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write_request(pipe: BinaryIO, weight: Tensor, scheme: Scheme) -> None:
    """Ask for `encode_rows(weight, scheme)`."""
    dtype = DTYPES.index(weight.dtype)
    numbers = (scheme.bits, scheme.group_size, scheme.scale_bits)
    pipe.write(REQUEST.pack(*weight.shape, dtype, *numbers))
    _write(pipe, weight)
    pipe.flush()


def read_request(pipe: BinaryIO) -> tuple[Tensor, Scheme] | None:
    """The next request, or None at the end."""
    head = pipe.read(REQUEST.size)
    if len(head) < REQUEST.size:
        return None
    rows, columns, dtype, *numbers = REQUEST.unpack(head)
    return _read(pipe, (rows, columns), DTYPES[dtype]), Scheme(*numbers)


def write_answer(pipe: BinaryIO, encoded: EncodedRows) -> None:
    tiles, size = encoded.weight.shape
    steps = 0 if encoded.steps is None else encoded.steps.shape[0]
    pipe.write(ANSWER.pack(tiles, size, encoded.scales.shape[0], steps))
    for part in encoded:
        if part is not None:
            _write(pipe, part)
    pipe.flush()


def read_answer(pipe: BinaryIO) -> EncodedRows:
    """Raises `EOFError` when the worker ended instead of answering."""
    head = pipe.read(ANSWER.size)
    if len(head) < ANSWER.size:
        raise EOFError
    tiles, size, groups, steps = ANSWER.unpack(head)
    rows = tiles * TILE_ROWS
    weight = _read(pipe, (tiles, size), torch.uint8)
    scales = _read(pipe, (groups, rows, 2), torch.uint8 if steps else torch.bfloat16)
    return EncodedRows(
        weight, scales, _read(pipe, (steps, rows, 4), torch.bfloat16) if steps else None
    )


def _write(pipe: BinaryIO, tensor: Tensor) -> None:
    data = tensor.contiguous().view(-1).view(torch.uint8)
    pipe.write(memoryview(data.numpy()))  # type: ignore[arg-type]  # numpy's arrays are buffers


def _read(pipe: BinaryIO, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    room = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while room:
        count = pipe.readinto(room)  # type: ignore[attr-defined]  # buffered pipes have it
        if not count:
            raise EOFError
        room = room[count:]
    return tensor


def main() -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    try:
        while (request := read_request(sys.stdin.buffer)) is not None:
            write_answer(sys.stdout.buffer, encode_rows(*request))
    except (EOFError, BrokenPipeError):  # who asked was killed
        os._exit(1)


if __name__ == "__main__":
    main()
