"""A model compared with its reference: figures, damage, vocabularies, and memory."""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from offload import PackError, QualityError, SourceError, load
from offload.options import LoadOptions
from offload.quality.check import (
    BUILT_IN,
    CheckResult,
    ModelLoader,
    Prompts,
    compare_models,
    load_plain,
    read_prompts,
    reference_bits,
)
from offload.quality.comparison import Comparison, Positions, kl_divergence, table
from offload.quality.scoring import Sliding
from tests.conftest import make_tokenizer

PROMPTS = Prompts(("one", "two"), ("The quick brown fox.", "def f(x):\n    return x\n"))
SLIDING = Sliding(16, 8)
CPU = LoadOptions(device="cpu")


def source(path: Path, **options: Any) -> ModelLoader:
    """A loader of the model in `path`, with our experts."""
    return ModelLoader(path.name, lambda: load(path, device="cpu", **options))


def run(model: ModelLoader, reference: ModelLoader) -> CheckResult:
    return compare_models(model, reference, PROMPTS, SLIDING)


def perturbed(checkpoint: Path, folder: Path, amount: float) -> Path:
    """A copy of `checkpoint` with noise of `amount` standard deviations in its experts."""
    shutil.copytree(checkpoint, folder)
    generator = torch.Generator().manual_seed(7)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "experts" in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[name] = tensor + amount * tensor.std() * noise
        save_file(tensors, file, {"format": "pt"})
    return folder


# --- the figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 4])
def test_a_model_does_not_differ_from_itself(bits: int, mixtral: Path, tmp_path: Path) -> None:
    same = source(mixtral, expert_bits=bits, pack_dir=tmp_path)
    result = run(same, source(mixtral, expert_bits=bits, pack_dir=tmp_path, expert_slots=2))
    for comparison in (result.overall, *result.by_prompt):
        assert comparison.kl_mean.value == comparison.kl_max == comparison.kl_p99 == 0
        assert (comparison.top1_agreement.value, comparison.top1_agreement.error) == (1, 0)
        assert (comparison.perplexity_ratio.value, comparison.perplexity_ratio.error) == (1, 0)
        assert comparison.perplexity == comparison.reference_perplexity
    assert result.overall.tokens == sum(len(text) - 1 for text in PROMPTS.texts)
    assert sum(part.tokens for part in result.by_prompt) == result.overall.tokens


def test_unquantised_experts_agree_with_transformers(mixtral: Path, tmp_path: Path) -> None:
    result = run(
        source(mixtral, expert_bits=16, pack_dir=tmp_path),
        ModelLoader("plain", lambda: load_plain(str(mixtral), CPU)),
    )
    assert result.overall.kl_max < 1e-6  # few rows of the head are added in another order
    assert result.overall.top1_agreement.value == 1
    settings = result.reference.settings
    assert replace(result.model, name="plain", settings=settings) == result.reference


def test_figures_agree_with_whole_logits_of_both_models(mixtral: Path, mixtral_pack: Path) -> None:
    """The figures are computed again from whole logits, without windows and slices."""
    result = compare_models(
        source(mixtral_pack),
        ModelLoader("plain", lambda: load_plain(str(mixtral), CPU)),
        PROMPTS,
        Sliding.asked(),
    )
    plain = AutoModelForCausalLM.from_pretrained(mixtral)
    model, _ = load(mixtral_pack, device="cpu")
    kl, same, nll, base_nll = [], [], [], []
    for text in PROMPTS.texts:
        ids = torch.tensor([list(text.encode())])
        with torch.no_grad():
            base = plain(ids).logits[0, :-1].double().log_softmax(-1)
            ours = model(ids).logits[0, :-1].double().log_softmax(-1)
        kl += (base.exp() * (base - ours)).sum(-1).tolist()
        same += (base.argmax(-1) == ours.argmax(-1)).tolist()
        rows = torch.arange(len(base))
        nll += (-ours[rows, ids[0, 1:]]).tolist()
        base_nll += (-base[rows, ids[0, 1:]]).tolist()
    model.offload.close()
    n, found = len(kl), result.overall
    assert found.tokens == n
    assert found.kl_mean.value == pytest.approx(sum(kl) / n, rel=1e-4)
    assert found.kl_max == pytest.approx(max(kl), rel=1e-4)
    assert found.kl_median == pytest.approx(float(torch.tensor(kl).median()), rel=0.1)
    share = sum(same) / n
    assert found.top1_agreement.value == pytest.approx(share)
    assert found.top1_agreement.error == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
    assert found.perplexity.value == pytest.approx(math.exp(sum(nll) / n), rel=1e-5)
    ratio = math.exp((sum(nll) - sum(base_nll)) / n)
    assert found.perplexity_ratio.value == pytest.approx(ratio, rel=1e-5)
    # llama.cpp computes the ratio's error from both variances minus twice the covariance.
    pair = torch.tensor([nll, base_nll], dtype=torch.float64)
    covariance = torch.cov(pair, correction=0) / (n - 1)
    spread = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert found.perplexity_ratio.error == pytest.approx(ratio * math.sqrt(spread), rel=1e-3)


