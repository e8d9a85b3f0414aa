"""Plain English: turns that readers had to decode do not come back."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OLD = r"gone on with|went on with|goes on with|\bwant of\b|\bwhoever\b|\bwherein\b|\bwhence\b|\bthereof\b|\bwhereof\b|\bto whose\b|\bhitherto\b"
UNITS = "bytes|nats|bits|tokens|prompts|draws|kB|MB|GB|KiB|seconds|minutes|channels|scores?|shares?|numbers?|decays?|groups?|folders?|files?|rows?|curves?|lines?"
WHOLES = "token|head|model|prompt|parameter|layer|threshold|method|machine|input|job|domain|task|seed|step|window|text|kind|instance"
A_FOR_PER = rf"\b(?:one|two|three|four|five|six|seven|eight|\d[\d,.]*) (?:{UNITS}) an? (?:{WHOLES})\b|\b(?:nats|bytes) an? (?:{WHOLES})\b"


def texts() -> list[Path]:
    """Everything that people read: pages, code, messages; not this list."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        ROOT / name
        for name in names
        if name.endswith((".py", ".md", ".yml", ".toml", ".cff")) and name != "tests/test_language.py"
    ]


@pytest.mark.parametrize("pattern", [OLD, A_FOR_PER], ids=["old turns", "a for per"])
def test_no_turn_that_readers_have_to_decode(pattern: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in texts()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line, re.IGNORECASE)
    ]
    assert found == []


@pytest.mark.parametrize("line", ["one number a head", "256 tokens a prompt", "four bytes a parameter", "gone on with"])
def test_the_list_finds_what_it_is_for(line: str) -> None:
    assert re.search(f"{OLD}|{A_FOR_PER}", line)
