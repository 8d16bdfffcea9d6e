"""The bench times the decode loop that users get."""

from __future__ import annotations

import pytest

from benchmarks.cuda_check.seam import queued_ahead
from offload.bench.row import Test
from offload.bench.run import take_sample
from offload.engine.handle import offload_of
from offload.generation.decode import DecodeLoop
from offload.generation.stream import stream_generate
from tests.offload.engine.device.conftest import Load

pytestmark = pytest.mark.usefixtures("quick")


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


def test_the_check_of_a_gpu_machine_knows_what_is_queued_ahead(load: Load) -> None:
    handle = offload_of(model := load("mixtral", "device", expert_slots=12))
    assert queued_ahead(handle) == 0
    steps = stream_generate(model, None, list(range(5, 17)), max_new_tokens=4, temperature=0.0)
    ahead = [queued_ahead(handle) for _ in steps]
    assert ahead == [1, 1, 1, 0]  # after the last token there is none to queue
    handle.decoding = None
    assert queued_ahead(handle) == 0
