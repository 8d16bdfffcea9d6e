"""An expert's matrices lie where the layout says, and come back from the record."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.quant.codes import STEP_VALUES, decode_scales, unpack
from offload.quant.hqq import quantize
from offload.quant.matmul import dequantize
from offload.quant.record import (
    ALIGNMENT,
    MatrixSpec,
    RecordLayout,
    fitting_group,
    plan_layout,
    view_record,
)
from offload.quant.scheme import BITS, GROUP_SIZES, Scheme
from tests.quant.records import encode_record

Matrices = dict[str, tuple[Tensor, Tensor | None]]


def expert(specs: tuple[MatrixSpec, ...], seed: int = 0) -> Matrices:
    """Random matrices as `specs` describe them."""
    torch.manual_seed(seed)
    return {
        spec.name: (
            (torch.randn(spec.rows, spec.columns) * 0.05).to(spec.dtype),
            torch.randn(spec.rows).to(spec.dtype) if spec.has_bias else None,
        )
        for spec in specs
    }


def encode(layout: RecordLayout, matrices: Matrices, fill: int = 0) -> Tensor:
    record = torch.full((layout.record_bytes,), fill, dtype=torch.uint8)
    encode_record(record, layout, matrices)
    return record


def two_matrices(dtype: torch.dtype = torch.bfloat16) -> tuple[MatrixSpec, ...]:
    """A gated expert with one bias, whose rows and columns fill neither tiles nor groups evenly."""
    return (
        MatrixSpec("gate_up_proj", 80, 96, True, dtype),
        MatrixSpec("down_proj", 96, 48, False, dtype),
    )


specs = st.lists(
    st.tuples(
        st.integers(1, 150),
        st.integers(1, 60).map(lambda n: 2 * n) | st.integers(1, 8).map(lambda n: 16 * n),
        st.booleans(),
        st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    ),
    min_size=1,
    max_size=4,
).map(lambda parts: tuple(MatrixSpec(f"m{i}", *part) for i, part in enumerate(parts)))


@settings(max_examples=80)
@given(
    specs=specs,
    scheme=st.builds(
        Scheme, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.sampled_from((8, 16))
    ),
)
def test_parts_are_aligned_apart_and_inside_the_record(
    specs: tuple[MatrixSpec, ...], scheme: Scheme
) -> None:
    layout = plan_layout(specs, scheme)
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    start = record.data_ptr()
    spans = []
    for spec, view in zip(specs, view_record(record, layout).values(), strict=True):
        quantised = scheme.quantised and spec.columns % 16 == 0
        assert (view.scales is not None) == quantised
        assert (view.steps is not None) == (quantised and scheme.scale_bits == 8)
        assert (view.bias is not None) == spec.has_bias
        for part in (view.weight, view.scales, view.steps, view.bias):
            if part is not None:
                spans.append((part.data_ptr() - start, part.nbytes))
    spans.sort()
    assert all(offset % ALIGNMENT == 0 for offset, _ in spans)
    assert layout.record_bytes % ALIGNMENT == 0
    ends = [offset + size for offset, size in spans]
    assert all(end <= later for end, (later, _) in zip(ends, spans[1:], strict=False))
    assert ends[-1] <= layout.record_bytes < ends[-1] + ALIGNMENT


@settings(max_examples=30)
@given(specs=specs, bits=st.sampled_from(BITS))
def test_layout_survives_json(specs: tuple[MatrixSpec, ...], bits: int) -> None:
    layout = plan_layout(specs, Scheme(bits, 64))
    assert RecordLayout.from_json(json.loads(json.dumps(asdict(layout)))) == layout


@settings(max_examples=60)
@given(columns=st.integers(1, 5000), group_size=st.sampled_from((16, 32, 64, 128, 256)))
def test_fitting_group_is_the_largest_halving_that_divides(columns: int, group_size: int) -> None:
    group = fitting_group(columns, group_size)
    if not group:
        assert columns % 16
        return
    assert group >= 16
    assert columns % group == 0
    assert group_size % group == 0
    assert group == group_size or columns % (2 * group)


@pytest.mark.parametrize("bits", BITS[:-1])
def test_quantised_matrices_and_biases_come_back(bits: int) -> None:
    specs = two_matrices()
    matrices = expert(specs)
    layout = plan_layout(specs, Scheme(bits, 64))
    views = view_record(encode(layout, matrices), layout)
    assert list(views) == ["gate_up_proj", "down_proj"]
    for name, (weight, bias) in matrices.items():
        view = views[name]
        assert view.scales is not None
        solved = quantize(weight, bits, view.layout.group_size)
        rows = len(weight)
        assert torch.equal(unpack(view.weight, bits)[:rows], solved.codes)
        assert torch.equal(view.scales[:, :rows, 0], solved.scale.t().bfloat16())
        assert torch.equal(view.scales[:, :rows, 1], solved.offset.t().bfloat16())
        assert (view.bias is None) == (bias is None)
        if bias is not None and view.bias is not None:
            assert torch.equal(view.bias, bias)
        # Half a step, plus the error of rounding scale and offset to 8 significant bits.
        step = solved.scale.amax()
        error = (dequantize(view, torch.float32) - weight.float()).abs().amax()
        assert error < step * (0.55 + 2 ** (bits - 1) / 256)


def test_scales_that_are_quantised_come_back_within_half_a_step() -> None:
    specs = (MatrixSpec("m", 80, 512, False, torch.bfloat16),)
    matrices = expert(specs)
    layout = plan_layout(specs, Scheme(2, 16, 8))
    view = view_record(encode(layout, matrices), layout)["m"]
    assert view.scales is not None
    assert view.steps is not None
    assert view.scales.shape == (32, 128, 2)
    assert view.scales.dtype == torch.uint8
    assert view.steps.shape == (1, 128, STEP_VALUES)
    solved = quantize(matrices["m"][0], 2, 16)
    pairs = torch.stack((solved.scale.t(), solved.offset.t()), dim=-1)
    error = (decode_scales(view.scales, view.steps)[:, :80] - pairs).abs()
    step = view.steps[:, :80, ::2].float()
    assert (error <= 2 * step).all()  # bfloat16 may cut the step short, so that the ends clip
    assert (error <= step * 0.51).float().mean() > 0.9


def test_weights_of_two_bits_with_quantised_scales_take_three_bits_each() -> None:
    """It is mixtral-offloading's preset at Mixtral's shape: 2 + (8 + 8) / 16 bits, and steps."""
    specs = (MatrixSpec("m", 4096, 14336, False, torch.bfloat16),)
    size = plan_layout(specs, Scheme(2, 16, 8)).record_bytes
    assert 3.0 < size * 8 / (4096 * 14336) < 3.03


def test_groups_shrink_to_fit_a_matrix_of_their_own() -> None:
    layout = plan_layout(two_matrices(), Scheme(4, 64))
    assert [matrix.group_size for matrix in layout.matrices] == [32, 16]


def test_a_matrix_that_no_group_divides_is_stored_as_it_is() -> None:
    """Scales of groups of four columns would take more bytes than the weights."""
    specs = (MatrixSpec("m", 80, 100, False, torch.bfloat16),)
    (matrix,) = plan_layout(specs, Scheme(4, 64)).matrices
    assert (matrix.bits, matrix.group_size, matrix.scale_offset) == (16, 0, -1)
    weight, _ = (matrices := expert(specs))["m"]
    layout = plan_layout(specs, Scheme(4, 64))
    assert torch.equal(view_record(encode(layout, matrices), layout)["m"].weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unquantised_values_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    specs = two_matrices(dtype)
    matrices = expert(specs)
    layout = plan_layout(specs, Scheme(16, 64))
    for name, view in view_record(encode(layout, matrices), layout).items():
        weight, bias = matrices[name]
        assert view.weight.dtype == dtype
        assert torch.equal(view.weight, weight)
        assert torch.equal(dequantize(view, dtype), weight)
        assert view.scales is None
        assert (view.bias is None and bias is None) or torch.equal(view.bias, bias)


def test_passthrough_keeps_subnormals_and_signed_zeros() -> None:
    spec = (MatrixSpec("m", 1, 4, False, torch.float32),)
    weight = torch.tensor([[-0.0, 1e-42, 3.4e38, -1e-45]])
    layout = plan_layout(spec, Scheme(16, 64))
    stored = view_record(encode(layout, {"m": (weight, None)}), layout)["m"].weight
    assert torch.equal(stored.view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("bits", BITS)
def test_equal_experts_are_equal_bytes_whatever_lay_in_the_buffer(bits: int) -> None:
    specs = two_matrices()
    layout = plan_layout(specs, Scheme(bits, 64))
    matrices = expert(specs)
    assert torch.equal(encode(layout, matrices, fill=0), encode(layout, matrices, fill=0xAB))


@pytest.mark.parametrize("bits", BITS)
def test_memory_layout_of_the_weights_does_not_show(bits: int) -> None:
    specs = two_matrices()
    layout = plan_layout(specs, Scheme(bits, 64))
    matrices = expert(specs)
    turned: Matrices = {n: (w.t().contiguous().t(), b) for n, (w, b) in matrices.items()}
    assert torch.equal(encode(layout, turned), encode(layout, matrices))


@pytest.mark.parametrize("bits", BITS[:-1])
def test_padding_rows_stand_for_zero(bits: int) -> None:
    specs = (MatrixSpec("m", 70, 64, False, torch.bfloat16),)
    layout = plan_layout(specs, Scheme(bits, 64))
    view = view_record(encode(layout, expert(specs), fill=0xFF), layout)["m"]
    assert view.layout.stored_rows == 128
    assert view.weight.shape == (2, 64 * bits * 8)
    assert not unpack(view.weight, bits)[70:].any()
    assert view.scales is not None
    assert not view.scales[:, 70:].any()
    assert dequantize(view, torch.float32).shape == (70, 64)


def test_view_copies_nothing() -> None:
    layout = plan_layout(two_matrices(), Scheme(4, 64))
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    views = view_record(record, layout)
    record.fill_(1)
    for view in views.values():
        assert (view.weight == 1).all()


def test_record_in_a_larger_slot_is_viewed_alike() -> None:
    specs = two_matrices()
    layout = plan_layout(specs, Scheme(4, 64))
    record = encode(layout, expert(specs))
    slot = torch.cat((record, torch.full((512,), 7, dtype=torch.uint8)))
    for name, view in view_record(slot, layout).items():
        assert torch.equal(
            dequantize(view, torch.float32),
            dequantize(view_record(record, layout)[name], torch.float32),
        )


@pytest.mark.parametrize("bits", BITS[:-1])
@pytest.mark.parametrize("value", [0.01, 0.3, -0.7])
def test_group_of_equal_weights_comes_back(bits: int, value: float) -> None:
    """Plain rounding makes no error for such groups."""
    specs = (MatrixSpec("m", 2, 64, False, torch.float32),)
    layout = plan_layout(specs, Scheme(bits, 64))
    record = encode(layout, {"m": (torch.full((2, 64), value), None)})
    restored = dequantize(view_record(record, layout)["m"], torch.float32)
    assert restored[0, 0].item() == pytest.approx(value, rel=0.01)
