"""`python -m tests.scripted_chat MODEL ANSWER...`: a chat whose model says given texts, in turn.

For terminals that a test drives: what is said is known, everything around it is real.
"""

from __future__ import annotations

import sys
import time

import offload.generation.stream
from cli import main
from tests.conftest import Script

STEP_SECONDS = 0.004  # a token


def run(model: str, answers: list[str]) -> int:
    script, left = Script(), list(answers)

    def begin_answer(step: int) -> None:
        time.sleep(STEP_SECONDS)
        if step == 0:
            script.say(left.pop(0))

    script.at = begin_answer
    offload.generation.stream.forward = script.forward  # type: ignore[assignment]
    return main(["chat", model, "-n", "400", "--temp", "0", "--no-show-timings"])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
