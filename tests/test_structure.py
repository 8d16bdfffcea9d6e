"""docs/structure.md names every source file once, and the first pages stay short."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.house import ROOT, file_graph

PAGE = ROOT / "docs/structure.md"
NAME = re.compile(r"`((?:\w+/)*\w+\.py)`")


def files_listed(page: str, root: Path) -> Counter[str]:
    """How often the section "Files" of `page` names each path; a heading tells the folder.

    Files of the top level stand under the first heading, too.
    """
    found: Counter[str] = Counter()
    folder = ""
    for line in page.partition("\n## Files\n")[2].splitlines():
        if line.startswith("### "):
            folder = line.split("`")[1]
        for name in NAME.findall(line):
            path = folder + name
            found[path if (root / path).is_file() or not (root / name).is_file() else name] += 1
    return found


def test_every_source_file_is_listed_once() -> None:
    expected = {path for path in file_graph() if not path.endswith("/__init__.py")}
    listed = files_listed(PAGE.read_text(encoding="utf-8"), ROOT)
    assert listed == dict.fromkeys(expected | {"offload/__init__.py"}, 1)


def test_every_path_on_the_page_exists() -> None:
    before = PAGE.read_text(encoding="utf-8").partition("\n## Files\n")[0]
    paths = [name for name in NAME.findall(before) if "/" in name]
    assert paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_a_file_is_looked_for_in_the_folder_of_its_heading(tmp_path: Path) -> None:
    (tmp_path / "cli.py").touch()
    page = "`a/x.py`\n## Files\n### `a/`\n- `cli.py`; `x.py` and `x.py`\n### `b/c/`\n- `x.py`\n"
    assert files_listed(page, tmp_path) == {"cli.py": 1, "a/x.py": 2, "b/c/x.py": 1}


@pytest.mark.parametrize(("page", "most"), [("docs/structure.md", 150), ("README.md", 220)])
def test_the_first_pages_stay_short(page: str, most: int) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= most
