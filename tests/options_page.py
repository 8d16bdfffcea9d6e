"""docs/options.md, made from the options themselves: `python -m tests.options_page`."""

from __future__ import annotations

from pathlib import Path

from offload import options

PAGE = Path(__file__).parents[1] / "docs/options.md"
HEAD = """# Options

Every option of the command line and of `load`. This page is written by `python -m
tests.options_page` from `offload/options.py`, which `--help` is made from too.
`offload COMMAND --help` shows what one command takes.
"""
SECTIONS = {
    "Loading a model": (
        options.LoadOptions,
        "Keywords of `load`, and options of `chat`, `generate`, `bench`, `ppl` and `check`; "
        "`plan` and `quantize` take some of them. In `bench`, `--expert-bits`, `--expert-slots`, "
        "`--policy` and `--lookahead` take lists, and `--warm-start` is off. In `ppl` and `check` "
        "`--ctx-size` is 512.",
    ),
    "Processor": (options.ThreadOptions, "With the commands that load a model."),
    "Prompts and sampling": (options.AnswerOptions, "`chat` and `generate`."),
    "chat": (options.ChatOptions, ""),
    "generate": (options.GenerateOptions, ""),
    "Timelines": (options.TimelineOptions, "`generate` and `bench`."),
    "bench": (options.BenchOptions, "Names and defaults are llama-bench's."),
    "plan": (options.PlanOptions, "Beside `--device`, `--vram`, `--ram`, sizes, bits and source."),
    "ppl": (options.PerplexityOptions, ""),
    "check": (options.CheckOptions, ""),
    "Windows": (options.WindowOptions, "`ppl` and `check`."),
    "JSON": (options.JsonOptions, "`doctor`, `ppl` and `check`."),
    "trace replay": (options.ReplayOptions, ""),
    "trace plot": (options.PlotOptions, ""),
}


def table(kind: type) -> str:
    """The options of the dataclass `kind` as a table of Markdown."""
    in_python = kind is options.LoadOptions
    names = ["Option", *["In Python"] * in_python, "Unit", "Default", "Meaning"]
    rows = [names, ["---"] * len(names)]
    for each, spelling in options.options_of(kind):
        off = [flag.replace("--", "--no-") for flag in spelling.flags if options.has_no(each)]
        flags = ", ".join(f"`{flag}`" for flag in (*spelling.flags, *off))
        value = f" {spelling.metavar}" if spelling.metavar else ""
        rows.append(
            [
                flags + value,
                *[f"`{each.name}`"] * in_python,
                spelling.unit,
                options.default_text(each.default, spelling),
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
