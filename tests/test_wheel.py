"""The wheel owns the one name `offload` and works beside a user's files of any other name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import offload

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "results")
FOLDERS = {"offload": "offload", "cache": "offload/cache", "quant": "offload/quant"}  # in the wheel
DIST_INFO = f"moe_offload-{offload.__version__}.dist-info"
SCRIPT = """\
import json
import sys

import offload.cache.cache
import offload.quant.pack
from offload import generate, load

model, tokenizer = load(sys.argv[1])
text = generate(model, tokenizer, "Hello", max_new_tokens=3)
files = [module.__file__ for module in (offload, offload.cache.cache, offload.quant.pack)]
print(json.dumps({"text": text, "files": files}))
"""
TYPED = """\
import offload
from offload import generate, load, stream_generate

with load("demo", context=64, threads=2, expert_slots=0.25, dtype="auto") as (model, tokenizer):
    reveal_type(model)
    reveal_type(tokenizer)
    reveal_type(model.offload)
    reveal_type(model.offload.stats().counts.hit_rate)
    reveal_type(generate(model, tokenizer, "Hi", max_new_tokens=3, stop_strings=["."]))
    reveal_type(generate(model, tokenizer, [{"role": "user", "content": "Hi"}]))
    reveal_type(generate(model, tokenizer, ["Hi", "Ho"], temperature=0.5))
    reveal_type(generate(model, tokenizer, "Hi", num_return_sequences=2))
    for step in stream_generate(model, tokenizer, [1, 2, 3]):
        reveal_type(step)
        reveal_type(step.text)
        reveal_type(step.experts.slots)
reveal_type(offload.OffloadError("x"))
"""
REVEALED = [
    "offload.engine.handle.OffloadedModel",
    "transformers.tokenization_utils_base.PreTrainedTokenizerBase | None",
    "offload.engine.handle.Offload",
    "float",
    "str",
    "str",
    "list[str]",
    "list[str]",
    "offload.generation.stream.GenerationResponse",
    "str",
    "int",
    "offload.quant.errors.OffloadError",
]
WRONGLY_TYPED = {
    'load("demo", contxt=5)': "call-arg",
    'load("demo", context="4k")': "arg-type",
    "offload.nothing": "attr-defined",
    'load("demo").model.offload.close(1)': "call-arg",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that this checkout gets no build files."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    shutil.copytree(ROOT, source, ignore=NOT_COPIED)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    run([sys.executable, "-c", build], source)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The programs of a fresh environment with the wheel; all else is found where it is here.

    A `.pth` file adds the folders of this environment but does not run the `.pth` files in them,
    so the editable installation of this checkout stays out of sight.
    """
    folder = wheel.parents[1] / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    run([sys.executable, "-m", "pip", "--python", str(python), *install], wheel.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "here.pth").write_text("\n".join(here))
    return folder / "bin"


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A folder with files of a user's own that bear the names of our folders and must not run."""
    for name in ("cache", "quant", "cli"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('this file is a user\\'s own')\n")
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    """The output of a command that succeeds without PYTHON... settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_owns_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"offload", DIST_INFO}


def test_the_wheel_has_every_source_file_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(DIST_INFO)}
    source = wheel.parents[1]
    expected = {
        f"{place}/{file.relative_to(source / folder).as_posix()}"
        for folder, place in FOLDERS.items()
        for file in (source / folder).rglob("*")
        if file.is_file()
    }
    assert names == expected
    assert "offload/py.typed" in names


def test_load_and_generate_work_beside_a_users_own_files(
    installed: Path, users_folder: Path, mixtral_pack: Path
) -> None:
    (users_folder / "script.py").write_text(SCRIPT)
    said = json.loads(run([f"{installed}/python", "script.py", str(mixtral_pack)], users_folder))
    model, tokenizer = offload.load(mixtral_pack)
    assert said["text"] == offload.generate(model, tokenizer, "Hello", max_new_tokens=3)
    assert len(said["files"]) == 3
    for file in said["files"]:
        assert Path(file).is_relative_to(installed.parent), file


def test_a_users_script_is_typed_under_mypy_strict(installed: Path, users_folder: Path) -> None:
    (users_folder / "typed.py").write_text(TYPED)
    wrong = ["import offload", "from offload import load", *WRONGLY_TYPED]
    (users_folder / "wrong.py").write_text("\n".join(wrong) + "\n")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", f"{installed}/python"]
    done = subprocess.run(
        [*mypy, "typed.py", "wrong.py"], cwd=users_folder, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    revealed = [line.partition('type is "')[2].rstrip('"') for line in lines if "type is" in line]
    assert revealed == REVEALED
    errors = [line for line in lines if ": error: " in line]
    told = [(line.split(":")[1], line.rpartition("[")[2].rstrip("]")) for line in errors]
    assert told == [(str(at), code) for at, code in enumerate(WRONGLY_TYPED.values(), start=3)]


def test_the_command_answers_beside_a_users_own_files(installed: Path, users_folder: Path) -> None:
    assert (
        run([f"{installed}/offload", "--version"], users_folder)
        == f"offload {offload.__version__}\n"
    )
    assert "usage: offload" in run([f"{installed}/offload", "--help"], users_folder)
