"""Checks what a command was asked for before torch is imported, so that a typo is told at once."""

import sys
from collections.abc import Sequence
from pathlib import Path

from offload.errors import SourceError
from offload.files import TRACE, check_output
from offload.lines import printable
from offload.machine.memory import check_ram
from offload.model.layout import is_gguf, read_template
from offload.model.names import DEMO, TEXT_FILES, FoundModel, find, find_here
from offload.options import LoadOptions
from offload.pack.recipe import AskedBits
from offload.quick import import_transformers


def check_asked(model: str, options: LoadOptions) -> FoundModel | None:
    """Return the model if it is on this machine; a hub id is not looked up.

    Raises `OffloadError` for a name that no model can have, or an option with which none can load.
    """
    check_output(options.trace, TRACE)
    AskedBits.of(options)
    check_ram(options.ram)
    return find_here(model, options.pack_dir)


def say_loading(model: str) -> None:
    """Say on a terminal that the model loads, because the imports to come take a while."""
    if sys.stderr.isatty():
        print(f"Loading {printable(model)}...", file=sys.stderr, flush=True)


def begin_loading(
    model: str,
    options: LoadOptions,
    files: Sequence[str] = TEXT_FILES,
    *,
    said: bool = False,
    chats: bool = False,
) -> None:
    """Check the model and its options, say that loading begins, and import torch.

    A model of the hub is looked up before the import, unless `files` is empty. With `said`, the
    user was told already. A model that `chats` needs a chat template. Raises `OffloadError`.
    """
    found = check_asked(model, options)
    if not said:
        say_loading(model)
    if found is None and files and model != DEMO:
        found = find(model, options, files)
    if chats and found is not None and not options.trust_remote_code:
        _check_template(model, found.folder)
    import_transformers()


def _check_template(model: str, folder: Path) -> None:
    """Raise `SourceError` if no file in `folder` can have a chat template."""
    # The template of a GGUF file is in its metadata, and that of tekken.json in a library.
    if is_gguf(folder) or (folder / "tekken.json").is_file() or read_template(folder) is not None:
        return
    raise SourceError(f"{model} has no chat template: use offload generate --raw")
