"""How well a model does the tasks, by greedy generation, and how well it predicts text.

A task is scored on the tokens that the model would generate, greedily, one after the other. Where one wrong token already
decides the score, none is generated after it; see `decoding.generate_greedily`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils.budget import out_of_memory
from staterank_utils.decoding import Tokens, generate_greedily
from staterank_utils.models import check_ids, check_tokenizer, output_logits, read_tokens
from staterank_utils.strata import Estimate, bootstrap
from staterank_utils.tasks import Turn, arithmetic, copying, final_answer, needle, recall, technical_prose

SPARE = 8  # tokens that a continuation may be longer than the answer


@dataclass(frozen=True)
class Task:
    """A way to draw instances and to score an answer.

    Attributes:
        description: one clause, with the sizes.
        draw: (rng, tokenizer) -> an instance.
        score: (tokens generated, tokens of the answer, tokenizer) -> 0..1.
        first_error_decides: the score is known at the first token that differs from the answer.

    Example:
        >>> sum_of_two = Task("one sum", lambda rng, _: Turn(f"1 + {rng.randrange(1, 9)} =", " ?\\n"), exact)
        >>> sum_of_two.draw(random.Random(0), None).prompt
        '1 + 7 ='
    """

    description: str
    draw: Callable[[random.Random, Any], Turn]
    score: Callable[[Tokens, Tokens, Any], float]
    first_error_decides: bool = False


def exact(generated: Tokens, answer: Tokens, _: Any) -> float:
    """1 where the tokens generated begin with the answer's, the end of its line included, else 0.

    Args:
        generated, answer: token ids.

    Example:
        >>> exact([5, 6, 7], [5, 6], None), exact([5, 7], [5, 6], None)
        (1.0, 0.0)
    """
    return float(generated[: len(answer)] == answer)


def exact_final(generated: Tokens, answer: Tokens, tokenizer: Any) -> float:
    """1 where the number after "The answer is" is right, else 0, also where there is none.

    Args:
        generated, answer: token ids.
        tokenizer: that made them.

    Example:
        >>> from staterank_utils import load_tokenizer
        >>> tokenizer = load_tokenizer("hybrid")
        >>> texts = " 2 + 2 = 4. The answer is 4.", " The answer is 4.", " The answer is 5."
        >>> said = [tokenizer.encode(text) for text in texts]
        >>> [exact_final(tokens, said[0], tokenizer) for tokens in said]
        [1.0, 1.0, 0.0]
    """
    said, expected = (final_answer(tokenizer.decode(tokens)) for tokens in (generated, answer))
    return float(said is not None and said == expected)


def copied_tokens(generated: Tokens, answer: Tokens, _: Any) -> float:
    """Share of the answer's tokens that stand in the same place of what was generated.

    The answer's last token ends its line and is left out.

    Args:
        generated: token ids, any number.
        answer: token ids, at least 2.

    Example:
        >>> copied_tokens([5, 6, 9], [5, 6, 7, 8, 1], None)
        0.5
    """
    return sum(a == b for a, b in zip(answer[:-1], generated, strict=False)) / (len(answer) - 1)


def needle_task(n_needles: int = 3, n_tokens: int = 1000, depth: float | None = None) -> Task:
    """Needles in unseen technical prose, all asked for and all right.

    Args:
        n_needles: how many.
        n_tokens: length of the whole prompt, roughly: a needle and its share of the question take about 25 tokens.
        depth: where the needles stand, 0 (start) to 1 (end, right before the question); anywhere by default.

    Raises:
        ValueError: when an instance is drawn, and the prompt has no room for prose; or as in `tasks.needle`.

    Example:
        >>> needle_task(1, 256).description
        'one needle in 256 tokens of unseen prose'
    """
    return Task(
        ("one needle" if n_needles == 1 else f"{n_needles} needles")
        + f" in {n_tokens:,} tokens of unseen prose"
        + (", all asked for, all right" if n_needles > 1 else ""),
        lambda rng, tokenizer: needle(
            rng, _prose_of(tokenizer, n_tokens - 15 - 25 * n_needles, rng), n_needles=n_needles, depth=depth
        )[0],
        exact,
        first_error_decides=True,
    )


def arithmetic_task(fewest: int = 2, most: int = 6) -> Task:
    """A story with `fewest` to `most` steps, final answer right.

    Example:
        >>> arithmetic_task(4, 4).description
        'a story of 4 steps, final answer right'
    """
    steps = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return Task(
        f"a story of {steps} steps, final answer right",
        lambda rng, _: arithmetic(rng, n_steps=rng.randrange(fewest, most + 1))[0],
        exact_final,
    )


def recall_task(n_pairs: int = 16) -> Task:
    """The number of one of `n_pairs` words.

    Example:
        >>> recall_task().description
        'one of 16 word-number pairs'
    """
    return Task(
        f"one of {n_pairs} word-number pairs",
        lambda rng, _: recall(rng, n_pairs=n_pairs)[0],
        exact,
        first_error_decides=True,
    )


def copying_task(fewest: int = 32, most: int = 128) -> Task:
    """A passage of unseen technical prose, said again; the share of its tokens that are right.

    Example:
        >>> copying_task().description
        'a passage of 32 to 128 tokens of unseen prose, share of tokens right'
    """
    return Task(
        f"a passage of {fewest} to {most} tokens of unseen prose, share of tokens right",
        lambda rng, tokenizer: copying(_prose_of(tokenizer, rng.randrange(fewest, most + 1), rng))[0],
        copied_tokens,
    )


TASKS = {
    "needle": needle_task(),
    "arithmetic": arithmetic_task(),
    "recall": recall_task(),
    "copying": copying_task(),
}


def _prose_of(tokenizer: Any, n_tokens: int, rng: random.Random) -> str:
    """Unseen technical prose of about `n_tokens` tokens."""
    if n_tokens < 1:
        raise ValueError(f"there is no room for prose: {n_tokens} tokens are left for it; ask for a longer prompt")
    text = technical_prose()
    start = rng.randrange(len(text) - 8 * n_tokens)
    ids = tokenizer.encode(text[start : start + 8 * n_tokens], add_special_tokens=False)
    return str(tokenizer.decode(ids[:n_tokens])).strip()


@cache
def line_ends(tokenizer: Any) -> frozenset[int]:
    """The tokens that end a line, and with it an answer: all that hold a line break, and the end of text.

    Example:
        >>> from staterank_utils import load_tokenizer
        >>> tokenizer = load_tokenizer("hybrid")
        >>> set(tokenizer.encode("\\n")) < line_ends(tokenizer)
        True
    """
    every = range(len(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in every])
    return frozenset({tokenizer.eos_token_id, *(token for token in every if "\n" in texts[token])})


class Instance(NamedTuple):
    """Token ids of a prompt and of its answer.

    Example:
        >>> from staterank_utils import load_tokenizer
        >>> tokenizer = load_tokenizer("hybrid")
        >>> [instance] = draw_instances("recall", tokenizer, n_instances=1)
        >>> tokenizer.decode(instance.prompt)[:6], tokenizer.decode(instance.answer)[-1:]
        ('List: ', '\\n')
    """

    prompt: Tokens
    answer: Tokens


def draw_instances(task: Task | str, tokenizer: Any, *, n_instances: int, seed: int = 0) -> list[Instance]:
    """Instances of a task as tokens; which ones follows from the task, the number of the instance and the seed alone.

    Args:
        task: a `Task`, or a key of `TASKS`.
        tokenizer: of the model that will answer.
        n_instances: how many, at least 1.
        seed: of the instances; none was trained on.

    Raises:
        ValueError: an unknown task, or no instances.

    Example:
        >>> from staterank_utils import load_tokenizer
        >>> len(draw_instances("recall", load_tokenizer("hybrid"), n_instances=2))
        2
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
        task = TASKS[task]
    if n_instances < 1:
        raise ValueError(f"n_instances must be at least 1, got {n_instances}")
    return list(_drawn(task, tokenizer, n_instances, seed))


