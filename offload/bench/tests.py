"""What is measured: llama-bench's tests.

Knows: their names and in which order llama-bench runs them. Does not know: how they are timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Test:
    """Prefill `n_prompt` tokens, then decode `n_gen`, after `n_depth` tokens that are not timed."""

    __test__: ClassVar[bool] = False  # pytest, which looks for this name

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        parts = [f"pp{self.n_prompt}"] if self.n_prompt else []
        parts += [f"tg{self.n_gen}"] if self.n_gen else []
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def tokens(self) -> int:
        return self.n_prompt + self.n_gen

    @property
    def context(self) -> int:
        """Tokens that the KV cache holds at the end."""
        return self.n_depth + self.tokens


def make_tests(
    prompts: Sequence[int],
    gens: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    depths: Sequence[int],
) -> list[Test]:
    """At each depth all prefills, all decodes, then both together; lengths of 0 are left out."""
    return [
        Test(prompt, gen, depth)
        for depth in depths
        for prompt, gen in (*((p, 0) for p in prompts), *((0, n) for n in gens), *pairs)
        if prompt or gen
    ]
