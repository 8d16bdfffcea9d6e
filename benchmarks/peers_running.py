"""Peers' processes: started one after the other, asked, ended; who takes part, who no longer does.

A peer that fails, at whatever moment, is left out and named; the others go on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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


@dataclass
class Run:
    """Who takes part; the first one is the reference."""

    peers: list[Peer] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # a name, and why

    def drop(self, peer: Peer, error: PeerError) -> None:
        """Go on without it: say so, and give back what it holds."""
        self.left_out[peer.spec.name] = str(error)
        self.peers.remove(peer)
        print(f"{peer.spec.name} IS LEFT OUT: {error}", file=sys.stderr)
        peer.process.kill()


@contextlib.contextmanager
def running(
    chosen: list[Spec], load: Load, threads: int, serve: Callable[..., None] = serve
) -> Iterator[Run]:
    """The peers' processes, one loaded after the other."""
    context = multiprocessing.get_context("spawn")
    run, started = Run(), list[Peer]()
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        try:
            for number, spec in enumerate(chosen):
                mine, theirs = context.Pipe()
                folder = Path(scratch) / str(number)
                arguments = (theirs, spec, load.context, threads, folder)
                process = context.Process(target=serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                peer = Peer(spec, mine, process)
                started.append(peer)
                run.peers.append(peer)
                _await_loading(run, peer)
            yield run
        finally:
            for peer in started:
                with contextlib.suppress(OSError):
                    peer.pipe.send(None)
                peer.process.join(10)
                peer.process.kill()


def _await_loading(run: Run, peer: Peer) -> None:
    begin = time.perf_counter()
    try:
        peer.answer()
    except PeerError as error:
        run.drop(peer, error)
    else:
        seconds = time.perf_counter() - begin
        print(f"{peer.spec.name}: loaded in {seconds:.0f} s", file=sys.stderr)


def measure(run: Run, texts: Iterator[list[int]], load: Load) -> None:
    """All rounds, forwards and backwards in turns; each round reads another stretch of text."""
    warm = next(texts)
    for peer in list(run.peers):
        _ask(run, peer, _warm_up, warm, load)
    for number in range(load.rounds):
        text = next(texts)
        print(f"round {number + 1} of {load.rounds}", file=sys.stderr)
        for peer in list(run.peers) if number % 2 == 0 else list(reversed(run.peers)):
            if peer.spec.rounds is None or number < peer.spec.rounds:
                _ask(run, peer, _time, text, load)
    for peer in list(run.peers):
        _ask(run, peer, _facts)


def _ask(run: Run, peer: Peer, what: Callable[..., None], *arguments: Any) -> None:
    try:
        what(peer, *arguments)
    except PeerError as error:
        run.drop(peer, error)


def _warm_up(peer: Peer, text: list[int], load: Load) -> None:
    slow = peer.spec.rounds is not None
    rest = text[load.prompt :][: 1 if slow else load.warm]
    peer.ask("timed", text[: 16 if slow else load.prompt], rest)


def _time(peer: Peer, text: list[int], load: Load) -> None:
    rest = text[load.prompt :][: peer.spec.decode]
    prefill, decode = peer.ask("timed", text[: load.prompt], rest)
    peer.prefill.append(load.prompt / prefill)
    peer.decode.append(len(rest) / decode)


def _facts(peer: Peer) -> None:
    peer.facts = peer.ask("facts")
