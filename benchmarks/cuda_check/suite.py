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
ON_GPU = 'torch.device("cuda" if torch.cuda.is_available()'  # tests of kernels, wherever they run
BENCHMARKS = "benchmarks"  # tests of this check itself
LEAST_SECONDS = 20.0  # for a second group
VERDICT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
UNREADABLE = re.compile(r"^ERROR (\S+\.py)\b", re.MULTILINE)  # a file whose imports fail
MARGIN_SECONDS = 5.0  # between pytest's end and this part's


def run(setting: Setting, part: Part) -> None:
    """Run them; only files that have any, so that the others' imports are not needed."""
    _run_group(setting, part, "pytest -m gpu", MARK, ["-m", "gpu"])
    if setting.seconds_left > LEAST_SECONDS and not setting.rehearse:
        _run_group(setting, part, "kernels on the GPU", ON_GPU, ["-m", "not gpu"])


def _run_group(setting: Setting, part: Part, kind: str, sign: str, chosen: list[str]) -> None:
    """Run the `chosen` tests of the files that have `sign` in them."""
    files = sorted(
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if sign in file.read_text(encoding="utf-8")
        and BENCHMARKS not in file.relative_to(ROOT).parts
    )
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *chosen]
    command += ["--tb=short", "--color=no", "--continue-on-collection-errors", *files]
    log = setting.work / "tests.log"
    ended = _run(command, log, setting.seconds_left)
    text = log.read_text(errors="replace")
    verdicts = verdicts_in(text)
    counts = Counter(verdict for _, verdict in verdicts)
    part.add(
        {
            "kind": "tests",
            "group": kind,
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
        part.note(f"{kind}: cut short by this part's time")
    if not verdicts or counts["FAILED"] or counts["ERROR"]:
        part.set(f"output tail of {kind}", text[-6000:])


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
