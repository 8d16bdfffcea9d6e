"""Triton's older versions, taught what kernels here ask of it.

Knows: Triton's compiler. Does not know: kernels. In 3.6 a comprehension runs over tuples of values
only; newer versions also take constants that are tuples, as kernels have them.
"""

from __future__ import annotations

import ast
from typing import Any

from triton.compiler.code_generator import CodeGenerator
from triton.language import constexpr
from triton.language import tuple as values

_visit = CodeGenerator.visit_ListComp


def _over_constants(self: Any, node: ast.ListComp) -> Any:
    over = node.generators[0]
    constant = self.visit(over.iter) if isinstance(over.iter, ast.Name) else None
    if not isinstance(constant, constexpr) or not isinstance(constant.value, tuple):
        return _visit(self, node)
    assert isinstance(over.target, ast.Name)
    results = []
    for item in constant.value:
        self.set_value(over.target.id, constexpr(item))
        results.append(self.visit(node.elt))
    return values(results)


def teach() -> None:
    """Let comprehensions in kernels run over constants."""
    CodeGenerator.visit_ListComp = _over_constants
