"""Encoding on several cores: a pool of processes, each behind a thread that feeds it.

Knows: processes and threads. Does not know: what is encoded. Threads alone gain nothing: hqq's
solver is many small operations with Python between them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from offload.quant.encode import EncodedRows
from offload.quant.encode_worker import read_answer, write_request
from offload.quant.errors import PackError
from offload.quant.scheme import Scheme
from torch import Tensor


class WorkerEncoder:
    """An `Encoder` of `count` processes; use as a context manager."""

    def __init__(self, count: int) -> None:
        self.width = count
        self._local = threading.local()
        self._processes = [_start() for _ in range(count)]
        self._idle = list(self._processes)
        self._threads = ThreadPoolExecutor(count, "offload-encode", initializer=self._take_process)

    def _take_process(self) -> None:
        self._local.process = self._idle.pop()

    def submit(self, weight: Tensor, scheme: Scheme) -> Future[EncodedRows]:
        return self._threads.submit(self._encode, weight, scheme)

    def _encode(self, weight: Tensor, scheme: Scheme) -> EncodedRows:
        process: subprocess.Popen[bytes] = self._local.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            write_request(process.stdin, weight, scheme)  # type: ignore[arg-type]
            return read_answer(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError):
            raise PackError(
                f"a quantising process ended (exit code {process.wait()}), perhaps for lack of "
                "memory: free some and run it again, it goes on where it stopped"
            ) from None

    def __enter__(self) -> WorkerEncoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()  # a thread that waits for its answer then gets the end of the pipe
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with contextlib.suppress(OSError):  # what was being written has nowhere to go
                process.communicate()


def _start() -> subprocess.Popen[bytes]:
    here = str(Path(__file__).resolve().parents[1])  # a checkout
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "offload.quant.encode_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        process_group=0,  # Ctrl-C in a terminal is for the process that asks
    )
