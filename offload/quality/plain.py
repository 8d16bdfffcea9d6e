"""A checkpoint run by transformers alone: nothing quantised, nothing offloaded.

Knows: how to open one from the names `load` takes. Does not know: what it is compared with.
"""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from offload.budget.resolve import find_device
from offload.errors import SourceError
from offload.model import sources
from offload.pack.find import find_source
from offload.progress import without_bars


def load_plain(
    source: str,
    *,
    device: str | torch.device | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint `source` (folder, hub id or "demo") as transformers loads it, whole in memory.

    Raises `SourceError`, also for a pack.
    """
    found = find_source(
        source,
        revision=revision,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
    )
    if found.is_pack:
        raise SourceError(f"{source} is a pack, which transformers cannot run: leave --plain")
    sources.fetch_weights(found, local_files_only=local_files_only)
    folder = found.folder
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", device_map={"": find_device(device)}, **options
            )
        return model, AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:  # whatever a config or tokenizer class says
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"transformers cannot run {source} alone ({reason})") from None
