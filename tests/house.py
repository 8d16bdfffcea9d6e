"""Measures the source: `python -m tests.house` prints its rooms, floors, circles and wrong imports.

Every import counts: at the top of a module, in a function, and under `if TYPE_CHECKING`, because a
type must be understood too. Modules imported by a name from a table, as commands are, are not seen.
"""

from __future__ import annotations

import ast
import statistics
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Floor -> its rooms: folders, or files that stand together. `offload/*` are its remaining files. A
# command's file lies in the folder of its capability and belongs to the command line.
FLOORS = {
    8: [
        "cli.py offload/main.py offload/config.py offload/completion.py offload/__init__.py "
        # the commands
        "*/command.py"
    ],
    7: ["offload/bench", "offload/chat", "offload/plan", "offload/quality"],
    6: ["offload/loading.py"],
    5: ["offload/generation", "offload/pack", "offload/trace"],
    4: ["offload/budget", "offload/engine"],
    3: ["offload/machine", "offload/model", "offload/transfer"],
    2: ["offload/*"],
    1: ["cache", "quant"],
}
HOUSE = [(floor, room.split()) for floor, rooms in FLOORS.items() for room in rooms]
ROOMS = {place: (floor, places[0]) for floor, places in HOUSE for place in places}

Graph = dict[str, set[str]]  # a file or room -> those that it imports


def room_of(path: str) -> tuple[int, str]:
    """Floor and name of the room of a file. Raises LookupError if `FLOORS` has none for it."""
    above = [parent.as_posix() for parent in Path(path).parents]
    for place in (f"*/{Path(path).name}", path, f"{above[0]}/*", *above):
        if place in ROOMS:
            return ROOMS[place]
    raise LookupError(f"{path} belongs to no room: add it to FLOORS in tests/house.py")


def module_of(path: str) -> str:
    """The name that a file is imported by. The folders cache/ and quant/ are parts of `offload`."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"offload.{name}" if name.split(".")[0] in ("cache", "quant") else name


def file_graph(root: Path = ROOT) -> Graph:
    """Each source file below `root` -> the source files that it imports, as relative paths."""
    files = [file for top in ("cache", "offload", "quant") for file in (root / top).rglob("*.py")]
    paths = sorted(file.relative_to(root).as_posix() for file in [*files, *root.glob("cli.py")])
    path_of = {module_of(path): path for path in paths}
    graph = {}
    for path in paths:
        names: set[str] = set()
        for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                if node.level:
                    raise ValueError(f"{path}:{node.lineno}: a relative import; write it in full")
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in path_of else str(node.module) for name in full}
        graph[path] = {path_of[name] for name in names if name in path_of}
    return graph


def room_graph(graph: Graph) -> Graph:
    """Each room -> the other rooms that its files import, of a graph of files."""
    rooms: Graph = {room_of(path)[1]: set() for path in graph}
    for path, imported in graph.items():
        rooms[room_of(path)[1]] |= {room_of(other)[1] for other in imported}
    return {room: others - {room} for room, others in rooms.items()}


def wrong_imports(graph: Graph) -> list[str]:
    """Imports of a graph of files that neither stay in their room nor go to a lower floor."""
    wrong = []
    for path in graph:
        for other in sorted(graph[path]):
            (floor, room), (below, target) = room_of(path), room_of(other)
            if room != target and floor <= below:
                wrong.append(f"{path} (floor {floor}) imports {other} (floor {below})")
    return wrong


def circles(graph: Graph) -> list[str]:
    """The sets of nodes that all import one another by some chain, each as sorted words."""
    reach = {node: set(others) for node, others in graph.items()}
    for middle in graph:
        for node in graph:
            reach[node] |= reach[middle] if middle in reach[node] else set()
    found = {" ".join(sorted(o for o in reach[n] if n in reach[o])) for n in graph}
    return sorted(found - {""})


def depth(graph: Graph) -> int:
    """Nodes on the longest chain of imports. Raises CycleError if there is a circle."""
    depths: dict[str, int] = {}
    for node in TopologicalSorter(graph).static_order():  # what is imported comes first
        depths[node] = 1 + max((depths[other] for other in graph[node]), default=0)
    return max(depths.values(), default=0)


def main() -> None:
    graph = file_graph()
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in graph}
    rooms, closed = room_graph(graph), circles(graph)
    print(f"{'room':22}{'lines':>6}{'files':>6}{'median':>7}{'circles':>8}  longest file")
    for floor, room in [*sorted({room_of(path) for path in graph}, reverse=True), (0, "all")]:
        own = {path: count for path, count in lines.items() if room in ("all", room_of(path)[1])}
        touched = sum(not own.keys().isdisjoint(circle.split()) for circle in closed)
        sizes = f"{sum(own.values()):6}{len(own):6}{statistics.median(own.values()):7.0f}"
        count, longest = max((count, path) for path, count in own.items())
        print(f"{floor or ' '} {room:20}{sizes}{touched:8}  {count:4} {longest}")
    round_rooms, wrong = circles(rooms), wrong_imports(graph)
    print(f"floors: {'none, rooms form a circle' if round_rooms else depth(rooms)}")
    print("\n  ".join([f"circles of files: {len(closed)}", *closed]))
    print("\n  ".join([f"circles of rooms: {len(round_rooms)}", *round_rooms]))
    print("\n  ".join([f"imports that do not go down: {len(wrong)}", *wrong]))


if __name__ == "__main__":
    main()
