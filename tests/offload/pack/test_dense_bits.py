"""Weights outside the experts in few bits give the right logits for every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from offload.budget.budget import Memory, kv_cache_bytes, workspace_bytes
from offload.budget.resolve import Place, Resolver
from offload.engine.handle import offload_of
from offload.errors import BudgetError
from offload.generation.batch import generate
from offload.model.seam import QuantizedEmbedding, QuantizedLinear, find_experts
from offload.options import LoadOptions
from offload.pack.describe import dense_matrices
from offload.pack.find import find_or_make_pack
from offload.pack.recipe import PRESETS
from offload.quant.pack import Pack, PackInfo
from tests.offload.engine.test_parity import NAMED, OTHERS
from tests.tiny import EXPERTS, K, save_tiny

TOLERANCE = 5e-5  # of logits of magnitude 2 to 4: kernels add up in another order than `linear`
EVERYTHING = "experts=16,dense=4,embeddings=4"


def load(folder: Path, bits: str) -> PreTrainedModel:
    model, _ = offload.load(
        folder / "checkpoint", device="cpu", dtype=torch.float32, bits=bits, pack_dir=folder
    )
    return model


def made(folder: Path, bits: str) -> PackInfo:
    """Describes the pack made of the checkpoint in `folder`."""
    path = find_or_make_pack(str(folder / "checkpoint"), LoadOptions(bits=bits, pack_dir=folder))
    return Pack(path).info


@torch.inference_mode()
def run(model: PreTrainedModel) -> Tensor:
    """Logits of a prefill and a decode step."""
    prompt = torch.randint(3, 120, (1, 13), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=prompt, use_cache=True)
    step = model(input_ids=prompt[:, :1], cache=out.cache, use_cache=True)
    return torch.cat((out.logits, step.logits), dim=1)


def quantised(model: PreTrainedModel) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("model_type", [*NAMED, *OTHERS])
def test_logits_are_those_of_the_model_with_rounded_weights(
    model_type: str, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path / "checkpoint")
    ours = load(tmp_path, EVERYTHING)
    modules = quantised(ours)
    assert len(modules) > 3
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    before = run(reference)
    with torch.no_grad():
        for name, module in modules.items():
            reference.get_submodule(name).weight.copy_(module.weight)
    difference = float((run(ours) - run(reference)).abs().max())
    assert difference < TOLERANCE
    assert not torch.allclose(before, run(reference), atol=1e-3), "nothing was rounded"
    offload_of(ours).close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_tied_to_the_table_shares_its_record(tied: bool, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint", tie_word_embeddings=tied)
    model = load(tmp_path, "experts=4,head=6")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, QuantizedLinear)
    assert isinstance(table, QuantizedEmbedding) == tied
    if tied:
        assert table.view.weight.data_ptr() == head.view.weight.data_ptr()
    (record,) = offload_of(model).pack.info.dense
    assert len(record.modules) == 1 + tied
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert ids.shape == (1, 7)
    offload_of(model).close()


def test_each_part_is_found_and_routers_and_norms_are_left(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "checkpoint")
    found = dense_matrices(model, find_experts(model))
    parts = {matrix.modules[0]: matrix.parts[0] for matrix in found}
    assert parts["model.layers.1.self_attn.q_proj"] == "attention"
    assert parts["model.layers.1.mlp.shared_expert.up_proj"] == "shared"
    assert parts["model.layers.0.mlp.gate_proj"] == "mlp"  # the layer without experts
    assert parts["lm_head"] == "head"
    assert parts["model.embed_tokens"] == "embeddings"
    kept = {name for name, _ in model.named_parameters()} - {m.parameter for m in found}
    assert all(
        "norm" in name or "experts" in name or name.endswith((".bias", ".gate.weight"))
        or "shared_expert_gate" in name
        for name in kept
    ), kept  # fmt: skip


def test_rules_reach_single_layers(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    rules = "experts=3g32,attention=8g32,layers.1-2.experts=5g32,layers.0.attention=16"
    info = made(tmp_path, rules)
    assert [info.layout_of(layer).matrices[0].bits for layer in range(3)] == [3, 5, 5]
    layers = {module.split(".")[2] for dense in info.dense for module in dense.modules}
    assert layers == {"1", "2"}
    assert {m.bits for layout in info.dense_layouts for m in layout.matrices} == {8}


@pytest.mark.parametrize("bits", [*PRESETS, "experts=2g16s8"])
def test_every_preset_runs_with_few_experts_resident(bits: str, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint", dtype=torch.bfloat16)
    logits = []
    for slots in (1, K, None):
        model, _ = offload.load(
            tmp_path / "checkpoint", device="cpu", bits=bits, expert_slots=slots, pack_dir=tmp_path
        )
        logits.append(run(model))
        offload_of(model).close()
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_fewer_bits_make_smaller_packs_and_are_budgeted(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint", hidden_size=256, intermediate_size=256)
    sizes = []
    for bits in ("experts=16", "q8", "q6", "q5", "q4", "q3", "q2", "experts=2,dense=2"):
        info = made(tmp_path, bits)
        sizes.append(info.expert_bytes + info.dense_bytes(4))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 5


@pytest.mark.parametrize("preset", ["q8", "q5", "q2"])
def test_fit_takes_the_most_bits_that_are_all_resident(preset: str, tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "checkpoint", hidden_size=256, intermediate_size=256)
    info = made(tmp_path, preset)
    needed = (
        info.expert_bytes
        + info.dense_bytes(4)
        + workspace_bytes(model.config, info, 64, 64, torch.float32)
    )
    needed += sum(kv_cache_bytes(model.config, 64, torch.float32))
    packs = tmp_path / "fitting"
    ours, _ = offload.load(
        tmp_path / "checkpoint", device="cpu", bits="fit", ram=needed, context=64, pack_dir=packs
    )
    handle = offload_of(ours)
    assert handle.pack.info.bits == info.bits
    assert handle.fit.slots == EXPERTS * 3
    handle.close()
    more = {"ram": needed * 10, "context": 64, "pack_dir": packs}
    ours, _ = offload.load(tmp_path / "checkpoint", device="cpu", bits="fit", **more)
    assert offload_of(ours).pack.info.bits == info.bits, "what was made is used while it fits"
    offload_of(ours).close()


def test_fit_streams_the_fewest_bits_where_none_are_all_resident(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_tiny("mixtral", tmp_path / "checkpoint", hidden_size=256, intermediate_size=256)
    info = made(tmp_path, "q2")
    needed = info.dense_bytes(4) + workspace_bytes(model.config, info, 64, 64, torch.float32)
    needed += sum(kv_cache_bytes(model.config, 64, torch.float32)) + 3 * info.slot_bytes
    ours, _ = offload.load(
        tmp_path / "checkpoint", device="cpu", bits="fit", ram=needed, context=64, pack_dir=tmp_path
    )
    handle = offload_of(ours)
    assert handle.pack.info.bits == info.bits
    assert handle.fit.slots == 3
    assert "even q2 does not fit" in caplog.text
    handle.close()


def test_fit_does_not_get_around_the_budget(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    folder = str(tmp_path / "checkpoint")
    options = LoadOptions(bits="fit", pack_dir=tmp_path / "new")
    resolver = Resolver(options, Place(torch.device("cpu"), Memory(1, 1)))
    with pytest.raises(BudgetError):  # not one slot fits: told before anything is made
        find_or_make_pack(folder, options, resolver=resolver)
    assert not list((tmp_path / "new").glob("*"))


@pytest.mark.parametrize("token", [-1, 128])
def test_a_token_that_is_not_in_the_table_is_an_error(token: int, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = load(tmp_path, "embeddings=4")
    with pytest.raises(IndexError, match=str(token)):
        model(input_ids=torch.tensor([[5, token]]))
    offload_of(model).close()


def test_code_that_asks_a_layer_for_its_weight_gets_it(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = load(tmp_path, "experts=4,attention=8")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight), layer(x))
    offload_of(model).close()


def test_a_model_with_all_parts_in_few_bits_answers(mixtral: Path, tmp_path: Path) -> None:
    model, tokenizer = offload.load(mixtral, device="cpu", bits="q4", pack_dir=tmp_path)
    assert generate(model, tokenizer, "abc", max_new_tokens=5)
    offload_of(model).close()