@lru_cache(maxsize=64)
def _drawn(task: Task, tokenizer: Any, n_instances: int, seed: int) -> tuple[Instance, ...]:
    """Kept, since the same instances are answered by one model after the other."""
    instances = []
    for number in range(n_instances):
        turn = task.draw(random.Random(f"evaluation {task.description} {seed} {number}"), tokenizer)
        # Prompt and answer are encoded apart, as they were in training.
        instances.append(
            Instance(*(tokenizer.encode(text, add_special_tokens=False) for text in (turn.prompt, turn.answer)))
        )
    return tuple(instances)


def evaluate(
    task: Task | str, model: PreTrainedModel, tokenizer: Any, *, n_instances: int, seed: int = 0, batch_size: int = 16
) -> NDArray[np.float64]:
    """Scores of a model on instances of a task, by greedy generation.

    Args:
        task, n_instances, seed: as in `draw_instances`.
        model, tokenizer: what is measured.
        batch_size: prompts answered side by side, padded on the left.

    Returns:
        One score per instance, 0..1.

    Raises:
        ValueError: an unknown task, or sizes under 1.
        torch.OutOfMemoryError: with what to lower.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> evaluate("recall", load_model("hybrid"), load_tokenizer("hybrid"), n_instances=2)  # trained on text alone
        array([0., 0.])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_tokenizer(model, tokenizer)
    instances = draw_instances(task, tokenizer, n_instances=n_instances, seed=seed)
    task = TASKS[task] if isinstance(task, str) else task
    scores: list[float] = []
    starts = range(0, n_instances, batch_size)
    for start in tqdm(starts, desc=task.description, unit="batch", leave=False, disable=len(starts) == 1):
        prompts, answers = map(list, zip(*instances[start : start + batch_size], strict=True))
        with out_of_memory(
            f"not enough memory for {len(prompts)} prompts of up to {max(map(len, prompts)):,} tokens",
            advice="lower batch_size",
        ):
            made = generate_greedily(
                model,
                prompts,
                max_new_tokens=[len(answer) + SPARE for answer in answers],
                stop=line_ends(tokenizer),
                drafts=answers,
                first_error_ends=task.first_error_decides,
            )
        scores += [task.score(tokens, answer, tokenizer) for tokens, answer in zip(made, answers, strict=True)]
    return np.array(scores)


def score_interval(scores: NDArray[np.float64]) -> Estimate:
    """Mean score with a 95 % interval: Wilson's where every score is 0 or 1, else a bootstrap over instances.

    Source: Wilson, J. Am. Stat. Assoc. 22(158), 1927.

    Args:
        scores: one an instance, 0..1, at least one.

    Raises:
        ValueError: no scores, or a NaN or infinity.

    Example:
        >>> score_interval(np.ones(200)).low > 0.98
        True
    """
    if np.isin(scores, (0.0, 1.0)).all():
        interval = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(method="wilson")
        return Estimate(float(scores.mean()), float(interval.low), float(interval.high))
    return bootstrap(float, scores, of_means=True)


# ---------------------------------------------------------------- without generation


@torch.inference_mode()
def answer_nats(
    task: Task | str,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    n_instances: int,
    seed: int = 0,
    batch_size: int = 16,
    read: Callable[[Tensor], Tensor] | None = None,
) -> NDArray[np.float64]:
    """Mean loss on the tokens of the right answer: damage in degrees, where scores only know right and wrong.

    Args:
        task, n_instances, seed: as in `draw_instances`.
        model, tokenizer: what is measured.
        batch_size: prompts read side by side, padded on the right, where a causal model never looks.
        read: (token ids (row, token)) -> hidden states, in the place of the model's own forward, such as
            `surgery.forward_with_edits` with its arguments bound.

    Returns:
        One mean per instance, nats per token; the logarithm of the vocabulary's size is chance.

    Raises:
        ValueError: an unknown task, or no instances.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> answer_nats("recall", load_model("hybrid"), load_tokenizer("hybrid"), n_instances=2).shape
        (2,)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_tokenizer(model, tokenizer)
    instances = draw_instances(task, tokenizer, n_instances=n_instances, seed=seed)
    losses = []
    for batch in (instances[start : start + batch_size] for start in range(0, n_instances, batch_size)):
        rows = [torch.tensor([*prompt, *answer]) for prompt, answer in batch]
        ids = pad_sequence(rows, batch_first=True).to(model.device)
        hidden = read(ids) if read else read_tokens(model, ids)
        for row, (prompt, answer) in enumerate(batch):
            end = len(prompt) + len(answer)
            logits = output_logits(model, hidden[row, len(prompt) - 1 : end - 1])
            losses.append(F.cross_entropy(logits.double(), ids[row, len(prompt) : end]).item())
    return np.array(losses)


