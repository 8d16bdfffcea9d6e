"""Whether peers run the same model: their distributions and greedy text beside the reference's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from peer_process import Spec, Vector
from peers_running import Load, Peer, PeerError, Run

from offload.quality.check import read_prompts

# The most that a peer may differ from the reference: KL divergence in nats, mean over the prompts.
# It tells a wrong model from few bits, not good bits from better ones: `offload check` does that.
MOST_KL = {"16": 0.02, "8": 0.05, "4": 1.0}


def check(run: Run, tokenizer: Any, load: Load) -> None:
    """Hold every peer's answers against the reference's, transformers' without quantisation.

    A peer that fails, or is another model, is left out. Raises `PeerError` when no reference is
    left.
    """
    texts = read_prompts().texts
    prompts = [tokenizer(text)["input_ids"][: load.prompt // 2] for text in texts]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(chat, add_special_tokens=False)["input_ids"]
    hold_against_reference(run, [*prompts, asked], load.greedy, tokenizer.decode)


def hold_against_reference(
    run: Run, prompts: list[list[int]], greedy: int, decode: Callable[[list[int]], str]
) -> None:
    """Distributions after all prompts, and greedy text after the last. Raises `PeerError`."""

    def answers(peer: Peer) -> tuple[Vector, list[int]]:
        return peer.ask("distributions", prompts), peer.ask("greedy", prompts[-1], greedy)

    reference, said = _reference(run, answers)
    for number, peer in enumerate(list(run.peers)):
        try:
            log_p, answer = answers(peer) if number else (reference, said)
            peer.check = compare(reference, log_p, said, answer)
            peer.check["greedy"] = decode(answer)
            kl, most = peer.check["kl_mean"], MOST_KL[_bits(peer.spec)]
            if not kl <= most:
                raise PeerError(f"it is another model: KL divergence {kl:.3f}, {most} is the most")
            print(f"{peer.spec.name}: KL {kl:.4f}, {peer.check['greedy']!r}", file=sys.stderr)
        except PeerError as error:
            run.drop(peer, error)


def _reference(
    run: Run, answers: Callable[[Peer], tuple[Vector, list[int]]]
) -> tuple[Vector, list[int]]:
    """What the first peer answers; when it cannot, the next one of transformers."""
    while run.peers and run.peers[0].spec.kind == "transformers":
        try:
            return answers(run.peers[0])
        except PeerError as error:
            run.drop(run.peers[0], error)
    raise PeerError("transformers does not run here: there is nothing to hold the others against")


def compare(reference: Vector, log_p: Vector, said: list[int], answer: list[int]) -> dict[str, Any]:
    """KL divergence in nats, same top token, same greedy tokens."""
    kl = (np.exp(reference) * (reference - log_p)).sum(axis=-1)  # [N]
    return {
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "same_top": float((log_p.argmax(axis=-1) == reference.argmax(axis=-1)).mean()),
        "greedy_same": sum(a == b for a, b in zip(answer, said, strict=True)) / len(said),
    }


def _bits(spec: Spec) -> str:
    return next(bits for bits in ("16", "8", "4") if bits in spec.bits.replace("BF16", "16"))
