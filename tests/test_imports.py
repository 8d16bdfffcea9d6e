"""What may be imported where, read from the sources, and which names the package exports.

The rooms, floors and circles are held by test_house.py.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import offload
from offload.main import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGES = ("offload", "cache", "quant")
EXPORTED = {
    "BudgetError",
    "CheckpointError",
    "GenerationError",
    "GenerationResponse",
    "OffloadError",
    "PackError",
    "QualityError",
    "RecipeError",
    "SourceError",
    "UnsupportedModelError",
    "__version__",
    "generate",
    "load",
    "stream_generate",
}


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imports(file: Path) -> set[str]:
    """Every module that `file` imports anywhere, under TYPE_CHECKING and in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _dotted(node: ast.AST) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


CALENDAR = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime"}
CALENDAR |= {f"{kind}.{how}" for kind in ("datetime", "date") for how in ("now", "utcnow", "today")}
DATED = {  # the day a benchmark was run on, or a file was used
    ("offload/bench/run.py", "datetime.now"),
    ("offload/chat/saved.py", "time.localtime"),
    ("offload/pack/command.py", "time.time"),
}


def _asks_for_the_time(tree: ast.AST) -> set[str]:
    """The functions of the wall clock that a module uses."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & CALENDAR
        else:
            found.add(".".join(_dotted(node).split(".")[-2:]))
    return found & CALENDAR


def test_no_duration_is_measured_with_a_clock_that_can_be_set() -> None:
    """The wall clock may jump. This reads the sources, because no test can set that clock."""
    asked = {
        (str(file.relative_to(ROOT)), name)
        for package in PACKAGES
        for file in _sources(package)
        for name in _asks_for_the_time(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert asked == DATED


@pytest.mark.parametrize(
    "source",
    ["import time\nx = time.time()", "from time import time_ns", "y = datetime.datetime.now(UTC)"],
)
def test_a_module_that_uses_the_wall_clock_is_found(source: str) -> None:
    assert _asks_for_the_time(ast.parse(source))


def test_cache_is_plain_python() -> None:
    for file in _sources("cache"):
        names = {name for name in _imports(file) if not name.startswith("offload.cache.")}
        roots = {name.partition(".")[0] for name in names}
        assert roots <= {*sys.stdlib_module_names}, file.name


COMMAND_LINE = [
    ROOT / "cli.py",
    ROOT / "offload/main.py",
    *sorted((ROOT / "offload").glob("*/command.py")),
]


def test_the_command_line_touches_no_tensors() -> None:
    assert len(COMMAND_LINE) > 8
    for file in COMMAND_LINE:
        roots = {name.partition(".")[0] for name in _imports(file)}
        assert roots <= {"offload", "rich", "transformers", *sys.stdlib_module_names}, file.name


def test_few_modules_reach_kernels() -> None:
    reaching = set()
    for file in [f for package in PACKAGES for f in _sources(package)]:
        place = file.relative_to(ROOT)
        if "kernels" in place.parts:
            continue  # the kernels themselves
        names = _imports(file)
        names |= {_dotted(n) for n in ast.walk(ast.parse(file.read_text(encoding="utf-8")))}
        kernels = ("torch.ops", "torch._C", "triton", "llvmlite", "offload.quant.kernels")
        if any(name == k or name.startswith(f"{k}.") for name in names for k in kernels):
            reaching.add(place.as_posix())
    products = {"quant/matmul.py", "quant/experts.py", "offload/engine/few.py"}
    planning = {f"offload/engine/device/{name}.py" for name in ("kernels", "table", "gather")}
    recording = {"offload/trace/timeline.py"}  # an option of torch's profiler is found only there
    assert reaching == products | planning | recording


def test_only_one_module_knows_the_solver() -> None:
    using = [
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in _sources(package)
        if any(name.startswith("hqq") for name in _imports(file))
    ]
    assert using == ["quant/hqq.py"]


def test_every_module_has_a_docstring() -> None:
    for package in PACKAGES:
        for file in _sources(package):
            assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file.name


def test_exported_names_are_these() -> None:
    assert set(offload.__all__) == EXPORTED
    assert len(offload.__all__) == len(EXPORTED)


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(offload, name) is not None


def test_a_name_that_is_not_exported_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        offload.nothing  # noqa: B018


def test_every_error_is_an_offload_error() -> None:
    for name in EXPORTED:
        if name.endswith("Error"):
            assert issubclass(getattr(offload, name), offload.OffloadError)


def test_completion_offers_the_public_names_only() -> None:
    assert dir(offload) == sorted(EXPORTED)


def _alone(code: str) -> str:
    """What `code` prints in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
)
def test_the_command_answers_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys, cli\n"
        "try:\n"
        f"    cli.main({arguments!r})\n"
        "except SystemExit as left:\n"
        "    assert left.code == 0\n"
        "heavy = {'torch', 'transformers', 'hqq', 'numpy', 'rich'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "called = {m for m in sys.modules if m.endswith('.command')}\n"
        f"assert len(called) <= 2 * {len(arguments) - 1}, called\n"
    )
    out = _alone(code)
    if arguments == ["--version"]:
        assert out == f"offload {offload.__version__}\n"


def test_a_chat_s_first_prompt_needs_no_torch() -> None:
    code = "import sys, offload.chat.command, offload.chat.opening; print({'torch', 'numpy'} & "
    assert _alone(code + "sys.modules.keys())") == "set()\n"


INTERRUPTED = """
import sys
from importlib.abc import MetaPathFinder
from offload.main import main

class CtrlC(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, CtrlC())
sys.exit(main(["chat", "demo"]))
"""


@pytest.mark.parametrize("module", ["offload.files", "offload.options", "offload.chat.command"])
def test_ctrl_c_during_the_first_imports_ends_with_130_and_no_traceback(module: str) -> None:
    code = INTERRUPTED.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")


def test_little_is_imported_before_ctrl_c_is_guarded_against() -> None:
    ours = "print(*sorted(m for m in sys.modules if m.startswith('offload')))"
    assert _alone(f"import sys, offload.main; {ours}").split() == [
        "offload", "offload.errors", "offload.flags", "offload.lines", "offload.main",
        "offload.quant", "offload.quant.errors", "offload.version",
    ]  # fmt: skip


def test_a_checkout_runs_the_command_as_a_file_and_as_a_module() -> None:
    for way in (["cli.py"], ["-m", "cli"]):
        done = subprocess.run(
            [sys.executable, *way, "--version"], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, f"offload {offload.__version__}\n")
