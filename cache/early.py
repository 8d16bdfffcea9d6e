"""Which experts of a prompt's next layer are begun before that layer's router is asked.

Between two layers' experts lie attention, a router and a wait for its answer; the PCIe port rests
meanwhile unless copies were begun early. Were routers even, T tokens would leave (1 - k/E)^T of the
experts unchosen: with Mixtral's 2 of 8 one in a hundred after 16 tokens. Routers are not even, so
the choices are counted: the layer at work has just shown how many of its experts this very prompt
chooses.

An early copy that is needed saves at most its own time; one that is not needed costs as much. This
was simulated for an RTX 4090 whose port does 26.8 GB/s, with a quarter of the experts resident,
1 ms between layers and the second of two prompts of 4 to 512 tokens (popularity 1 / rank^0.5 and
1 / rank^1.2). If copies begin early once seven of eight experts were chosen, prompts take up to 4%
less time and at worst 0.7% more. With half of the experts as the limit they take 11% more at worst;
with all of them Qwen3-30B's uneven routers gain nothing up to 256 tokens.
"""

from __future__ import annotations

from offload.cache.interface import Cache

RIGHT, OF = 7, 8


def nearly_all(chosen: int, experts: int) -> bool:
    """Whether enough of a layer's `experts` were `chosen` to begin the next layer's early."""
    return chosen * OF >= experts * RIGHT


def absent(cache: Cache, layer: int, experts: int) -> list[int]:
    """Those of a layer's `experts` (a number) that have no slot, the hottest first."""
    without = [expert for expert in range(experts) if not cache.is_resident(layer, expert)]
    return sorted(without, key=lambda expert: -cache.heat.of(layer, expert))