@torch.inference_mode()
def token_nats(
    model: PreTrainedModel, input_ids: Int[Tensor, "prompt token"], *, batch_size: int | None = None
) -> NDArray[np.float64]:
    """Loss of predicting each token of a text from those before it.

    Args:
        model: what is measured.
        input_ids: texts of equal length, at least 2 tokens.
        batch_size: texts read side by side; by default 1 on a CPU and 32 elsewhere.

    Returns:
        (prompt, token - 1), nats; the first token of a text is given, not predicted.

    Raises:
        ValueError: texts of fewer than 2 tokens, or a batch of none.
        torch.OutOfMemoryError: with what to lower.

    Example:
        >>> from staterank_utils import load_model
        >>> token_nats(load_model("hybrid"), torch.arange(8).reshape(2, 4)).shape
        (2, 3)
    """
    check_ids(model, input_ids)
    if input_ids.shape[1] < 2:
        raise ValueError(f"a text needs at least 2 tokens, got {input_ids.shape[1]}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    at_once = batch_size or (1 if model.device.type == "cpu" else 32)
    with out_of_memory(
        f"not enough memory for {min(at_once, len(input_ids))} texts of {input_ids.shape[1]:,} tokens",
        advice="lower batch_size, or take shorter prompts or a model of fewer bytes (dtype=torch.bfloat16)",
    ):
        losses = [
            F.cross_entropy(output_logits(model, hidden[:-1]).double(), text[1:], reduction="none")
            for texts in input_ids.to(model.device).split(at_once)
            for hidden, text in zip(read_tokens(model, texts), texts, strict=True)
        ]
        return torch.stack(losses).cpu().numpy()
