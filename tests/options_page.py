"""Writes docs/options.md from the options themselves: `python -m tests.options_page`."""

from __future__ import annotations

from pathlib import Path

from offload.bench.command import BenchOptions
from offload.chat.command import ChatOptions
from offload.flags import default_text, has_no, options_of
from offload.generation.command import AnswerFileOptions
from offload.model.command import PullOptions
from offload.options import AnswerOptions, LoadOptions, SharedOptions
from offload.pack.command import KeepingOptions
from offload.plan.command import PlanOptions
from offload.quality.command import CheckOptions, PerplexityOptions
from offload.trace.command import PlotOptions, ReplayOptions

PAGE = Path(__file__).parents[1] / "docs/options.md"
HEAD = """# Options

Every option of the command line and of `load`. `offload COMMAND --help` shows the options of one
command. `python -m tests.options_page` writes this page from the same dataclasses that `--help` is
made from.
"""
SECTIONS = {
    "Loading a model": (
        LoadOptions,
        "These are the keywords of `load` and options of `chat`, `generate`, `bench`, `ppl` and "
        "`check`; `plan` and `quantize` take some of them. In `bench`, `--expert-bits`, "
        "`--expert-slots`, `--policy` and `--lookahead` take lists, and `--warm-start` is off by "
        "default. In `ppl` and `check`, the default of `--ctx-size` is 512.",
    ),
    "Several commands": (
        SharedOptions,
        "`--stride` is an option of `ppl` and `check`, `--timeline` of `generate` and `bench`, and "
        "`--json` of `doctor`, `ppl` and `check`.",
    ),
    "Prompts and sampling": (AnswerOptions, "For `chat` and `generate`."),
    "chat": (ChatOptions, ""),
    "generate": (AnswerFileOptions, ""),
    "bench": (BenchOptions, "The names and defaults are those of llama-bench."),
    "plan": (PlanOptions, "It also takes the options of memory, quantisation and source."),
    "pull": (PullOptions, "It also takes the options of source."),
    "list, show, rm, prune": (
        KeepingOptions,
        "`--output` is an option of `list` and `show`, `--yes` of `rm` and `prune`.",
    ),
    "ppl": (PerplexityOptions, ""),
    "check": (CheckOptions, ""),
    "trace replay": (ReplayOptions, ""),
    "trace plot": (PlotOptions, ""),
}


def table(kind: type) -> str:
    """The options of the dataclass `kind` as a table of Markdown."""
    in_python = kind is LoadOptions
    names = ["Option", *["In Python"] * in_python, "Unit", "Default", "Meaning"]
    rows = [names, ["---"] * len(names)]
    for each, spelling in options_of(kind):
        off = [flag.replace("--", "--no-") for flag in spelling.flags if has_no(each)]
        flags = ", ".join(f"`{flag}`" for flag in (*spelling.flags, *off))
        value = f" {spelling.metavar}" if spelling.metavar else ""
        rows.append(
            [
                flags + value,
                *[f"`{each.name}`"] * in_python,
                spelling.unit,
                default_text(each.default, spelling),
                spelling.help,
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, (kind, text) in SECTIONS.items():
        parts += [f"## {title}\n", *[f"{text}\n"] * bool(text), f"{table(kind)}\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
