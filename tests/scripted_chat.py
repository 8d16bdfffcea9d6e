"""`python -m tests.scripted_chat MODEL ANSWER...`: a chat whose model says given texts, in turn.

For terminals that a test drives: what is said is known, everything around it is real.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import offload.generation.stream
import offload.loading
from cli import main
from tests.conftest import Script

STEP_SECONDS = float(os.environ.get("STEP_SECONDS", "0.004"))  # a token
LOAD_SECONDS = float(os.environ.get("LOAD_SECONDS", "0"))
DRAWN = os.environ.get("DRAWN", "")  # what loading draws on stderr


def run(model: str, answers: list[str]) -> int:
    script, left, load = Script(), list(answers), offload.loading.load_and_tell

    def slow_load(*arguments: Any, **named: Any) -> Any:
        print("a note", file=sys.stderr)
        time.sleep(LOAD_SECONDS / 2)
        sys.stderr.write(DRAWN)
        time.sleep(LOAD_SECONDS / 2)
        return load(*arguments, **named)

    def begin_answer(step: int) -> None:
        time.sleep(STEP_SECONDS)
        if step == 0:
            script.say(left.pop(0))

    script.at = begin_answer
    offload.loading.load_and_tell = slow_load
    offload.generation.stream.forward = script.forward  # type: ignore[assignment]
    return main(["chat", model, "-n", "400", "--temp", "0", "--no-show-timings"])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
