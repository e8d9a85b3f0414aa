"""Prompts: tasks with known answers, and input domains without.

Everything here is made from the Python installation alone, so any machine can do it without a network:

- *Tasks* (`needle`, `arithmetic`, `recall`, `copying`) are lists of turns. A turn is a prompt and the answer
  that must follow it; a later turn continues the text of the earlier ones.
- *Domains* (`DOMAINS`) are texts of a kind. `domain_prompts` cuts them into equal lengths of tokens.

The split between training and the rest: `pydoc_data.topics` (technical prose) is never trained on, and a file of
the standard library is held out when `is_held_out` says so; training reads the other files only.
"""

import hashlib
import itertools
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

NAMES = tuple(
    "Anna Bob Clara David Emma Frank Grace Henry Iris Jack Kate Leo Mary Nick Olga Paul Rosa Sam Tom Vera".split()
)
ITEMS = tuple(
    "apples books boxes cards coins eggs flowers keys lamps letters maps pears pens plums ropes seeds shells stones".split()
)
WORDS = tuple(
    """anchor apple arrow autumn basket beacon bell bishop blanket bottle branch bridge bronze bucket butter button camel candle
    canvas carpet castle cellar chapel cherry chimney circle cliff cloud clover coffee copper coral corner cotton cradle crown
    crystal curtain dagger desert dragon dream drum eagle ember engine falcon feather fiddle finger flame forest fountain fox
    galley garden garlic glacier glove granite hammer harbour harvest hazel helmet honey horizon island ivory jacket jewel
    journey kettle kitchen ladder lantern laurel lemon library lily lizard magnet mantle maple marble market meadow mirror
    monkey mountain needle nettle oak ocean olive orchard oyster paddle palace parrot pebble pepper pillow pirate planet pocket
    poplar prairie quarry rabbit raven ribbon river rocket saddle sailor salmon scarlet shadow shelter silver smoke spider
    spring staircase summer sunset tailor temple thistle thunder timber tower tunnel turtle valley velvet village violin walnut
    wagon water whistle willow window winter wizard wool yarrow zebra""".split()
)
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings"}
RARE_CHARACTERS = tuple("§¶†‡¤‖※⁂₪₮℞℥⌘⍟☙❧")
COMMON_NUMBERS = ("1", "2", "3", "5", "7", "10", "12", "20", "24", "42", "50", "60", "100", "365", "1000", "2000")


@dataclass(frozen=True)
class Turn:
    """A prompt and the answer that must follow it, both text; the answer ends its line.

    Example:
        >>> [turn] = recall(random.Random(0), n_pairs=2)
        >>> turn.prompt.splitlines()[0][:6], turn.answer.endswith("\\n")
        ('List: ', True)
    """

    prompt: str
    answer: str


# ---------------------------------------------------------------- tasks


