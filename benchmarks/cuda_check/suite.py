"""The tests that need a GPU.

Knows: how pytest is asked for them, and what it says line by line, so that a run that is cut short
still tells what it saw. Does not know: what they test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.store import Part

ROOT = Path(__file__).parents[2]
MARK = "mark.gpu"
ON_GPU = 'torch.device("cuda" if torch.cuda.is_available()'  # tests of kernels, wherever they run
BENCHMARKS = "benchmarks"  # tests of this check itself
VERDICT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
UNREADABLE = re.compile(r"^ERROR (\S+\.py)\b", re.MULTILINE)  # a file whose imports fail
MARGIN_SECONDS = 5.0  # between pytest's end and this part's
MOST_AT_ONCE = 6  # their kernels are compiled by one core each


@dataclass(frozen=True)
class Ran:
    """What became of one file's tests."""

    text: str  # pytest's
    ended: bool  # in time


def run(setting: Setting, part: Part) -> None:
    """Run them; only files that have any, so that the others' imports are not needed. A process for
    each file, some at once: those that are marked come first."""
    groups = [("pytest -m gpu", MARK, "gpu")]
    if not setting.rehearse:
        groups.append(("kernels on the GPU", ON_GPU, "not gpu and not long"))
    with ThreadPoolExecutor(max(1, min(MOST_AT_ONCE, (os.cpu_count() or 2) // 2))) as pool:
        begun = [
            (kind, [pool.submit(_run, setting, file, chosen) for file in files_with(sign)])
            for kind, sign, chosen in groups
        ]
        for kind, files in begun:
            _tell(part, kind, [file.result() for file in files])


def files_with(sign: str) -> list[str]:
    """Test files that have `sign` in them."""
    return sorted(
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if sign in file.read_text(encoding="utf-8")
        and BENCHMARKS not in file.relative_to(ROOT).parts
    )


def _tell(part: Part, kind: str, ran: list[Ran]) -> None:
    text = "\n".join(one.text for one in ran)
    ended = all(one.ended for one in ran)
    verdicts = verdicts_in(text)
    counts = Counter(verdict for _, verdict in verdicts)
    part.add(
        {
            "kind": "tests",
            "group": kind,
            "files": len(ran),
            "passed": counts["PASSED"],
            "failed": counts["FAILED"],
            "errors": counts["ERROR"],
            "skipped": counts["SKIPPED"],
            "ended": ended,
        }
    )
    for name, verdict in verdicts:
        if verdict in ("FAILED", "ERROR"):
            part.note(f"{verdict} {name}")
    if not ended:
        part.note(f"{kind}: cut short by this part's time")
    if not verdicts or counts["FAILED"] or counts["ERROR"]:
        tails = [one.text[-6000:] for one in ran if _went_wrong(one.text)] or [text[-6000:]]
        part.set(f"output tail of {kind}", "\n".join(tails))


def _went_wrong(text: str) -> bool:
    verdicts = verdicts_in(text)
    return not verdicts or any(verdict in ("FAILED", "ERROR") for _, verdict in verdicts)


def verdicts_in(text: str) -> list[tuple[str, str]]:
    """Each test and what became of it, in pytest's own words; a file that could not be imported is
    an ERROR."""
    unreadable = dict.fromkeys(UNREADABLE.findall(text))
    return [*VERDICT.findall(text), *((file, "ERROR") for file in unreadable)]


def _run(setting: Setting, file: str, chosen: str) -> Ran:
    """The tests of `file` that `chosen` marks choose, as long as there is time."""
    seconds = setting.seconds_left - MARGIN_SECONDS
    if seconds <= 0:
        return Ran("", False)
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-m", chosen]
    command += ["--tb=short", "--color=no", "--continue-on-collection-errors", file]
    with tempfile.TemporaryFile(dir=setting.work) as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        ended = True
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = False
        out.seek(0)
        return Ran(out.read().decode(errors="replace"), ended)
