"""The models that people run, as a table: which of them fit on a machine, and how fast they are."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from offload.model.known import KNOWN, KnownModel
from offload.options import LoadOptions
from offload.plan.outline import outline
from offload.plan.plan import Plan, make_plan
from offload.plan.report import bits_text, machine_lines, rest_text, speed_text
from offload.plan.target import Target
from offload.units import gib

COLUMNS = ("model", "download", "bits", "pack", "resident", "rest in", "tok/s", "limit")
WIDTHS = (max(len(known.name) for known in KNOWN), 9, 4, 9, 8, 9, 5, 6)
LEFT = ("model", "rest in", "limit")


def survey(target: Target, options: LoadOptions) -> Iterator[tuple[KnownModel, Plan]]:
    """The plan of each known model on `target`, one after the other."""
    for known in KNOWN:
        plan = make_plan(outline(known.name, options), target, options)
        if plan.chosen is None and plan.remedy:  # fewer bits for the rest of the weights, too
            fewer = replace(options, dense_bits=int(plan.remedy.rpartition(" ")[2]))
            plan = make_plan(plan.outline, target, fewer)
        yield known, plan


def survey_lines(target: Target, plans: Iterator[tuple[KnownModel, Plan]]) -> Iterator[str]:
    """The table for a terminal of 80 columns, a line as soon as its plan is made."""
    yield from machine_lines(target)
    yield ""
    yield _line(COLUMNS)
    for known, plan in plans:
        yield _line(_cells(known, plan))
    yield ""
    yield "tok/s is an estimate, at the bits that are advised."
    yield "Next: offload plan MODEL to see more of one, or offload pull MODEL to fetch it"


def _cells(known: KnownModel, plan: Plan) -> list[str]:
    cells, row = [known.name, gib(known.download_bytes, 1)], plan.chosen
    if row is None or row.forecast is None:
        return [*cells, "does not fit"]
    forecast = row.forecast
    return [
        *cells,
        bits_text(row),
        gib(row.pack_bytes, 1),
        f"{row.slots / row.info.total_experts:.0%}",
        rest_text(row),
        speed_text(forecast.usual),
        forecast.limited_by,
    ]


def _line(cells: Sequence[str]) -> str:
    texts = [
        text.ljust(width) if name in LEFT or text == "does not fit" else text.rjust(width)
        for name, text, width in zip(COLUMNS, cells, WIDTHS, strict=False)
    ]
    return " ".join(texts).rstrip()
