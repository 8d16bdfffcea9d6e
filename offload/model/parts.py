"""Finds the weights outside the experts that can be quantised, and the part each belongs to.

Routers, norms, convolutions and matrices smaller than a tile are always kept as stored: they take
little memory, and an error in a router would change which experts are chosen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from offload.model.seam import ExpertsModule, find_router

SMALLEST = 32  # rows and columns that a matrix needs at least to be worth quantising
_LAYER = re.compile(r"(.*?)\.(\d+)\.")  # "model.layers" and the index
_MIXES_TOKENS = re.compile(r"attn|attention|mamba|mixer|conv|recurrent|temporal")
_ROUTES = re.compile(r"(^|\.)(gate|router)(\.|$)")


@dataclass(frozen=True)
class DenseMatrix:
    """A weight [rows, columns] that is not an expert's.

    There is one module and one part, or two of each for a token table that is also the head.
    """

    modules: tuple[str, ...]  # paths of the modules that use it
    parts: tuple[str, ...]  # names in `offload.pack.recipe.PARTS`
    layer: int | None  # of the decoder; None for a weight outside of it
    rows: int
    columns: int

    @property
    def parameter(self) -> str:
        return f"{self.modules[0]}.weight"


def layer_of(path: str) -> int | None:
    """The decoder layer of the module at `path`; None for a module outside of all layers."""
    match = _LAYER.match(path)
    return int(match[2]) if match else None


def dense_matrices(model: PreTrainedModel, experts: Sequence[ExpertsModule]) -> list[DenseMatrix]:
    """The matrices outside the experts that may be quantised, in the model's order."""
    decoders = {match[1] for module in experts if (match := _LAYER.match(module.path))}
    routers = {
        id(part)
        for module in experts
        if (router := find_router(model, module.path, module.num_experts)) is not None
        for part in router.modules()
    }
    found = []
    for path, module in model.named_modules():
        match = _LAYER.match(path)
        if type(module) is not nn.Linear or id(module) in routers or not match:
            continue
        inside = path[match.end() :]
        if match[1] in decoders and not _ROUTES.search(inside):
            rows, columns = module.weight.shape
            found.append(DenseMatrix((path,), (_part(inside),), int(match[2]), rows, columns))
    found += _outside_layers(model)
    return [matrix for matrix in found if min(matrix.rows, matrix.columns) >= SMALLEST]


def _part(path: str) -> str:
    """The part of a linear layer, told by its path inside the decoder layer."""
    if "shared" in path:
        return "shared"
    return "attention" if _MIXES_TOKENS.search(path) else "mlp"


def _outside_layers(model: PreTrainedModel) -> list[DenseMatrix]:
    """The token table and the head; one matrix when the head is tied to the table."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): path for path, module in model.named_modules()}
    tied = {name.rpartition(".")[0] for name in model.all_tied_weights_keys}
    head_is_tied = head is not None and names[id(head)] in tied
    found = []
    if type(table) is nn.Embedding:  # not a subclass, which may scale the rows it returns
        modules: tuple[str, ...] = (names[id(table)],)
        parts: tuple[str, ...] = ("embeddings",)
        if head_is_tied:
            modules, parts = (*modules, names[id(head)]), (*parts, "head")
        found.append(DenseMatrix(modules, parts, None, *table.weight.shape))
    if type(head) is nn.Linear and not head_is_tied:
        found.append(DenseMatrix((names[id(head)],), ("head",), None, *head.weight.shape))
    return found
