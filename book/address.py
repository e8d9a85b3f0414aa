"""The address of the repository: `_config.yml` holds it, and this writes it wherever a file must name it.

python -m book.address [https://github.com/OWNER/NAME]
"""

import argparse
import re
from pathlib import Path

import yaml

from staterank_utils.results import whole_or_not

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "README.md",
    "CITATION.cff",
    "pyproject.toml",
    "book/intro.md",
    *(f"notebooks/{file.name}" for file in (ROOT / "notebooks").glob("*.py")),
)
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]*[\w-]")


def address() -> str:
    """As `_config.yml` says, from which launch buttons and links to sources take it too."""
    found: str = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    return found


def write(new: str) -> list[str]:
    """Put an address into `_config.yml` and every file that names it.

    Args:
        new: https://github.com/OWNER/NAME.

    Returns:
        The files that changed.

    Raises:
        ValueError: not such an address.
    """
    if not ADDRESS.fullmatch(new):
        raise ValueError(f"expected an address https://github.com/OWNER/NAME, got {new!r}")
    old, changed = address(), []
    for name in ("_config.yml", *FILES):
        text = (ROOT / name).read_text(encoding="utf-8")
        if old in text and old != new:
            with whole_or_not(ROOT / name) as partial:
                before, after = (f"cd {each.rpartition('/')[2]}" for each in (old, new))  # into what a clone makes
                partial.write_text(text.replace(old, new).replace(before, after), encoding="utf-8")
            changed.append(name)
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", nargs="?", help="the new address; without it, the one that is set is printed")
    new = parser.parse_args().new
    if new is None:
        print(address())
        return
    print("\n".join(write(new)) or "nothing to change")
    print("now run `make notebooks`")


if __name__ == "__main__":
    main()
