"""Describes the pack that a recipe makes of a checkpoint, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from offload.errors import UnsupportedModelError
from offload.model.checkpoint import Checkpoint
from offload.model.parts import DenseMatrix, dense_matrices, layer_of
from offload.model.seam import ExpertsModule
from offload.pack.recipe import Recipe
from offload.quant.pack import PackDense, PackInfo, PackLayer
from offload.quant.record import STORED_DTYPES, MatrixSpec, RecordLayout, fitting_group, plan_layout


@dataclass(frozen=True)
class PackSource:
    """The checkpoint that a pack is made from."""

    name: str  # as people know it
    fingerprint: str  # changes when the weights change
    folder: Path  # the checkpoint's, or its GGUF file


class Describer:
    """Describes the packs of one checkpoint."""

    def __init__(
        self,
        source: PackSource,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        experts: list[ExpertsModule],
    ) -> None:
        """`model` is on meta and has its experts."""
        self._source = source
        self._checkpoint = checkpoint
        self._experts = experts
        self._dense = dense_matrices(model, experts)

    def describe(self, recipe: Recipe) -> PackInfo:
        """Everything about a pack that is known before a weight is read. Raises `RecipeError`."""
        places = [layer_of(module.path) for module in self._experts]
        places += [matrix.layer for matrix in self._dense]
        recipe.check_layers(max((layer for layer in places if layer is not None), default=0))
        layouts: list[RecordLayout] = []
        layers = []
        for module in self._experts:
            specs = tuple(_as_stored(self._checkpoint, module, spec) for spec in module.matrices)
            layout = plan_layout(specs, recipe.scheme("experts", layer_of(module.path)))
            layers.append(PackLayer(module.path, module.num_experts, _index(layouts, layout)))
        dense_layouts: list[RecordLayout] = []
        members = list(self._describe_dense(recipe, dense_layouts))
        return PackInfo(
            self._source.name,
            self._source.fingerprint,
            str(recipe),
            self._checkpoint.dense_parameters(),
            tuple(layouts),
            tuple(layers),
            tuple(dense_layouts),
            tuple(sorted(members, key=lambda member: member.file)),
        )

    def _describe_dense(self, recipe: Recipe, layouts: list[RecordLayout]) -> Iterator[PackDense]:
        """The matrices outside the experts that are quantised; adds their layouts to `layouts`."""
        files: dict[int | str, int] = {}  # decoder layer, or matrix outside them -> number of file
        for matrix in self._dense:
            schemes = (recipe.scheme(part, matrix.layer) for part in matrix.parts)
            scheme = next((scheme for scheme in schemes if scheme.quantised), None)
            if scheme is not None and _can_be_quantised(self._checkpoint, matrix):
                dtype = self._checkpoint.plain_dtype(matrix.parameter)
                spec = MatrixSpec("weight", matrix.rows, matrix.columns, False, dtype)
                place = matrix.parameter if matrix.layer is None else matrix.layer
                file = files.setdefault(place, len(files))
                layout = _index(layouts, plan_layout((spec,), scheme))
                yield PackDense(matrix.modules, layout, file)


def _index(layouts: list[RecordLayout], layout: RecordLayout) -> int:
    if layout not in layouts:
        layouts.append(layout)
    return layouts.index(layout)


def _can_be_quantised(checkpoint: Checkpoint, matrix: DenseMatrix) -> bool:
    """Whether the checkpoint has the matrix unchanged, and its columns make groups of 16."""
    return (
        matrix.parameter in checkpoint.plain
        and checkpoint.plain_dtype(matrix.parameter) in STORED_DTYPES.values()
        and fitting_group(matrix.columns, 16) == 16
    )


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
