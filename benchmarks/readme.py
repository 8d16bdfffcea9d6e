"""Runs the commands whose output the pages show: `python benchmarks/readme.py [WORD ...]`.

A block between `<!-- $ COMMAND -->` and `<!-- end -->` is replaced by what COMMAND writes to stdout
in 80 columns, or by its first N lines if COMMAND ends with `| head -N`. With WORDs, only commands
that contain one of them are run. For a hub model, config and index come from a cache that is made
from tests/published.py and holds what a command would fetch.
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
HUB = {"Mixtral-8x7B": "mistralai/Mixtral-8x7B-v0.1"}  # the hub models that commands name
PAGES = (ROOT / "README.md", ROOT / "docs/doctor.md")
BLOCK = re.compile(r"(<!-- \$ (offload [^\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def output(command: str, folder: Path) -> str:
    """What `command` writes, as a block of Markdown."""
    ours, _, most = command.partition(" | head -")
    words = [sys.executable, "-m", "cli", *shlex.split(ours)[1:]]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    if any(name in command for name in HUB.values()):
        environment |= {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
    print(f"$ {command}", file=sys.stderr, flush=True)
    done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{command}: exit code {done.returncode}")
    text = "\n".join(done.stdout.splitlines()[: int(most) if most else None]).rstrip()
    if text.startswith("|"):  # a Markdown table
        return f"\n{text}\n\n"
    return f"```\n$ {command}\n{text}\n```\n"


def write_cache(folder: Path) -> None:
    """Make `folder` a hub cache with config and index of the models in `HUB`, in bfloat16."""
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
