"""What deciding costs: processor microseconds of `ExpertCache.decide` a layer, for every policy.

The model has 48 layers of 128 experts, top-8, and a quarter of them is resident. The choices repeat
as those of real models do: each layer prefers some experts (Zipf) and keeps a part of the choice
that it made for the token before.

    python benchmarks/planning.py [--tokens 300]
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median

from offload.cache.cache import ExpertCache
from offload.cache.trace.replay import REPLAYED

LAYERS, EXPERTS, TOP_K = 48, 128, 8
KEPT = 0.45  # share of a choice that repeats the token before


def choices(tokens: int, seed: int = 0) -> list[list[list[int]]]:
    """[token][layer] -> distinct experts."""
    chooser = random.Random(seed)
    weights = [1 / (rank + 3) for rank in range(EXPERTS)]
    orders = [chooser.sample(range(EXPERTS), EXPERTS) for _ in range(LAYERS)]
    last: list[list[int]] = [[] for _ in range(LAYERS)]
    found = []
    for _ in range(tokens):
        for layer in range(LAYERS):
            chosen = [expert for expert in last[layer] if chooser.random() < KEPT]
            while len(chosen) < TOP_K:
                (expert,) = chooser.choices(orders[layer], weights)
                if expert not in chosen:
                    chosen.append(expert)
            last[layer] = chosen
        found.append([list(row) for row in last])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300)
    tokens = choices(parser.parse_args().tokens)
    slots = LAYERS * EXPERTS // 4
    print("| policy | us a layer, median token | hits |\n| --- | ---: | ---: |")
    for name, policy in REPLAYED.items():
        cache = ExpertCache(slots, LAYERS, policy)
        seconds = []
        for token in tokens:
            begin = time.thread_time()
            for layer, experts in enumerate(token):
                cache.decide(layer, experts)
            seconds.append((time.thread_time() - begin) / LAYERS)
        cost = median(seconds[len(seconds) // 4 :]) * 1e6
        hits = cache.statistics.total().hit_rate
        print(f"| {name} | {cost:.1f} | {hits:.1%} |", flush=True)


if __name__ == "__main__":
    main()
