"""Describes the pack that a recipe makes of a checkpoint, before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from offload.errors import UnsupportedModelError
from offload.model.checkpoint import Checkpoint
from offload.model.seam import LAYER, ExpertsModule, find_router, head_is_tied, layer_of
from offload.pack.recipe import Recipe
from offload.quant.pack import PackDense, PackInfo, PackLayer
from offload.quant.record import STORED_DTYPES, MatrixSpec, RecordLayout, plan_layout
from offload.quant.scheme import SMALLEST_GROUP


@dataclass(frozen=True)
class PackSource:
    """The checkpoint that packs are made from."""

    name: str  # the name that people know it by
    fingerprint: str  # changes when the weights change
    checkpoint: Checkpoint
    model: PreTrainedModel  # on meta, with its experts
    experts: list[ExpertsModule]

    def describe(self, recipe: Recipe) -> PackInfo:
        """Everything about a pack that is known before a weight is read. Raises `RecipeError`."""
        places = [layer_of(module.path) for module in self.experts]
        places += [matrix.layer for matrix in self._matrices]
        recipe.check_layers(max((layer for layer in places if layer is not None), default=0))
        layouts: dict[RecordLayout, int] = {}  # each layout once, with its number
        layers = []
        for module, specs in zip(self.experts, self._specs, strict=True):
            layout = plan_layout(specs, recipe.scheme("experts", layer_of(module.path)))
            number = layouts.setdefault(layout, len(layouts))
            layers.append(PackLayer(module.path, module.num_experts, number))
        dense_layouts: dict[RecordLayout, int] = {}
        members = list(self._describe_dense(recipe, dense_layouts))
        return PackInfo(
            self.name,
            self.fingerprint,
            str(recipe),
            self.checkpoint.dense_parameters(),
            tuple(layouts),
            tuple(layers),
            tuple(dense_layouts),
            tuple(sorted(members, key=lambda member: member.file)),
        )

    @cached_property
    def _matrices(self) -> list[DenseMatrix]:
        return dense_matrices(self.model, self.experts)

    @cached_property
    def _specs(self) -> list[tuple[MatrixSpec, ...]]:
        """The matrices of an expert of each module, in the types in which they are stored."""
        return [
            tuple(_as_stored(self.checkpoint, module, spec) for spec in module.matrices)
            for module in self.experts
        ]

    def _describe_dense(
        self, recipe: Recipe, layouts: dict[RecordLayout, int]
    ) -> Iterator[PackDense]:
        """The matrices outside the experts that are quantised; adds their layouts to `layouts`."""
        files: dict[int | str, int] = {}  # decoder layer, or matrix outside them -> number of file
        for matrix in self._matrices:
            schemes = (recipe.scheme(part, matrix.layer) for part in matrix.parts)
            scheme = next((scheme for scheme in schemes if scheme.quantised), None)
            # The checkpoint must have the matrix unchanged, and its columns must make whole groups.
            plain = matrix.parameter in self.checkpoint.plain
            if scheme is None or not plain or matrix.columns % SMALLEST_GROUP:
                continue
            dtype = self.checkpoint.plain_dtype(matrix.parameter)
            if dtype in STORED_DTYPES.values():
                spec = MatrixSpec("weight", matrix.rows, matrix.columns, False, dtype)
                place = matrix.parameter if matrix.layer is None else matrix.layer
                file = files.setdefault(place, len(files))
                layout = layouts.setdefault(plan_layout((spec,), scheme), len(layouts))
                yield PackDense(matrix.modules, layout, file)


def _as_stored(checkpoint: Checkpoint, module: ExpertsModule, spec: MatrixSpec) -> MatrixSpec:
    name = f"{module.path}.{spec.name}"
    dtype = checkpoint.stored_dtype(name)
    bias_dtype = checkpoint.stored_dtype(f"{name}_bias") if spec.has_bias else dtype
    for stored in (dtype, bias_dtype):
        if stored not in STORED_DTYPES.values():
            raise UnsupportedModelError(
                f"the experts are stored as {str(stored).removeprefix('torch.')}, which is not "
                "read yet: use a checkpoint in bfloat16, float16 or float32"
            )
    return replace(spec, dtype=dtype, bias_dtype=bias_dtype)


# Routers, norms, convolutions and small matrices are always kept as stored: they take little
# memory, and an error in a router would change which experts are chosen.
SMALLEST = 32  # rows and columns that a matrix needs at least to be worth quantising
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


def dense_matrices(model: PreTrainedModel, experts: Sequence[ExpertsModule]) -> list[DenseMatrix]:
    """The matrices outside the experts that may be quantised, in the model's order."""
    decoders = {match[1] for module in experts if (match := LAYER.match(module.path))}
    routers = {
        id(part)
        for module in experts
        if (router := find_router(model, module.path, module.num_experts)) is not None
        for part in router.modules()
    }
    found = []
    for path, module in model.named_modules():
        match = LAYER.match(path)
        if type(module) is not nn.Linear or id(module) in routers or not match:
            continue
        inside = path[match.end() :]
        if match[1] in decoders and not _ROUTES.search(inside):
            part = "attention" if _MIXES_TOKENS.search(inside) else "mlp"
            part = "shared" if "shared" in inside else part
            found.append(DenseMatrix((path,), (part,), int(match[2]), *module.weight.shape))
    found += _outside_layers(model)
    return [matrix for matrix in found if min(matrix.rows, matrix.columns) >= SMALLEST]


def _outside_layers(model: PreTrainedModel) -> list[DenseMatrix]:
    """The token table and the head; one matrix when the head is tied to the table."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): path for path, module in model.named_modules()}
    found = []
    if type(table) is nn.Embedding:  # not a subclass, which may scale the rows it returns
        modules: tuple[str, ...] = (names[id(table)],)
        parts: tuple[str, ...] = ("embeddings",)
        if head_is_tied(model):
            modules, parts = (*modules, names[id(head)]), (*parts, "head")
        found.append(DenseMatrix(modules, parts, None, *table.weight.shape))
    if type(head) is nn.Linear and not head_is_tied(model):
        found.append(DenseMatrix((names[id(head)],), ("head",), None, *head.weight.shape))
    return found