def test_more_damage_gives_a_larger_divergence(
    mixtral: Path, mixtral_pack: Path, tmp_path: Path
) -> None:
    reference = source(mixtral, expert_bits=16, pack_dir=tmp_path / "packs")
    damaged = [perturbed(mixtral, tmp_path / str(amount), amount) for amount in (0.3, 1.0)]
    models = [mixtral_pack, *damaged]
    results = [run(source(path, pack_dir=tmp_path / "packs"), reference) for path in models]
    means = [result.overall.kl_mean.value for result in results]
    assert 0 < means[0] < means[1] < means[2]
    agreements = [result.overall.top1_agreement.value for result in results]
    assert agreements[0] > agreements[2]


def test_kl_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert kl_divergence(p.log(), q.log()).tolist() == pytest.approx([0.5 * math.log(2)])
    assert kl_divergence(q.log(), p.log()).tolist() == [math.inf]  # the divergence is not symmetric
    assert kl_divergence(p.log(), p.log()).tolist() == [0]


def test_percentiles_and_maximum() -> None:
    kl = torch.arange(101, dtype=torch.float64)
    none = torch.zeros(101, dtype=torch.float64)
    found = Comparison.of(Positions(kl, none == 0, none, none))
    assert (found.kl_median, found.kl_p99, found.kl_max) == pytest.approx((50, 99, 100))
    assert found.kl_mean.value == 50


