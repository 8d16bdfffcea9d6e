"""The lm-eval harness runs our models unchanged, on a task made from a local file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from offload import load

pytest.importorskip(
    "lm_eval", reason="lm-eval is not here: pip install -e '.[eval]' (600 MB) runs these tests too"
)

QUESTIONS = [
    {"question": "Water is", "choices": [" wet", " dry", " loud"], "answer": 0},
    {"question": "Two and two are", "choices": [" five", " four"], "answer": 1},
    {"question": "שלום", "choices": [" עולם", " world"], "answer": 0},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWER = """
task: local_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: bypass, aggregation: bypass, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A task manager that knows two tasks over a file of questions."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text.format(file=file, cache=folder / "cache"))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(
    tasks: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, task: str
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found: dict[str, Any] = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=128),
        tasks=[task],
        task_manager=tasks,
        bootstrap_iters=0,
    )
    return found


def likelihoods(found: dict[str, Any]) -> list[float]:
    samples = found["samples"]["local_choice"]
    return [pair[0] for sample in samples for pair in sample["filtered_resps"]]


def test_a_choice_scores_as_with_transformers_alone(tasks: Any, mixtral: Path) -> None:
    model, tokenizer = load(mixtral, device="cpu", expert_bits=16, expert_slots=3)
    found = evaluate(tasks, model, tokenizer, "local_choice")
    model.offload.close()
    plain = evaluate(
        tasks, AutoModelForCausalLM.from_pretrained(mixtral), tokenizer, "local_choice"
    )
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(
        plain["results"]["local_choice"]["acc,none"]
    )
    assert likelihoods(found) == pytest.approx(likelihoods(plain), abs=1e-3)
    assert all(math.isfinite(value) for value in likelihoods(found))


def test_scores_do_not_depend_on_what_is_resident(tasks: Any, mixtral_pack: Path) -> None:
    scores = []
    for slots in (1, 24):
        model, tokenizer = load(mixtral_pack, device="cpu", expert_slots=slots)
        scores.append(likelihoods(evaluate(tasks, model, tokenizer, "local_choice")))
        model.offload.close()
    assert scores[0] == scores[1]


def test_an_answer_is_generated(tasks: Any, mixtral_pack: Path) -> None:
    model, tokenizer = load(mixtral_pack, device="cpu", expert_slots=6)
    found = evaluate(tasks, model, tokenizer, "local_answer")
    model.offload.close()
    samples = found["samples"]["local_answer"]
    assert len(samples) == len(QUESTIONS)
    assert all(isinstance(sample["filtered_resps"][0], str) for sample in samples)
