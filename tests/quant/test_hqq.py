"""hqq's solver is called as intended, and its results are good."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from offload.quant.hqq import Quantized, quantize


def restore(solved: Quantized, bits: int) -> Tensor:
    """The matrix [N, K] that the codes stand for, by the formula that `Quantized` documents."""
    group = solved.codes.shape[1] // solved.scale.shape[1]
    scale = solved.scale.repeat_interleave(group, dim=1)  # [N, K]
    offset = solved.offset.repeat_interleave(group, dim=1)  # [N, K]
    return (solved.codes.float() - 2 ** (bits - 1)) * scale + offset


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Round each group between its smallest and largest weight."""
    groups = weight.view(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((groups - low) / step).round() * step + low).view_as(weight)


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(rows, columns) * 0.05


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.distributions.StudentT(3.0).sample((rows, columns)) * 0.05


def mean_error(weight: Tensor, bits: int, group_size: int) -> float:
    return (restore(quantize(weight, bits, group_size), bits) - weight).abs().mean().item()


@pytest.mark.parametrize("make", [normal, heavy_tailed])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 64, 128])
def test_errs_less_than_plain_rounding(
    make: Callable[[int, int], Tensor], bits: int, group_size: int
) -> None:
    weight = make(64, 256)
    solved = restore(quantize(weight, bits, group_size), bits)
    plain = round_to_nearest(weight, bits, group_size)
    assert (solved - weight).abs().mean() < (plain - weight).abs().mean()
    assert (solved - weight).norm() < (plain - weight).norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_further_off_than_a_step(bits: int) -> None:
    weight = heavy_tailed(64, 256)
    solved = quantize(weight, bits, 64)
    error = (restore(solved, bits) - weight).abs().view(64, -1, 64).amax(-1)
    assert (error <= solved.scale).all()


def test_smaller_groups_err_less() -> None:
    weight = heavy_tailed(64, 256)
    errors = [mean_error(weight, 4, group_size) for group_size in (16, 32, 64, 128, 256)]
    assert errors == sorted(errors)
    assert errors[0] < 0.75 * errors[-1]


def test_8_bits_err_a_tenth_of_4_bits_or_less() -> None:
    weight = normal(64, 256)
    assert mean_error(weight, 8, 64) < 0.1 * mean_error(weight, 4, 64)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_scales_and_offsets_have_the_promised_shapes(bits: int) -> None:
    solved = quantize(normal(5, 96), bits, 32)
    assert solved.codes.shape == (5, 96)
    assert solved.codes.dtype == torch.uint8
    assert int(solved.codes.max()) < 2**bits
    for part in (solved.scale, solved.offset):
        assert part.shape == (5, 3)
        assert part.dtype == torch.float32
        assert part.isfinite().all()
    assert (solved.scale > 0).all()


@pytest.mark.parametrize(("columns", "rows_of_a_block"), [(1024, 64), (2048, 32)])
def test_blocks_of_rows_are_solved_alone(columns: int, rows_of_a_block: int) -> None:
    weight = heavy_tailed(2 * rows_of_a_block + 3, columns)
    whole = quantize(weight, 4, 64)
    for start in range(0, len(weight), rows_of_a_block):
        rows = slice(start, start + rows_of_a_block)
        for part, of_whole in zip(quantize(weight[rows], 4, 64), whole, strict=True):
            assert torch.equal(part, of_whole[rows])


def test_result_does_not_follow_the_number_of_threads() -> None:
    """A pack made on one machine must be the pack made on another."""
    for seed in (4, 14, 21):
        weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(seed))
        solved = []
        for threads in (1, 2):
            torch.set_num_threads(threads)  # the fixture puts it back
            solved.append(quantize(weight, 4, 64))
        for one, two in zip(*solved, strict=True):
            assert torch.equal(one, two)


def test_quantising_twice_gives_the_same_and_leaves_the_weights_alone() -> None:
    weight = normal(32, 128)
    before = weight.clone()
    for one, two in zip(quantize(weight, 4, 64), quantize(weight, 4, 64), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("columns", [64, 128])  # a group is a whole row, or half of one
def test_dtype_and_memory_layout_of_the_weights_do_not_matter(columns: int) -> None:
    weight = normal(192, columns).bfloat16()
    plain = quantize(weight.float(), 4, 64)
    for same in (weight, weight.t().contiguous().t()):
        for one, two in zip(quantize(same, 4, 64), plain, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zero(bits: int) -> None:
    assert torch.equal(restore(quantize(torch.zeros(3, 64), bits, 32), bits), torch.zeros(3, 64))


def test_group_that_does_not_divide_the_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="64 does not divide 96"):
        quantize(normal(4, 96), 4, 64)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_small_weights_lose_no_more_than_large_ones(bits: int, spread: float) -> None:
    """With hqq's smallest step, 8 bits would be no better than 5 for weights of 0.001."""
    torch.manual_seed(bits)
    weight = torch.randn(32, 256) * spread
    codes, scale, offset = quantize(weight, bits, 64)
    groups = (codes.view(32, 4, 64).float() - 2 ** (bits - 1)) * scale.unsqueeze(-1)
    error = (groups + offset.unsqueeze(-1)).view(32, 256) - weight
    low, high = weight.view(32, 4, 64).aminmax(dim=-1)
    step = (high - low) / (2**bits - 1)
    plain = step.square().mean().div(12).sqrt()  # of uniform rounding errors
    assert error.square().mean().sqrt() < 1.35 * plain
