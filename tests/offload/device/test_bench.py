"""The bench times the decode loop that users get."""

from __future__ import annotations

import pytest

from offload.benching.sample import take_sample
from offload.benching.tests import Test
from offload.device.loop import DecodeLoop
from tests.offload.device.conftest import Load


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("test", [Test(0, 3), Test(4, 2), Test(0, 2, n_depth=5)])
def test_a_bench_decodes_as_answers_do(
    test: Test, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, run = [], DecodeLoop.run
    monkeypatch.setattr(DecodeLoop, "run", lambda loop: (steps.append(1), run(loop))[1])
    sample = take_sample(load("mixtral", "device"), test, list(range(5, 30)))
    assert len(sample.token_ns) == len(steps) == test.n_gen
    assert sample.experts.counts.requests > 0
    assert bool(sample.prompt_ns) == bool(test.n_prompt)
