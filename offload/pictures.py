"""Pictures that matplotlib draws: which files they may go to, and how they are written."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import SourceError
from offload.files import PICTURE, check_output, write_output
from offload.quant.errors import OffloadError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The ending decides the format. Each has a field for the program that drew it (`files.MARKS`).
ENDINGS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}


def check_picture(file: Path | None, flag: str) -> None:
    """Raise `OffloadError` if `save_figure` could not write `file`, unless it is None.

    `flag` is the option that named it. To be called before long work; matplotlib is not imported.
    """
    if file is None:
        return
    if file.suffix.lower() not in ENDINGS:
        raise SourceError(f"{file} is no picture's name: end it in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise OffloadError(f"{flag} needs matplotlib: pip install matplotlib, or leave {flag} out")
    check_output(file, PICTURE)


def save_figure(figure: Figure, file: Path) -> None:
    """Write `figure` to `file`, in the format that its ending names. Raises `OffloadError`."""
    ending, drawn = file.suffix.lower(), io.BytesIO()
    figure.savefig(drawn, format=ending[1:], metadata={ENDINGS[ending]: "drawn by moe-offload"})
    write_output(file, PICTURE, drawn.getvalue())
