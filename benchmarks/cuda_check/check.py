"""The parts one after the other, each in a process that cannot harm the others.

Knows: who runs when, for how long, and what is noted of one that fails. Does not know: what parts
measure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.cuda_check.about import about
from benchmarks.cuda_check.attempt import reason
from benchmarks.cuda_check.parts import PARTS, Part
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.store import Store
from benchmarks.cuda_check.table import lines

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 15.0  # a part that would have less is not begun
GRACE_SECONDS = 4.0  # beyond its time, for what it is in the middle of


def run_part(name: str, setting: Setting, into: Path) -> int:
    """Run one part in this process; returns an exit code."""
    part = Store(into).part(name)
    try:
        next(known for known in PARTS if known.name == name).run(setting, part)
    except Exception as error:  # whatever a driver or a library raises
        part.set("status", f"failed: {reason(error)}")
        return 1
    part.set("status", "done")
    return 0


class Check:
    """A run of the whole check."""

    def __init__(
        self, out: Path, work: Path, seconds: float, pack_bytes: int, rehearse: bool
    ) -> None:
        described = about()
        name = "rehearsal" if rehearse else str(described["hardware"]["gpu"])
        out.mkdir(parents=True, exist_ok=True)
        self.into = out / f"cuda-check-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
        self._work, self._pack_bytes, self._rehearse = work, pack_bytes, rehearse
        self._seconds = seconds
        self._store = Store(self.into)
        began = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._store.write({"rehearsal": rehearse, "began": began, **described, "parts": {}})

    def run(self, only: list[str]) -> None:
        """Run the parts, or `only` those."""
        begin = time.monotonic()
        chosen = [part for part in PARTS if not only or part.name in only]
        for at, part in enumerate(chosen):
            left = self._seconds - (time.monotonic() - begin)
            equals = sum(later.seconds is None for later in chosen[at:])
            share = left / equals if part.seconds is None else part.seconds
            self._one(part, min(left, share))
        self._store.write({**self._store.read(), "seconds": time.monotonic() - begin})

    def report(self) -> str:
        """All tables."""
        return "\n".join(lines(self._store.read()))

    def _one(self, part: Part, seconds: float) -> None:
        results = self._store.part(part.name)
        results.set("status", "running")
        if seconds < LEAST_SECONDS:
            results.set("status", "not begun: no time left")
            return
        print(f"{part.name}: at most {seconds:.0f} s ...", file=sys.stderr, flush=True)
        begin = time.monotonic()
        folder = self._work / part.name
        folder.mkdir()
        if self._rehearse:
            run_part(part.name, Setting(True, folder, seconds, self._pack_bytes), self.into)
        else:
            self._isolated(part, folder, seconds)
        shutil.rmtree(folder, ignore_errors=True)
        results.set("seconds", time.monotonic() - begin)

    def _isolated(self, part: Part, folder: Path, seconds: float) -> None:
        command = [sys.executable, "-m", "benchmarks.cuda_check", "--part", part.name]
        command += ["--work", str(folder), "--into", str(self.into)]
        command += ["--seconds", str(seconds), "--gib", str(self._pack_bytes / 2**30)]
        seen = dict(os.environ)
        if not part.all_gpus:
            seen["CUDA_VISIBLE_DEVICES"] = seen.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        process = subprocess.Popen(command, cwd=ROOT, env=seen)
        results = self._store.part(part.name)
        try:
            code = process.wait(seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            results.set("status", f"stopped after {seconds:.0f} s; what it had measured is here")
            return
        if code not in (0, 1):  # 1 has said why
            results.set("status", f"failed: the process ended with code {code}")
