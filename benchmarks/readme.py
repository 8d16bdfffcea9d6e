"""The pages' pasted output, made again: `python benchmarks/readme.py [WORDS]`.

A block between `<!-- $ COMMAND -->` and `<!-- end -->` is what that command of ours writes to
stdout, in 80 columns; with WORDS only commands with one of them are run. Of hub models they find
config and index in a hub's cache made from tests/published.py, which is what they would fetch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HUB = {"Mixtral-8x7B": "mistralai/Mixtral-8x7B-v0.1"}  # published models that commands name
PAGES = (ROOT / "README.md", ROOT / "docs/doctor.md")
BLOCK = re.compile(r"(<!-- \$ (offload [^\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def output(command: str, folder: Path) -> str:
    """What `command` writes, as a block of Markdown."""
    words = [sys.executable, "-m", "cli", *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    if any(name in command for name in HUB.values()):
        environment |= {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
    print(f"$ {command}", file=sys.stderr, flush=True)
    done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{command}: exit code {done.returncode}")
    text = done.stdout.rstrip()
    if text.startswith("|"):  # a table of Markdown
        return f"\n{text}\n\n"
    return f"```\n$ {command}\n{text}\n```\n"


def write_cache(folder: Path) -> None:
    """A hub's cache with config and index of the models in `HUB`, as bfloat16 is published."""
    sys.path.insert(0, str(ROOT))
    from tests.published import PUBLISHED

    for name, hub_id in HUB.items():
        model = folder / f"models--{hub_id.replace('/', '--')}"
        commit = "0" * 40
        (model / "refs").mkdir(parents=True)
        (model / "refs/main").write_text(commit)
        snapshot = model / "snapshots" / commit
        PUBLISHED[name].config().save_pretrained(snapshot)
        index = {"metadata": {"total_size": 2 * PUBLISHED[name].weights}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    asked = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_cache(folder)

        def again(block: re.Match[str]) -> str:
            if asked and not any(word in block[2] for word in asked):
                return block[0]
            return block[1] + output(block[2], folder) + block[3]

        for page in PAGES:
            page.write_text(BLOCK.sub(again, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
