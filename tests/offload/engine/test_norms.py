"""The norm that feeds a router is found, and no other norm is taken for it."""

from __future__ import annotations

import torch
from torch import nn

from offload.engine.layer import NormFinder


def _block() -> nn.Module:
    return nn.ModuleDict({"q_norm": nn.RMSNorm(8), "post_norm": nn.RMSNorm(8)})


def test_the_norm_whose_output_the_router_is_asked_about_is_found() -> None:
    block = _block()
    finder = NormFinder(block)
    block["q_norm"](torch.randn(4, 8))
    hidden = block["post_norm"](torch.randn(4, 8))
    finder.asked(hidden.view(-1, 8))
    assert finder.norm is block["post_norm"]


def test_no_other_tensor_takes_the_place_of_a_norms_output() -> None:
    """An allocator often gives freed memory to the next tensor of the same size."""
    for _ in range(20):
        block = _block()
        finder = NormFinder(block)
        place = block["q_norm"](torch.randn(2**14, 8)).data_ptr()
        other = torch.zeros(2**14, 8)
        assert other.data_ptr() != place
        finder.asked(other)
        assert finder.norm is None
