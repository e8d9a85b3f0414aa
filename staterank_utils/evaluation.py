"""How well a model does a task: greedy generation, exact scoring, intervals."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils.models import make_cache
from staterank_utils.strata import Estimate, bootstrap
from staterank_utils.tasks import Turn, arithmetic, copying, final_answer, needle, recall, technical_prose

NEEDLE_TOKENS = 1000


@dataclass(frozen=True)
class Task:
    """A way to draw instances and to score an answer.

    Attributes:
        description: one clause, with the sizes.
        draw: (rng, tokenizer) -> an instance.
        score: (generated text, expected answer, tokenizer) -> 0..1.
    """

    description: str
    draw: Callable[[random.Random, Any], Turn]
    score: Callable[[str, str, Any], float]


def _prose_of(tokenizer: Any, n_tokens: int, rng: random.Random) -> str:
    """Unseen technical prose of about `n_tokens` tokens."""
    text = technical_prose()
    start = rng.randrange(len(text) - 8 * n_tokens)
    ids = tokenizer.encode(text[start : start + 8 * n_tokens], add_special_tokens=False)
    return tokenizer.decode(ids[:n_tokens]).strip()


def _draw_needle(rng: random.Random, tokenizer: Any) -> Turn:
    # Three needles and the question take about 90 tokens.
    return needle(rng, _prose_of(tokenizer, NEEDLE_TOKENS - 90, rng), n_needles=3)[0]


def _draw_copying(rng: random.Random, tokenizer: Any) -> Turn:
    return copying(_prose_of(tokenizer, rng.randrange(32, 129), rng))[0]


def exact(generated: str, answer: str, _: Any) -> float:
    """1 where the first line generated is the answer, else 0."""
    return float(generated.split("\n")[0].strip() == answer.strip())


def exact_final(generated: str, answer: str, _: Any) -> float:
    """1 where the number after "The answer is" is right, else 0."""
    return float(final_answer(generated) is not None and final_answer(generated) == final_answer(answer))


def copied_tokens(generated: str, answer: str, tokenizer: Any) -> float:
    """Share of the answer's tokens that stand in the same place of what was generated."""
    expected, got = (tokenizer.encode(text, add_special_tokens=False) for text in (answer.rstrip("\n"), generated))
    return sum(a == b for a, b in zip(expected, got, strict=False)) / len(expected)


TASKS = {
    "needle": Task(
        f"3 needles in {NEEDLE_TOKENS:,} tokens of unseen prose, all three asked for, all right", _draw_needle, exact
    ),
    "arithmetic": Task(
        "a story of 2 to 6 steps, final answer right",
        lambda rng, _: arithmetic(rng, n_steps=rng.randrange(2, 7))[0],
        exact_final,
    ),
    "recall": Task("one of 16 word-number pairs", lambda rng, _: recall(rng, n_pairs=16)[0], exact),
    "copying": Task(
        "a passage of 32 to 128 tokens of unseen prose, share of tokens right", _draw_copying, copied_tokens
    ),
}


def evaluate(
    task: str, model: PreTrainedModel, tokenizer: Any, *, n_instances: int, seed: int = 0, batch_size: int = 16
) -> NDArray[np.float64]:
    """Scores of a model on instances of a task, by greedy generation.

    Args:
        task: a key of `TASKS`.
        model, tokenizer: what is measured.
        n_instances: how many instances are drawn.
        seed: of the instances; none was trained on.
        batch_size: prompts generated side by side, padded on the left.

    Returns:
        One score an instance, 0..1.

    Raises:
        ValueError: an unknown task, or sizes under 1.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    if n_instances < 1 or batch_size < 1:
        raise ValueError(f"n_instances and batch_size must be at least 1, got {n_instances} and {batch_size}")
    rng = random.Random(f"evaluation {task} {seed}")
    turns = [TASKS[task].draw(rng, tokenizer) for _ in range(n_instances)]
    scores: list[float] = []
    for start in tqdm(range(0, n_instances, batch_size), desc=task, unit="batch", leave=False):
        batch = turns[start : start + batch_size]
        budget = max(len(tokenizer.encode(turn.answer, add_special_tokens=False)) for turn in batch) + 8
        texts = generate_greedily(model, tokenizer, [turn.prompt for turn in batch], max_new_tokens=budget)
        scores += [TASKS[task].score(text, turn.answer, tokenizer) for text, turn in zip(texts, batch, strict=True)]
    return np.array(scores)


@torch.inference_mode()
def generate_greedily(model: PreTrainedModel, tokenizer: Any, prompts: list[str], *, max_new_tokens: int) -> list[str]:
    """Continue prompts side by side, most likely token first, until the line ends or the budget does."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(
        model.device
    )
    line_end: list[int] = tokenizer.encode("\n", add_special_tokens=False)
    output: Tensor = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        past_key_values=make_cache(model),
        eos_token_id=[tokenizer.eos_token_id, *line_end[-1:]],
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def score_interval(scores: NDArray[np.float64]) -> Estimate:
    """Mean score with a 95 % interval: Wilson's where every score is 0 or 1, else a bootstrap over instances.

    Example:
        >>> score_interval(np.ones(200)).low > 0.98
        True
    """
    if np.isin(scores, (0.0, 1.0)).all():
        interval = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(method="wilson")
        return Estimate(float(scores.mean()), float(interval.low), float(interval.high))
    return bootstrap(lambda drawn: float(drawn.mean()), scores)
