"""Holds the rooms, floors and size of the source; tiny trees show that each rule can fail."""

from __future__ import annotations

from graphlib import CycleError
from pathlib import Path

import pytest

from tests.house import (
    FLOORS,
    ROOT,
    circles,
    depth,
    file_graph,
    main,
    room_graph,
    room_of,
    wrong_imports,
)

MOST_LINES = 30_500
MOST_FILES = 190
MOST_FLOORS = 8


def make_tree(root: Path, files: dict[str, str]) -> Path:
    """A tree of sources, as path -> text."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_every_import_goes_down_or_stays_in_its_room() -> None:
    assert wrong_imports(file_graph()) == []


def test_no_files_import_one_another_in_a_circle() -> None:
    assert circles(file_graph()) == []


def test_no_rooms_import_one_another_in_a_circle() -> None:
    assert circles(room_graph(file_graph())) == []


def test_every_listed_room_exists() -> None:
    rooms = {room_of(path)[1] for path in file_graph()}
    assert rooms == {room.split()[0] for names in FLOORS.values() for room in names}


def test_the_house_stays_small() -> None:
    graph = file_graph()
    lines = sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in graph)
    assert lines <= MOST_LINES
    assert len(graph) <= MOST_FILES
    assert depth(room_graph(graph)) <= MOST_FLOORS


def test_the_report_ends_with_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    report = capsys.readouterr().out.splitlines()
    assert report[0].split() == ["room", "lines", "files", "median", "circles", "longest", "file"]
    assert report[-1] == "imports that do not go down: 0"


@pytest.mark.parametrize(
    ("text", "imported"),
    [
        ("import offload.units", "offload/units.py"),
        ("import offload.units as u", "offload/units.py"),
        ("from offload import units", "offload/units.py"),
        ("from offload.units import gib", "offload/units.py"),
        ("from offload import load", "offload/__init__.py"),
        ("from offload.cache import pool", "cache/pool.py"),
        ("from offload.cache import Cache", "cache/__init__.py"),
        ("def f():\n    from offload.units import gib", "offload/units.py"),
        ("if TYPE_CHECKING:\n    from offload.units import Size", "offload/units.py"),
    ],
)
def test_an_import_is_found_wherever_it_stands(tmp_path: Path, text: str, imported: str) -> None:
    others = ("offload/__init__.py", "offload/units.py", "cache/__init__.py", "cache/pool.py")
    tree = make_tree(tmp_path, {"cli.py": text, **dict.fromkeys(others, "import os")})
    assert file_graph(tree) == {"cli.py": {imported}, **{path: set() for path in others}}


def test_a_relative_import_is_refused(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"offload/units.py": "\nfrom . import errors"})
    with pytest.raises(ValueError, match=r"offload/units\.py:2: a relative import"):
        file_graph(tree)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("offload/engine/layer.py", "offload/chat/commands.py"),  # upwards
        ("offload/chat/commands.py", "offload/bench/run.py"),  # another room of the same floor
        ("cache/pool.py", "offload/units.py"),
        ("offload/units.py", "offload/main.py"),
    ],
)
def test_an_import_that_does_not_go_down_is_found(
    tmp_path: Path, importer: str, imported: str
) -> None:
    module = imported.removesuffix(".py").replace("/", ".")
    graph = file_graph(make_tree(tmp_path, {importer: f"import {module}", imported: ""}))
    (wrong,) = wrong_imports(graph)
    assert importer in wrong
    assert imported in wrong
    backwards = {imported: {importer}, importer: set()}
    same_floor = room_of(importer)[0] == room_of(imported)[0]
    assert bool(wrong_imports(backwards)) == same_floor


def test_files_of_one_room_may_import_one_another() -> None:
    assert (
        wrong_imports({"offload/units.py": {"offload/errors.py"}, "offload/errors.py": set()}) == []
    )
    assert wrong_imports({"cli.py": {"offload/main.py"}, "offload/main.py": set()}) == []


def test_a_file_without_a_room_is_refused() -> None:
    with pytest.raises(LookupError, match=r"offload/attic/box\.py belongs to no room"):
        room_of("offload/attic/box.py")


def test_a_circle_is_found_and_not_what_leads_to_it() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b", "e"}, "e": set(), "f": {"f"}}
    assert circles(graph) == ["b c d", "f"]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_rooms_form_a_circle_where_no_files_do() -> None:
    files = {
        "offload/engine/a.py": {"offload/budget/a.py"},
        "offload/budget/a.py": set(),
        "offload/budget/b.py": {"offload/engine/b.py"},
        "offload/engine/b.py": set(),
    }
    assert circles(files) == []
    assert circles(room_graph(files)) == ["offload/budget offload/engine"]


def test_depth_counts_the_longest_chain() -> None:
    assert depth({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}) == 3
    assert depth({}) == 0
    with pytest.raises(CycleError):
        depth({"a": {"b"}, "b": {"a"}})
