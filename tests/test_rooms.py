"""The order of rooms: CONTRIBUTING's table against what the package imports."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "staterank_utils"


def table() -> list[list[str]]:
    """Rooms, one list a line."""
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| rooms | what they know |") + 2
    end = lines.index("", start)
    return [line.split("|")[1].strip().split(", ") for line in lines[start:end]]


def imports(file: Path) -> set[str]:
    """Rooms that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "staterank_utils":
            found |= {name.name for name in node.names if not name.name.startswith("_")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("staterank_utils."):
            found.add(str(node.module).split(".")[1])
    return found


def test_what_measures_and_intervenes_knows_no_architecture_and_no_kernel() -> None:
    names = re.compile(
        r"hasattr|qwen|mamba|kimi|olmo|falcon|rwkv|m?lstm|\bfla\b|triton|kda|(chunk|recurrent)_\w*(rule|attention)",
        re.IGNORECASE,
    )
    for room in ("tracing", "surgery", "pruning", "decoding", "channels", "streaming", "memory"):
        found = names.findall((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))
        assert not found, (room, found)


def test_a_room_imports_only_rooms_of_lines_above_its_own() -> None:
    rooms = table()
    line = {room: number for number, of_line in enumerate(rooms) for room in of_line}
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]
    of_file = {file: file.relative_to(PACKAGE).with_suffix("").parts[0] for file in files}
    assert sorted(line) == sorted(set(of_file.values()))
    assert sum(map(len, rooms)) == len(line)
    wrong = [
        (str(file.relative_to(ROOT)), other)
        for file, room in of_file.items()
        for other in imports(file) - {room}
        if line[other] >= line[room]
    ]
    assert wrong == []
