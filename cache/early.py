"""Which experts of a prompt's next layer are begun before that layer's router is asked.

Knows: how many experts the layer at work chose, who is resident, who was used lately. Does not
know: rows, copies (`cache.staging`), clocks.

Between two layers' experts lie attention, a router and a wait for its answer. Unless something is
begun early, the link rests then. Were routers even, (1 - k/E)^T of the experts would go unchosen
by T tokens: with Mixtral's 2 of 8 one in a hundred after 16 tokens. They are not, so it is counted:
the layer at work has just shown how many of its experts this very prompt chooses.

A copy begun early and then needed spares the link at most its own time, one not needed costs as
much, and what is spared ends with the border. Simulated (an RTX 4090 whose link does 26.8 GB/s, a
quarter resident, borders of 1 ms, the second of two prompts of 4 to 512 tokens, popularity 1 /
rank^0.5 and 1 / rank^1.2): with seven of eight chosen prompts take up to 4% less time and 0.7% more
at worst; with half of them 11% more at worst; with all of them Qwen3-30B's uneven routers gain
nothing up to 256 tokens.
"""

from __future__ import annotations

from offload.cache.interface import Cache

RIGHT, OF = 7, 8


def nearly_all(chosen: int, experts: int) -> bool:
    """Whether so many of a layer's experts were `chosen` that the next layer's are begun early."""
    return chosen * OF >= experts * RIGHT


def absent(cache: Cache, layer: int, experts: int) -> list[int]:
    """Of the `experts` of a layer those without a slot, what was used most lately first."""
    without = [expert for expert in range(experts) if not cache.is_resident(layer, expert)]
    return sorted(without, key=lambda expert: -cache.heat.of(layer, expert))