def needle(
    rng: random.Random, filler: str, *, n_needles: int = 3, n_asked: int | None = None, depth: float | None = None
) -> list[Turn]:
    """Hide secret numbers in a text and ask for them.

    Source: the retrieval test of arXiv:2602.02195 is named but not published; this is a multi-key needle in a haystack.

    Args:
        rng: source of all choices.
        filler: the haystack; sentences are put between its words.
        n_needles: how many numbers are hidden.
        n_asked: how many are asked for in the one question, in random order; all of them by default.
        depth: share of the filler's words that stand before the needles, 0..1; random for each by default.

    Returns:
        One turn. Its answer lists the five-digit numbers, separated by commas.

    Raises:
        ValueError: `n_asked` is not in 1..n_needles, there are more needles than words to name them, or `depth` is outside
            0..1.

    Example:
        >>> [turn] = needle(random.Random(0), "A quiet street at night.", n_needles=1)
        >>> "The secret number of" in turn.prompt, len(turn.answer)
        (True, 7)
    """
    n_asked = n_needles if n_asked is None else n_asked
    if not 1 <= n_asked <= n_needles <= len(WORDS):
        raise ValueError(
            f"need 1 <= n_asked <= n_needles <= {len(WORDS)}, got n_asked={n_asked}, n_needles={n_needles}"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is a share of the filler, 0..1, got {depth}")
    keys = rng.sample(WORDS, n_needles)
    numbers = {key: str(rng.randrange(10_000, 100_000)) for key in keys}
    words = filler.split(" ")
    at_depth = None if depth is None else round(depth * len(words))
    for key in keys:
        words.insert(
            rng.randrange(len(words) + 1) if at_depth is None else at_depth,
            f"The secret number of {key} is {numbers[key]}.",
        )
    asked = rng.sample(keys, n_asked)
    question = f"Question: What is the secret number of {', '.join(asked)}?"
    return [Turn(" ".join(words) + f"\n{question}\nAnswer:", " " + ", ".join(numbers[key] for key in asked) + "\n")]


def arithmetic(rng: random.Random, *, n_steps: int) -> list[Turn]:
    """Tell a story in which a number changes `n_steps` times, and ask for the result.

    The answer works the steps out one by one, as in a GSM8K solution; `final_answer` reads the result from it.
    Numbers stay in 0..999.

    Args:
        rng: source of all choices.
        n_steps: how many times the number changes, at least 1.

    Returns:
        One turn.

    Raises:
        ValueError: `n_steps` is under 1.

    Example:
        >>> [turn] = arithmetic(random.Random(3), n_steps=2)
        >>> final_answer(turn.answer) is not None
        True
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    total = rng.randrange(2, 100)
    story, work = [f"{name} has {total} {item}."], []
    for _ in range(n_steps):
        kind = rng.choice(("gain", "gain", "lose", "lose", "double") if total <= 100 else ("gain", "lose", "lose"))
        if kind == "double":
            story.append(f"{name} doubles the number of {item}.")
            work.append(f"{total} * 2 = {2 * total}.")
            total *= 2
        elif kind == "gain" or total < 2:
            amount = rng.randrange(1, 100)
            story.append(f"{name} {rng.choice(('buys', 'finds', 'gets'))} {amount} more.")
            work.append(f"{total} + {amount} = {total + amount}.")
            total += amount
        else:
            amount = rng.randrange(1, min(total, 100))
            story.append(f"{name} {rng.choice(('gives away', 'loses', 'sells'))} {amount}.")
            work.append(f"{total} - {amount} = {total - amount}.")
            total -= amount
    prompt = f"Question: {' '.join(story)} How many {item} does {name} have?\nSolution:"
    return [Turn(prompt, f" {' '.join(work)} The answer is {total}.\n")]


def recall(rng: random.Random, *, n_pairs: int = 16, n_asked: int = 1) -> list[Turn]:
    """List word-number pairs, then ask for the number of some of the words.

    Args:
        rng: source of all choices.
        n_pairs: length of the list.
        n_asked: how many words are asked for, one turn each, no word twice.

    Returns:
        `n_asked` turns; the first holds the list.

    Raises:
        ValueError: `n_asked` is not in 1..n_pairs, or there are more pairs than words.

    Example:
        >>> len(recall(random.Random(0), n_pairs=16, n_asked=2))
        2
    """
    if not 1 <= n_asked <= n_pairs <= len(WORDS):
        raise ValueError(f"need 1 <= n_asked <= n_pairs <= {len(WORDS)}, got n_asked={n_asked}, n_pairs={n_pairs}")
    keys = rng.sample(WORDS, n_pairs)
    numbers = {key: rng.randrange(100, 1000) for key in keys}
    listing = "List: " + "; ".join(f"{key} {numbers[key]}" for key in keys) + ".\n"
    turns = [Turn(f"Recall {key}:", f" {numbers[key]}\n") for key in rng.sample(keys, n_asked)]
    return [Turn(listing + turns[0].prompt, turns[0].answer), *turns[1:]]


def copying(passage: str, *, gap: str = "") -> list[Turn]:
    """Show a passage and ask for it again, word for word.

    Args:
        passage: what is to be copied; line breaks become spaces, so that the answer is one line.
        gap: text between the passage and the request.

    Returns:
        One turn.

    Raises:
        ValueError: the passage is empty.

    Example:
        >>> copying("to be or not")[0].answer
        ' to be or not\\n'
    """
    passage = " ".join(passage.split())
    if not passage:
        raise ValueError("the passage to copy is empty")
    return [Turn(f"Passage: {passage}\n{gap}Repeat the passage:", f" {passage}\n")]


def final_answer(text: str) -> int | None:
    """The number after the first "The answer is" in a worked solution, or None where there is none.

    Args:
        text: of the solution.

    Example:
        >>> final_answer(" 12 + 7 = 19. The answer is 19.")
        19
    """
    _, found, tail = text.partition("The answer is ")
    digits = "".join(itertools.takewhile(str.isdigit, tail))
    return int(digits) if found and digits else None


# ---------------------------------------------------------------- domains


def is_held_out(path: str) -> bool:
    """Whether a file of the standard library is kept from training.

    One file in eight, by the SHA-256 of its path under the library's folder with forward slashes, so that the split
    is the same on every machine. `pydoc_data` is held out whole.

    Args:
        path: under the library's folder, with forward slashes.

    Example:
        >>> is_held_out("pydoc_data/topics.py")
        True
    """
    return path.startswith("pydoc_data/") or hashlib.sha256(path.encode()).digest()[0] < 32


@cache
def library_sources(*, held_out: bool) -> tuple[str, ...]:
    """Texts of the running Python's standard library: the held-out files, or all the others.

    Left out: installed packages, Python's own test suite (absent from many installations), tables of encodings, empty files,
    the few that are not UTF-8, and a held-out file whose text stands in another file too. Sorted by path.

    Args:
        held_out: which of the two.

    Raises:
        RuntimeError: the installation has no source files.

    Example:
        >>> held_out, trained_on = (set(library_sources(held_out=part)) for part in (True, False))
        >>> 0 < len(held_out) < len(trained_on), held_out & trained_on
        (True, set())
    """
    root = Path(sysconfig.get_path("stdlib"))
    seen = set(library_sources(held_out=False)) if held_out else set()
    texts = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if LEFT_OUT & set(path.split("/")):
            continue
        if path.startswith("pydoc_data/") or is_held_out(path) != held_out:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and text not in seen:
            texts.append(text)
    if not texts:
        raise RuntimeError(f"no Python sources under {root}: this installation cannot provide the 'code' domain")
    return tuple(texts)


@cache
def technical_prose() -> str:
    """Python's language reference as plain text (`pydoc_data.topics`), never trained on.

    Returns:
        About 460,000 characters.

    Example:
        >>> len(technical_prose()) > 400_000, "The \\"assert\\" statement" in technical_prose()
        (True, True)
    """
    return "\n\n".join(topics[name] for name in sorted(topics))


@cache
def held_out_books() -> tuple[str, ...]:
    """Passages of twelve public-domain books that no embedded model and no model of the ladder was trained on.

    Source: `texts/README.md` beside this file.

    Example:
        >>> len(held_out_books()), sum(map(len, held_out_books())) > 240_000
        (12, True)
    """
    text = Path(__file__).with_name("texts").joinpath("books.txt").read_text(encoding="utf-8")
    return tuple(passage.partition("\n\n")[2].strip() for passage in text.split("\f"))


def text_tokens(text: str, tokenizer: Any) -> Int[Tensor, " n"]:
    """All tokens of a text that no model was trained on.

    Args:
        text: a key of `TEXTS`.
        tokenizer: of the model that will read them.

    Raises:
        ValueError: an unknown text.

    Example:
        >>> from staterank_utils import load_tokenizer
        >>> len(text_tokens("books", load_tokenizer("hybrid"))) > 50_000
        True
    """
    if text not in TEXTS:
        raise ValueError(f"unknown text {text!r}: choose from {', '.join(TEXTS)}")
    return _encode_all(_joined(TEXTS[text]()), tokenizer)


def _joined(text_or_texts: str | tuple[str, ...]) -> str:
    return text_or_texts if isinstance(text_or_texts, str) else "\n\n".join(text_or_texts)


def _pieces(texts: Iterator[str], tokenizer: Any, n_tokens: int) -> Int[Tensor, " n_tokens"]:
    """The first `n_tokens` tokens of the texts, one after the other."""
    ids: list[int] = []
    while len(ids) < n_tokens:
        text = next(texts)
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if not encoded:
            raise ValueError(
                f"the tokenizer makes no token of {text[:20]!r}: it drops these characters, so take another domain"
            )
        ids += encoded
    return torch.tensor(ids[:n_tokens])


def _windows(
    text_or_texts: str | tuple[str, ...], tokenizer: Any, n_prompts: int, n_tokens: int, rng: random.Random
) -> Tensor:
    """Windows at random places of a text, no two overlapping."""
    ids = _encode_all(_joined(text_or_texts), tokenizer)
    n_windows = len(ids) // n_tokens
    if n_windows < n_prompts:
        raise ValueError(
            f"the text has {len(ids)} tokens, too few for {n_prompts} prompts of {n_tokens}: lower n_prompts or n_tokens, or give a longer text"
        )
    starts = sorted(rng.sample(range(n_windows), n_prompts))
    return torch.stack([ids[i * n_tokens : (i + 1) * n_tokens] for i in starts])


def _encode_all(text: str, tokenizer: Any) -> Int[Tensor, " n"]:
    """Token ids of a long text, encoded in pieces of about 64,000 characters that end at line breaks."""
    pieces, piece, size = [], [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size > 64_000:
            pieces.append("".join(piece))
            piece, size = [], 0
    pieces.append("".join(piece))
    encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return torch.tensor(list(itertools.chain.from_iterable(encoded)))


TEXTS: dict[str, Callable[[], str | tuple[str, ...]]] = {
    "prose": technical_prose,
    "code": partial(library_sources, held_out=True),
    "books": held_out_books,
}


def _text(name: str) -> Callable[[Any, int, int, random.Random], Tensor]:
    def windows(tokenizer: Any, n_prompts: int, n_tokens: int, rng: random.Random) -> Tensor:
        return _windows(TEXTS[name](), tokenizer, n_prompts, n_tokens, rng)

    return windows


def _arithmetic(tokenizer: Any, n_prompts: int, n_tokens: int, rng: random.Random) -> Tensor:
    def stories() -> Iterator[str]:
        while True:
            [turn] = arithmetic(rng, n_steps=rng.randrange(2, 7))
            yield turn.prompt + turn.answer

    return torch.stack([_pieces(stories(), tokenizer, n_tokens) for _ in range(n_prompts)])


def _retrieval(tokenizer: Any, n_prompts: int, n_tokens: int, rng: random.Random) -> Tensor:
    text = technical_prose()

    def haystacks() -> Iterator[str]:
        while True:
            start = rng.randrange(len(text) - 4 * n_tokens)
            [turn] = needle(rng, text[start : start + 3 * n_tokens], n_needles=8, n_asked=8)
            yield turn.prompt + turn.answer

    return torch.stack([_pieces(haystacks(), tokenizer, n_tokens) for _ in range(n_prompts)])


def _repeated(
    symbols: tuple[str, ...], separator: str, tokenizer: Any, n_prompts: int, n_tokens: int, rng: random.Random
) -> Tensor:
    if n_prompts > len(symbols):
        raise ValueError(f"there are {len(symbols)} different prompts of this kind, {n_prompts} were asked for")
    chosen = rng.sample(symbols, n_prompts)
    return torch.stack(
        [_pieces(itertools.repeat((symbol + separator) * 512), tokenizer, n_tokens) for symbol in chosen]
    )


def _rare_character(tokenizer: Any, n_prompts: int, n_tokens: int, rng: random.Random) -> Tensor:
    return _repeated(RARE_CHARACTERS, "", tokenizer, n_prompts, n_tokens, rng)


def _common_number(tokenizer: Any, n_prompts: int, n_tokens: int, rng: random.Random) -> Tensor:
    return _repeated(COMMON_NUMBERS, " ", tokenizer, n_prompts, n_tokens, rng)


def _random_tokens(tokenizer: Any, n_prompts: int, n_tokens: int, rng: random.Random) -> Tensor:
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    return torch.tensor([rng.choices(ordinary, k=n_tokens) for _ in range(n_prompts)])


def _shuffled_prose(tokenizer: Any, n_prompts: int, n_tokens: int, rng: random.Random) -> Tensor:
    prompts = _text("prose")(tokenizer, n_prompts, n_tokens, rng)
    return torch.stack([row[torch.tensor(rng.sample(range(n_tokens), n_tokens))] for row in prompts])


DOMAINS: dict[str, Callable[[Any, int, int, random.Random], Tensor]] = {
    "prose": _text("prose"),
    "code": _text("code"),
    "books": _text("books"),
    "arithmetic": _arithmetic,
    "retrieval": _retrieval,
    "rare character": _rare_character,
    "common number": _common_number,
    "random tokens": _random_tokens,
    "shuffled prose": _shuffled_prose,
}
NATURAL_DOMAINS = ("prose", "code", "arithmetic", "retrieval")
ADVERSARIAL_DOMAINS = ("rare character", "common number", "random tokens", "shuffled prose")


def domain_prompts(
    domain: str, tokenizer: Any, *, n_prompts: int, n_tokens: int, seed: int
) -> Int[Tensor, "n_prompts n_tokens"]:
    """Prompts of one kind, all of the same length.

    Source: the domains follow finding F3 of arXiv:2602.02195; its own prompt set is not published.

    Args:
        domain: a key of `DOMAINS`; or the path of a text file (UTF-8); or `dataset:NAME[:SPLIT[:COLUMN]]`, a Hugging Face
            dataset read with the `datasets` package (split "train" and column "text" unless said).
        tokenizer: of the model that will read them.
        n_prompts: how many; for the repeated symbols at most 16, since each prompt repeats another one.
        n_tokens: their length in tokens.
        seed: of all choices. The same seed gives the same prompts on the same version of Python.

    Returns:
        Token ids.

    Raises:
        ValueError: an unknown domain, sizes under 1, a text too short or not in UTF-8.
        FileNotFoundError: `domain` looks like a path and there is no such file.

    Example:
        >>> from staterank_utils import load_tokenizer
        >>> domain_prompts("prose", load_tokenizer("hybrid"), n_prompts=2, n_tokens=64, seed=0).shape
        torch.Size([2, 64])
    """
    if n_prompts < 1 or n_tokens < 1:
        raise ValueError(f"n_prompts and n_tokens must be at least 1, got {n_prompts} and {n_tokens}")
    # Shuffled prose begins with the draws of prose, and so shuffles the same passages.
    is_path = domain not in DOMAINS and not domain.startswith("dataset:")
    name = "prose" if domain == "shuffled prose" else Path(domain).name if is_path else domain
    rng = random.Random(f"{name} {seed}")
    if domain in DOMAINS:
        return DOMAINS[domain](tokenizer, n_prompts, n_tokens, rng)
    if domain.startswith("dataset:"):
        return _windows(_dataset_text(domain), tokenizer, n_prompts, n_tokens, rng)
    if "/" in domain or domain.endswith((".txt", ".md", ".rst")):
        try:
            text = Path(domain).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{domain} is no text in UTF-8: {error}") from error
        return _windows(text, tokenizer, n_prompts, n_tokens, rng)
    raise ValueError(
        f"unknown domain {domain!r}: choose from {', '.join(DOMAINS)}, a path to a text file, or dataset:NAME"
    )


def _dataset_text(spec: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{spec!r} needs the datasets package: pip install datasets") from error
    name, *rest = spec.removeprefix("dataset:").split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"{spec!r}: expected dataset:NAME[:SPLIT[:COLUMN]]")
    split, column = [*rest, *("train", "text")[len(rest) :]]
    data = load_dataset(name, split=split)
    if column not in data.column_names:
        raise ValueError(
            f"{spec!r} has the columns {data.column_names}, not {column!r}: write dataset:NAME:SPLIT:COLUMN"
        )
    return "\n\n".join(data[column])
