"""Whether peers run the same model: their distributions and greedy text beside the reference's."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from peer_process import Spec, Vector
from peers_running import Load, Peer, PeerError

from offload.quality.prompts import read_prompts

# The most that a peer may differ from the reference: KL divergence in nats, mean over the prompts.
# It tells a wrong model from few bits, not good bits from better ones: `offload check` does that.
MOST_KL = {"16": 0.02, "8": 0.05, "4": 1.0}


def check(peers: list[Peer], tokenizer: Any, load: Load) -> dict[str, str]:
    """Hold every peer's answers against the reference's, the first one's.

    A peer that fails, or is another model, is left out; returned is which and why.
    """
    texts = read_prompts().texts
    prompts = [tokenizer(text)["input_ids"][: load.prompt // 2] for text in texts]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(chat, add_special_tokens=False)["input_ids"]
    prompts.append(asked)

    def answers(peer: Peer) -> tuple[Vector, list[int]]:
        return peer.ask("distributions", prompts), peer.ask("greedy", asked, load.greedy)

    reference, said = answers(peers[0])
    left_out: dict[str, str] = {}
    for peer in list(peers):
        try:
            log_p, answer = answers(peer) if peer is not peers[0] else (reference, said)
            peer.check = compare(reference, log_p, said, answer)
            peer.check["greedy"] = tokenizer.decode(answer)
            kl, most = peer.check["kl_mean"], MOST_KL[_bits(peer.spec)]
            if not kl <= most:
                raise PeerError(f"it is another model: KL divergence {kl:.3f}, {most} is the most")
            print(f"{peer.spec.name}: KL {kl:.4f}, {peer.check['greedy']!r}", file=sys.stderr)
        except PeerError as error:
            left_out[peer.spec.name] = str(error)
            peers.remove(peer)
            print(f"{peer.spec.name} IS LEFT OUT: {error}", file=sys.stderr)
    return left_out


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
