"""`--timeline FILE`: torch's profiler records who was busy when, for ui.perfetto.dev."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from errno import ENOSPC
from functools import partial
from pathlib import Path
from typing import Any

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from offload import files, ranges
from offload.engine.engine import Engine
from offload.engine.handle import offload_of
from offload.lines import reason
from offload.quant.errors import OffloadError
from offload.version import __version__


@contextlib.contextmanager
def record_timeline(model: PreTrainedModel, file: Path | None) -> Iterator[None]:
    """Record what `model` does inside the `with` block and write it to `file`, even after an error.

    If `file` is None, nothing is recorded. The profiler keeps every operation of torch: thousands
    for each token, and a quarter of a megabyte in the file per thousand. Record a short run.
    Raises `OffloadError` before anything runs where `file` cannot be written.
    """
    if file is None:
        yield
        return
    files.check_output(file, files.TIMELINE)
    file = files.user_path(file).resolve()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    engine = offload_of(model).engine
    activities = [ProfilerActivity.CPU]
    if engine.transfer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    # Without this option the profiler leaves out every thread that was there before it, like the
    # one that copies records.
    profiler = profile(
        activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True)
    )
    engine.plan_on_host()  # steps that the device plans have no ranges
    profiler.start()
    profiler.add_metadata_json("moe-offload", f'"{__version__}"')  # the mark of our timelines
    try:
        with ranges.switched_on(), _dense_ranges(engine):
            yield
    finally:
        with contextlib.suppress(OffloadError):  # from a copy that failed and nobody waited for
            engine.settle()  # the range of a copy has to end before the profiler does
        profiler.stop()
        _write(profiler, file)


@contextlib.contextmanager
def _dense_ranges(engine: Engine) -> Iterator[None]:
    """A range for the work between two layers' experts."""
    under_way: list[contextlib.AbstractContextManager[object]] = []

    def end(*_: Any) -> None:
        while under_way:
            under_way.pop().__exit__(None, None, None)

    def begin(layer: int, *_: Any) -> None:
        under_way.append(ranges.work("dense", layer))
        under_way[-1].__enter__()

    with contextlib.ExitStack() as undo:
        for layer in engine.layers:
            following = (layer.index + 1) % len(engine.layers)
            ends = layer.module.register_forward_pre_hook(end)
            begins = layer.module.register_forward_hook(partial(begin, following))
            undo.callback(ends.remove)
            undo.callback(begins.remove)
        undo.callback(end)
        begin(0)
        yield


def _write(profiler: profile, file: Path) -> None:
    """Write the trace; an earlier file is only replaced by a whole one. Raises `OffloadError`."""
    try:
        # The profiler keeps files beside its own, and leaves out what the disk cannot hold.
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
            part = Path(folder, "trace.json")  # a name in .gz would be compressed
            profiler.export_chrome_trace(str(part))
            if not part.exists() or not part.read_bytes()[-16:].rstrip().endswith(b"}"):
                raise OSError(ENOSPC, "the disk is full")
            files.tell_replaced(file, files.TIMELINE)
            part.replace(file)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise OffloadError(
            f"cannot write the timeline to {file} ({why}): name another --timeline"
        ) from None
