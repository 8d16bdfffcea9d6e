"""The tests that need a GPU.

Knows: how pytest is asked for them, and what it says line by line, so that a run that is cut short
still tells what it saw. Does not know: what they test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.store import Part

ROOT = Path(__file__).parents[2]
MARK = "mark.gpu"
VERDICT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
UNREADABLE = re.compile(r"^ERROR (\S+\.py)\b", re.MULTILINE)  # a file whose imports fail
MARGIN_SECONDS = 5.0  # between pytest's end and this part's


def run(setting: Setting, part: Part) -> None:
    """Run them; only files that have any, so that the others' imports are not needed."""
    files = sorted(
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if MARK in file.read_text(encoding="utf-8")
    )
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-m", "gpu"]
    log = setting.work / "tests.log"
    command += ["--tb=short", "--color=no", "--continue-on-collection-errors", *files]
    ended = _run(command, log, setting.seconds_left)
    text = log.read_text(errors="replace")
    verdicts = [
        *VERDICT.findall(text),
        *((file, "ERROR") for file in set(UNREADABLE.findall(text))),
    ]
    counts = Counter(verdict for _, verdict in verdicts)
    part.add(
        {
            "kind": "pytest -m gpu",
            "files": len(files),
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
        part.note("the tests were cut short by this part's time")
    if not verdicts or counts["FAILED"] or counts["ERROR"]:
        part.set("output_tail", text[-6000:])


def verdicts_in(text: str) -> list[tuple[str, str]]:
    """Each test and what became of it, in pytest's own words; a file that could not be imported is
    an ERROR."""
    unreadable = dict.fromkeys(UNREADABLE.findall(text))
    return [*VERDICT.findall(text), *((file, "ERROR") for file in unreadable)]


def _run(command: list[str], log: Path, seconds: float) -> bool:
    """Run it with its output in `log`; whether it came to its end in time."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            process.wait(max(1.0, seconds - MARGIN_SECONDS))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
    return True
