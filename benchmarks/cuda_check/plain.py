"""What users have without this program: transformers with accelerate's `cpu_offload`.

Knows: how it is built with random 16-bit weights. Does not know: packs.
"""

from __future__ import annotations

import time

import psutil
import torch

from benchmarks.cuda_check.attempt import NotBuiltError, need_time
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.shapes import Case
from benchmarks.cuda_check.sizes import RAM_SHARE
from benchmarks.cuda_check.store import Row
from benchmarks.cuda_check.timing import synchronize
from offload.model.seam import build_on_meta, model_class

SECONDS = 15.0  # it may take
GB_PER_S = 2.0  # of filling host memory, about


def accelerate_row(case: Case, setting: Setting) -> Row:
    """Decode speed of one or two layers: bfloat16 experts in pageable memory, copied layer by layer
    as accelerate does it. Raises `NotBuiltError`, `NoTimeError`."""
    try:
        from accelerate import cpu_offload  # type: ignore[import-untyped]
    except ImportError as error:
        raise NotBuiltError(str(error)) from None
    layers = 2
    config = case.config_of(layers, setting.rehearse)
    config.dtype = torch.bfloat16
    size = _bytes(case, setting, layers)
    if size > psutil.virtual_memory().available * RAM_SHARE:
        raise NotBuiltError(f"{size / 2**30:.0f} GiB for {layers} layers are more than is free")
    need_time(setting, SECONDS + size / 1e9 / GB_PER_S)
    model = build_on_meta(config, model_class(config, case.name, False))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)  # touched: pages that nobody wrote to are not in memory
    model.eval()
    cpu_offload(model, execution_device=setting.device)
    ids = torch.ones(1, 1, dtype=torch.int64, device=setting.device)
    seconds: list[float] = []
    begin = time.monotonic()
    with torch.inference_mode():
        while len(seconds) < 6 and time.monotonic() - begin < SECONDS:
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            synchronize(setting.device)
            seconds.append(time.perf_counter() - start)
    quickest = min(seconds[1:] or seconds)
    return {
        "kind": "naive: transformers with accelerate",
        "what": "cpu_offload, bfloat16, pageable",
        "layers": layers,
        "tok_s": 1 / quickest,
        "ms_a_layer": 1e3 * quickest / layers,
        "gib_a_token": size / 2**30,
    }


def _bytes(case: Case, setting: Setting, layers: int) -> int:
    config = case.config_of(layers, setting.rehearse)
    config.dtype = torch.bfloat16
    model = build_on_meta(config, model_class(config, case.name, False))
    return sum(tensor.nbytes for tensor in model.parameters())
