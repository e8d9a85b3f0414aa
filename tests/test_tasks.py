import inspect
import json
import pydoc_data.topics
import random
import re
from pathlib import Path

import pytest
import torch

from staterank_utils.tasks import (
    DOMAINS,
    arithmetic,
    copying,
    domain_prompts,
    final_answer,
    is_held_out,
    library_sources,
    needle,
    recall,
)


def rng() -> random.Random:
    return random.Random(0)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_gives_what_was_asked_for(domain: str, tokenizer) -> None:
    prompts = domain_prompts(domain, tokenizer, n_prompts=3, n_tokens=101, seed=1)
    assert prompts.shape == (3, 101)
    assert prompts.dtype == torch.int64
    assert torch.equal(prompts, domain_prompts(domain, tokenizer, n_prompts=3, n_tokens=101, seed=1))
    assert not torch.equal(prompts, domain_prompts(domain, tokenizer, n_prompts=3, n_tokens=101, seed=2))
    assert len({tuple(row.tolist()) for row in prompts}) == 3
    assert not set(prompts.flatten().tolist()) & set(tokenizer.all_special_ids)


def test_prose_is_not_trained_on_and_code_is_split_once() -> None:
    assert is_held_out("pydoc_data/topics.py")
    trained, held_out = library_sources(held_out=False), library_sources(held_out=True)
    assert not set(trained) & set(held_out)
    assert 0.05 < len(held_out) / (len(held_out) + len(trained)) < 0.25
    source = Path(inspect.getfile(pydoc_data.topics)).read_text()
    assert source not in trained
    assert source not in held_out


def test_shuffled_prose_has_the_tokens_of_prose(tokenizer) -> None:
    shuffled, prose = (
        domain_prompts(domain, tokenizer, n_prompts=3, n_tokens=200, seed=4) for domain in ("shuffled prose", "prose")
    )
    assert torch.equal(shuffled.sort(1).values, prose.sort(1).values)
    assert (shuffled != prose).any(1).all()


def test_a_file_and_a_dataset_of_the_reader_s_own(tokenizer, tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog. " * 200
    (tmp_path / "mine.txt").write_text(text)
    assert domain_prompts(str(tmp_path / "mine.txt"), tokenizer, n_prompts=2, n_tokens=50, seed=0).shape == (2, 50)
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"body": text}))
    spec = f"dataset:{tmp_path / 'data'}:train:body"
    assert domain_prompts(spec, tokenizer, n_prompts=2, n_tokens=50, seed=0).shape == (2, 50)
    with pytest.raises(ValueError, match=r"has the columns \['body'\], not 'text'"):
        domain_prompts(f"dataset:{tmp_path / 'data'}", tokenizer, n_prompts=2, n_tokens=50, seed=0)


@pytest.mark.parametrize(
    ("domain", "sizes", "words"),
    [
        ("pros", {"n_prompts": 1, "n_tokens": 8}, "unknown domain 'pros'"),
        ("prose", {"n_prompts": 0, "n_tokens": 8}, "at least 1"),
        ("prose", {"n_prompts": 1000, "n_tokens": 2048}, "too few for 1000 prompts of 2048"),
        ("rare character", {"n_prompts": 99, "n_tokens": 8}, "99 were asked for"),
        ("dataset:a:b:c:d", {"n_prompts": 1, "n_tokens": 8}, "expected dataset:NAME"),
    ],
)
def test_bad_requests_are_refused(domain: str, sizes: dict[str, int], words: str, tokenizer) -> None:
    with pytest.raises(ValueError, match=words):
        domain_prompts(domain, tokenizer, **sizes, seed=0)


def test_a_missing_file_is_refused(tokenizer) -> None:
    with pytest.raises(FileNotFoundError):
        domain_prompts("nowhere/text.txt", tokenizer, n_prompts=1, n_tokens=8, seed=0)


def test_needles_are_in_the_haystack_and_the_answer_names_them_in_order() -> None:
    [turn] = needle(rng(), "some words here " * 50, n_needles=5, n_asked=3)
    hidden = dict(re.findall(r"The secret number of (\w+) is (\d{5})\.", turn.prompt))
    asked = re.findall(r"\w+", turn.prompt.split("secret number of ")[-1].split("?")[0])
    assert len(hidden) == 5
    assert turn.answer.strip() == ", ".join(hidden[key] for key in asked)


@pytest.mark.parametrize("n_steps", [1, 3, 7])
def test_worked_solutions_are_right(n_steps: int) -> None:
    generator = rng()
    for _ in range(200):
        [turn] = arithmetic(generator, n_steps=n_steps)
        steps = re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)\.", turn.answer)
        assert len(steps) == n_steps
        for left, sign, right, result in steps:
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign] == int(
                result
            )
        assert final_answer(turn.answer) == int(steps[-1][3]) < 1000


def test_recall_asks_for_what_was_listed() -> None:
    turns = recall(rng(), n_pairs=16, n_asked=16)
    listed = dict(re.findall(r"(\w+) (\d{3})[;.]", turns[0].prompt))
    assert {turn.prompt.split()[-1].rstrip(":"): turn.answer.strip() for turn in turns} == listed


def test_final_answer_needs_one() -> None:
    assert final_answer("no answer") is None
    assert final_answer("The answer is none.") is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: needle(rng(), "x", n_needles=2, n_asked=3),
        lambda: arithmetic(rng(), n_steps=0),
        lambda: recall(rng(), n_pairs=3, n_asked=4),
        lambda: copying(" \n "),
    ],
    ids=["needle", "arithmetic", "recall", "copying"],
)
def test_impossible_instances_are_refused(call) -> None:
    with pytest.raises(ValueError, match="need 1|at least 1|empty"):
        call()
