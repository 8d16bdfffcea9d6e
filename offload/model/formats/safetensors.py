"""Reads the safetensors files of a checkpoint folder, single or sharded."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offload.errors import CheckpointError
from offload.files import unreadable
from offload.model.layout import weight_files

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # safetensors' names


class SafetensorsSource:
    """The tensors of a checkpoint folder's safetensors files, in the dtypes they are stored in."""

    def __init__(self, folder: Path) -> None:
        """Open every file's header. Raises `CheckpointError`."""
        self._handles: dict[str, Any] = {}  # tensor -> its file, opened
        for file in weight_files(folder):
            try:
                with (folder / file).open("rb"):  # safe_open would say no more than "I/O error"
                    handle: Any = safe_open(folder / file, framework="pt")
            except PermissionError:
                raise unreadable(folder / file) from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{folder / file} is not a whole safetensors file ({error}): fetch it again"
                ) from None
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> list[str]:
        return list(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        dtype = self.stored_dtype(name)
        if dtype is None:
            raise CheckpointError(
                f"{name} is stored as {self._slice(name).get_dtype()}, which is not supported: use "
                "a checkpoint in bfloat16, float16, float32, float8 with scales or MXFP4, or a "
                "GGUF file"
            )
        return dtype

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype in the file; None for one that is not read."""
        return DTYPES.get(str(self._slice(name).get_dtype()))

    def read(self, name: str) -> Tensor:
        return self._handles[name].get_tensor(name)  # type: ignore[no-any-return]

    def read_slice(self, name: str, index: int) -> Tensor:
        return self._slice(name)[index : index + 1]  # type: ignore[no-any-return]

    def _slice(self, name: str) -> Any:
        return self._handles[name].get_slice(name)
