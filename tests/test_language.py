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
        if (
            name.endswith((".py", ".md", ".yml", ".yaml", ".toml", ".cff", ".js"))
            or Path(name).name in ("Makefile", "Snakefile", "Ladder", "run", "workflows")
        )
        and name != "tests/test_language.py"
    ]


def unwrapped(text: str) -> str:
    """A text without line breaks, and without what begins a line of a comment or a list."""
    return re.sub(r"\s*\n\s*(?:(?:#|//|[-*>|])\s?)*", " ", text)


@pytest.mark.parametrize("pattern", [OLD, A_FOR_PER], ids=["old turns", "a for per"])
def test_no_turn_that_readers_have_to_decode(pattern: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}: {text[max(0, turn.start() - 40) : turn.end() + 20]}"
        for file in texts()
        for text in [unwrapped(file.read_text(encoding="utf-8"))]
        for turn in re.finditer(pattern, text, re.IGNORECASE)
    ]
    assert found == []


@pytest.mark.parametrize("line", ["one number a head", "256 tokens a prompt", "four bytes a parameter", "gone on with"])
def test_the_list_finds_what_it_is_for(line: str) -> None:
    assert re.search(f"{OLD}|{A_FOR_PER}", line)


def test_a_turn_across_two_lines_is_found() -> None:
    assert re.search(A_FOR_PER, unwrapped("# it takes four bytes\n# a parameter"))


# Numbers that prose may hold; all others are computed, in cells or by the assembly.
KNOWN = {
    "rules": "0.1 0.2 0.8 10 % 25 % 38.9 % 38.9 80 % 95 % 97.5 % 0.5 1,000",
    "sizes": "2,048 1,024 32,768 4,000 6,000 2,000 5,000 2.4 63 %",
    "paper": "3.1 4.4 1,152",
    "replication": "0.90 0.982 0.72 1.3 50 %",
    "dates": "2026",
}
NOT_PROSE = r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$]*\$|\{[^}]*\}`[^`]*`|\]\([^)]*\)|<[^>]*>|arXiv:[\d.]+"


def prose() -> dict[str, str]:
    """Chapter, or page whose messages are of results -> its prose."""
    found = {name: (ROOT / "book" / name).read_text(encoding="utf-8") for name in ("intro.md", "ladder.md")}
    for file in sorted((ROOT / "notebooks").glob("*.py")):
        cells = re.split(r"^# %%", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        found[file.name] = "\n".join(cell for cell in cells if cell.lstrip().startswith("[markdown]"))
    return {name: re.sub(NOT_PROSE, " ", text, flags=re.DOTALL) for name, text in found.items()}


@pytest.mark.parametrize("name", prose())
def test_numbers_in_prose_are_rules_sizes_or_from_elsewhere(name: str) -> None:
    known = set(" ".join(KNOWN.values()).replace(" %", "%").split())
    numbers = re.findall(r"(?<![\w.])\d+(?:\.\d+)+(?:\s?%)?(?![\w])|\d+\s?%|\b\d[\d,]{3,}\b", prose()[name])
    assert {re.sub(r"\s", "", number) for number in numbers} - known == set()
