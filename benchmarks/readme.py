"""The pages' pasted output, made again: `python benchmarks/readme.py [WORDS]`.

A block between `<!-- $ COMMAND -->` and `<!-- end -->` is what that command of ours writes to
stdout, in 80 columns; with WORDS only commands with one of them are run. Commands run in a folder
with the configs of published models (tests/published.py), and nothing else of them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/doctor.md")
BLOCK = re.compile(r"(<!-- \$ (offload [^\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def output(command: str, folder: Path) -> str:
    """What `command` writes, as a block of Markdown."""
    words = [sys.executable, "-m", "cli", *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    print(f"$ {command}", file=sys.stderr, flush=True)
    done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{command}: exit code {done.returncode}")
    text = done.stdout.rstrip()
    if text.startswith("|"):  # a table of Markdown
        return f"\n{text}\n\n"
    return f"```\n$ {command}\n{text}\n```\n"


def write_configs(folder: Path) -> None:
    """The published models as folders with nothing but a config."""
    sys.path.insert(0, str(ROOT))
    from tests.published import PUBLISHED

    for name, published in PUBLISHED.items():
        published.config().save_pretrained(folder / name)


def main() -> None:
    asked = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_configs(folder)

        def again(block: re.Match[str]) -> str:
            if asked and not any(word in block[2] for word in asked):
                return block[0]
            return block[1] + output(block[2], folder) + block[3]

        for page in PAGES:
            page.write_text(BLOCK.sub(again, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
