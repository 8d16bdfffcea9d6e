"""Record the demo's routing on four kinds of text, with what routers up to 3 layers ahead say.

Chat and code are the demo's own answers; prose and Hebrew are fed, token by token, after a prompt
of 64: a model of this size does not write them. The texts are in the public domain (Melville,
Moby-Dick; Genesis 1).

    python benchmarks/record_traces.py [--folder benchmarks/traces]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import offload
from offload.cache.trace.file import read, write
from offload.cache.trace.trace import Trace
from offload.engine.handle import offload_of
from offload.generation.stream import forward
from offload.loading import routers

TRACES = Path(__file__).parent / "traces"
FED_PROMPT, FED_TOKENS = 64, 300
NOTED_LAYERS = 3  # routers of so many later layers are asked
CHAT = (
    "Why is the sky blue?",
    "And why is it red in the evening?",
    "Give me three ideas for dinner tonight.",
)
CODE = ("Write a Python class for a least recently used cache with get and put, and explain it.",)
PROSE = """Call me Ishmael. Some years ago, never mind how long precisely, having little or no money
in my purse, and nothing particular to interest me on shore, I thought I would sail about a little
and see the watery part of the world. It is a way I have of driving off the spleen and regulating
the circulation. Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly
November in my soul; whenever I find myself involuntarily pausing before coffin warehouses, and
bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper
hand of me, that it requires a strong moral principle to prevent me from deliberately stepping into
the street, and methodically knocking people's hats off, then, I account it high time to get to sea
as soon as I can. This is my substitute for pistol and ball. With a philosophical flourish Cato
throws himself upon his sword; I quietly take to the ship. There is nothing surprising in this. If
they but knew it, almost all men in their degree, some time or other, cherish very nearly the same
feelings towards the ocean with me. There now is your insular city of the Manhattoes, belted round
by wharves as Indian isles by coral reefs; commerce surrounds it with her surf. Right and left, the
streets take you waterward. Its extreme downtown is the battery, where that noble mole is washed by
waves, and cooled by breezes, which a few hours previous were out of sight of land."""
HEBREW = """בראשית ברא אלהים את השמים ואת הארץ. והארץ היתה תהו ובהו וחשך על פני תהום ורוח אלהים
מרחפת על פני המים. ויאמר אלהים יהי אור ויהי אור. וירא אלהים את האור כי טוב ויבדל אלהים בין האור
ובין החשך. ויקרא אלהים לאור יום ולחשך קרא לילה ויהי ערב ויהי בקר יום אחד. ויאמר אלהים יהי רקיע
בתוך המים ויהי מבדיל בין מים למים. ויעש אלהים את הרקיע ויבדל בין המים אשר מתחת לרקיע ובין המים
אשר מעל לרקיע ויהי כן."""


def converse(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: tuple[str, ...]
) -> None:
    """Ask one after the other, 300 tokens in all."""
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        count = FED_TOKENS // len(questions)
        answer = offload.generate(
            model, tokenizer, messages, max_new_tokens=count, temperature=0.7, seed=1
        )
        messages.append({"role": "assistant", "content": answer})


def feed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Read a prompt, then token by token what follows it in `text`."""
    found = tokenizer(" ".join(text.split()), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([found[: FED_PROMPT + FED_TOKENS]])
    _, cache = forward(model, ids[:, :FED_PROMPT], None)
    for at in range(FED_PROMPT, ids.shape[1]):
        _, cache = forward(model, ids[:, at : at + 1], cache)


def main() -> None:
    """Record them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=TRACES)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = offload.load("demo", device="cpu", lookahead=False, warm_start=False)
    assert tokenizer is not None
    handle = offload_of(model)
    handle.engine.watch_routers(model, routers(model, handle.pack.info))
    for name in ("chat", "code", "prose", "hebrew"):
        path = folder / f"{name}.trace"
        handle.record(path, noted_layers=NOTED_LAYERS)
        match name:
            case "chat":
                converse(model, tokenizer, CHAT)
            case "code":
                converse(model, tokenizer, CODE)
            case "prose":
                feed(model, tokenizer, PROSE)
            case "hebrew":
                feed(model, tokenizer, HEBREW)
        handle.engine.stop_recording()
        trace = read(path)  # scores are half of the file, and no figure needs them
        write(path, Trace(trace.header, [event._replace(scores=()) for event in trace.events]))
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB", flush=True)
    handle.close()


if __name__ == "__main__":
    main()
