"""Peers' processes: started one after the other, asked, ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peer_process import Spec, serve


@dataclass(frozen=True)
class Load:
    """How much is run."""

    prompt: int
    decode: int
    rounds: int
    greedy: int
    warm: int  # decoded tokens of the warm-up

    @property
    def context(self) -> int:
        return max(256, self.prompt + self.decode)


class PeerError(Exception):
    """A peer cannot do what all must do, or says something else."""


@dataclass
class Peer:
    """A process and what came of it."""

    spec: Spec
    pipe: Connection
    process: Any
    prefill: list[float] = field(default_factory=list)  # tokens/s, a round each
    decode: list[float] = field(default_factory=list)
    check: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def ask(self, name: str, *arguments: Any) -> Any:
        """Let the process do it. Raises `PeerError` when it could not."""
        try:
            self.pipe.send((name, arguments))
        except OSError:
            raise PeerError(self._end()) from None
        return self.answer()

    def answer(self) -> Any:
        """What the process sends. Raises `PeerError`."""
        try:
            state, value = self.pipe.recv()
        except (EOFError, OSError):
            raise PeerError(self._end()) from None
        if state != "ok":
            raise PeerError(value)
        return value

    def _end(self) -> str:
        self.process.join(10)
        return f"its process ended with {self.process.exitcode}"


@contextlib.contextmanager
def running(chosen: list[Spec], load: Load, threads: int) -> Iterator[list[Peer]]:
    """The peers' processes, one loaded after the other."""
    context = multiprocessing.get_context("spawn")
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        try:
            for spec in chosen:
                mine, theirs = context.Pipe()
                arguments = (theirs, spec, load.context, threads, Path(scratch))
                process = context.Process(target=serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                peers.append(Peer(spec, mine, process))
                begin = time.perf_counter()
                peers[-1].answer()
                seconds = time.perf_counter() - begin
                print(f"{spec.name}: loaded in {seconds:.0f} s", file=sys.stderr)
            yield peers
        finally:
            for peer in peers:
                with contextlib.suppress(OSError):
                    peer.pipe.send(None)
                peer.process.join(10)
                peer.process.kill()
