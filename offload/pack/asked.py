"""Checks what a command was asked for before torch is imported, so that a typo is told at once."""

import sys
from collections.abc import Sequence

from offload.lines import printable
from offload.machine.limits import check_ram
from offload.model.names import DEMO, TEXT_FILES, find, find_here
from offload.options import LoadOptions
from offload.pack.recipe import AskedBits
from offload.quick import import_transformers


def check_asked(model: str, options: LoadOptions) -> bool:
    """Raise `OffloadError` for a model or option that no model can be loaded with.

    Returns whether the model is on this machine; a hub id is not looked up.
    """
    AskedBits.of(options)
    check_ram(options.ram)
    return model == DEMO or find_here(model, options.pack_dir) is not None


def begin_loading(model: str, options: LoadOptions, files: Sequence[str] = TEXT_FILES) -> None:
    """Check the model and its options, say that loading begins, and import torch.

    A model of the hub is looked up before the import. Raises `OffloadError`.
    """
    here = check_asked(model, options)
    if sys.stderr.isatty():
        print(f"Loading {printable(model)}...", file=sys.stderr, flush=True)
    if not here:
        find(model, options, files)
    import_transformers()