def test_the_table_has_a_row_for_each_prompt_and_the_errors(mixtral_pack: Path) -> None:
    result = run(source(mixtral_pack), source(mixtral_pack))
    lines = table([*result.named(), ("all", result.overall)]).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["prompt", "one", "two", "all"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[-2] == "Same top token: 100.00% ± 0.00%"


# --- one model at a time -------------------------------------------------------------------------


def test_the_two_models_are_never_in_memory_together(mixtral_pack: Path) -> None:
    alive: list[weakref.ref[Any]] = []

    def open_one() -> Any:
        gc_runs = [reference() for reference in alive]
        assert gc_runs == [None] * len(alive), "the model before is still there"
        model, tokenizer = load(mixtral_pack, device="cpu")
        alive.append(weakref.ref(model))
        return model, tokenizer

    compare_models(
        ModelLoader("model", open_one), ModelLoader("reference", open_one), PROMPTS, SLIDING
    )
    assert len(alive) == 2


def test_models_are_closed_when_something_fails(mixtral_pack: Path) -> None:
    opened: list[Any] = []

    def open_one() -> Any:
        opened.append(load(mixtral_pack, device="cpu")[0])
        return opened[-1], None

    with pytest.raises(QualityError, match="no tokenizer"):
        compare_models(ModelLoader("a", open_one), ModelLoader("b", open_one), PROMPTS, SLIDING)
    assert [model.offload.engine.closed for model in opened] == [True]


def test_a_full_disk_is_one_line_of_error(
    mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            gc.collect()

        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(QualityError, match=r"No space left on device.*TMPDIR"):
        run(source(mixtral_pack), source(mixtral_pack))


# --- what cannot be compared ---------------------------------------------------------------------


def test_another_vocabulary_is_refused(mixtral_pack: Path, tmp_path: Path) -> None:
    from tests.tiny import save_tiny

    save_tiny("mixtral", tmp_path / "other", vocab_size=300)
    make_tokenizer().save_pretrained(tmp_path / "other")
    other = source(tmp_path / "other", expert_bits=16, pack_dir=tmp_path)
    with pytest.raises(QualityError, match=r"different vocabularies \(300 and 320 tokens\)"):
        run(other, source(mixtral_pack))


def test_another_tokenizer_of_the_same_size_is_refused(mixtral_pack: Path) -> None:
    def shifted() -> Any:
        model, _ = load(mixtral_pack, device="cpu")
        return model, lambda text, **_: {"input_ids": [byte ^ 1 for byte in text.encode()]}

    with pytest.raises(QualityError, match="different vocabularies"):
        run(ModelLoader("shifted", shifted), source(mixtral_pack))


def test_nan_in_the_model_or_the_reference_is_an_error(mixtral: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(mixtral, broken)
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        tensors["lm_head.weight"][5] = float("nan")
        save_file(tensors, file, {"format": "pt"})

    def plain(path: Path) -> ModelLoader:
        return ModelLoader(path.name, lambda: load_plain(str(path), CPU))

    with pytest.raises(QualityError, match=r"the model's .* is nan"):
        run(plain(broken), plain(mixtral))
    with pytest.raises(QualityError, match=r"the reference's .* is nan"):
        run(plain(mixtral), plain(broken))


def test_a_pack_cannot_be_run_by_transformers_alone(mixtral_pack: Path) -> None:
    with pytest.raises(SourceError, match="--plain"):
        load_plain(str(mixtral_pack), CPU)


def test_a_damaged_expert_is_an_error_and_gives_no_figures(
    mixtral_pack: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(mixtral_pack, copy)
    file = copy / "experts-00001.safetensors"
    data = bytearray(file.read_bytes())
    for at in range(len(data) // 2, len(data) - 64, 97):
        data[at] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(PackError, match="checksum"):
        run(source(copy), source(mixtral_pack))


def test_a_reference_runs_at_16_bits_and_a_pack_at_its_own(
    mixtral: Path, mixtral_pack: Path
) -> None:
    assert reference_bits(str(mixtral)) == "experts=16,dense=16"
    assert reference_bits(str(mixtral_pack)) is None
    assert reference_bits(mixtral_pack.name, mixtral_pack.parent) is None
    assert reference_bits("demo") == "experts=16,dense=16"


# --- prompts -------------------------------------------------------------------------------------


def test_the_built_in_prompts_are_of_several_kinds() -> None:
    prompts = read_prompts()
    assert prompts.names == ("prose", "code", "maths", "dialogue", "hebrew")
    assert "\u05d1\u05d1\u05d5\u05e7\u05e8" in prompts.texts[-1]
    assert prompts == read_prompts(BUILT_IN)


def test_headings_separate_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufefffirst\n--- two words \n\nsecond\n\n--- three\nthird\n---\nstill third\n")
    assert read_prompts(file) == Prompts(
        ("1", "two words", "three"), ("first", "second", "third\n---\nstill third")
    )


WRONG = {"empty": "\n \n", "headings": "--- a\n--- b\n", "twice": "--- a\nx\n--- a\ny\n"}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_a_file_without_usable_prompts_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(QualityError, match=r"holds no prompts|two prompts with the same name"):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(SourceError, match="cannot read"):
        read_prompts(tmp_path / "none.txt")


def test_the_digest_depends_on_names_and_texts() -> None:
    digests = {
        Prompts(names, texts).sha256
        for names, texts in [(("a",), ("bc",)), (("ab",), ("c",)), (("a",), ("bd",))]
    }
    assert len(digests) == 3
