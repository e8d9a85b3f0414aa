import itertools
import random
import re

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import tiny_qwen3_next

from staterank_utils import decoding, evaluation
from staterank_utils.decoding import generate_greedily, greedy_choices, pad_left
from staterank_utils.dispatch import choose_kernels
from staterank_utils.evaluation import (
    TASKS,
    answer_nats,
    arithmetic_task,
    copied_tokens,
    draw_instances,
    evaluate,
    exact,
    exact_final,
    line_ends,
    needle_task,
    score_interval,
    token_nats,
)
from staterank_utils.models import load_model, make_cache
from staterank_utils.surgery import ablate_heads, all_heads, forward_with_edits

LAYERS = {
    "hybrid": ["linear_attention", "full_attention", "linear_attention"],
    "pure": ["linear_attention", "linear_attention"],
}


def some_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(64) for _ in range(length)] for length in lengths]


def one_by_one(model, prompt: list[int], n: int, stop: set[int]) -> list[int]:
    """Greedy continuation the slow way: the whole text again for every token."""
    made: list[int] = []
    while len(made) < n and not (made and made[-1] in stop):
        with torch.no_grad():
            made.append(model(torch.tensor([prompt + made]), use_cache=False).logits[0, -1].argmax().item())
    return made


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("guess", ["none", "right", "wrong at once", "wrong later", "empty", "too long"])
def test_continuations_equal_token_by_token_whatever_the_draft(kind: str, guess: str) -> None:
    model, stop = tiny_qwen3_next(LAYERS[kind]), {3, 5}
    prompts, budgets = some_rows([70, 3, 12, 1]), [9, 1, 12, 30]
    expected = [one_by_one(model, prompt, n, stop) for prompt, n in zip(prompts, budgets, strict=True)]
    drafts = {
        "none": None,
        "right": expected,
        "wrong at once": [[(row[0] + 1) % 64, *row[1:]] for row in expected],
        "wrong later": [[*row[:2], *[(token + 1) % 64 for token in row[2:]]] for row in expected],
        "empty": [[], expected[1], [], expected[3][:4]],
        "too long": [[*row, 7, 7, 7] for row in expected],
    }[guess]
    assert generate_greedily(model, prompts, max_new_tokens=budgets, stop=stop, drafts=drafts) == expected


def test_the_first_error_ends_a_continuation_only_where_asked() -> None:
    model = tiny_qwen3_next(LAYERS["hybrid"])
    prompts = some_rows([8, 9])
    right = [one_by_one(model, prompt, 6, set()) for prompt in prompts]
    drafts = [right[0], [*right[1][:2], (right[1][2] + 1) % 64, *right[1][3:]]]
    made = generate_greedily(model, prompts, max_new_tokens=[6, 6], drafts=drafts, first_error_ends=True)
    assert made == [right[0], right[1][:3]]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("room", [1, 2, 3, 2 * decoding.STEPS_AT_ONCE + 5])
def test_steps_over_fixed_buffers_make_the_same_tokens(kind: str, room: int) -> None:
    model = tiny_qwen3_next(LAYERS[kind])
    with torch.inference_mode():
        ids, mask = pad_left(model, some_rows([70, 3, 12, 1]))
        expected = list(itertools.islice(decoding._steps(model, ids, mask), room))
        assert list(decoding._steps_in_place(model, ids, mask, room)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hybrid", "pure"])
@pytest.mark.parametrize("kind", ["zero", "frozen"])
def test_a_recorded_step_makes_the_same_tokens_on_a_gpu(name: str, kind: str) -> None:
    model = load_model(name, device="cuda")
    with torch.inference_mode(), ablate_heads(model, [(0, 3), (5, 1)], kind=kind):
        ids, mask = pad_left(model, some_rows([70, 3, 12, 1]))
        expected = list(itertools.islice(decoding._steps(model, ids, mask), 60))
        assert list(decoding._steps_in_place(model, ids, mask, 60)) == expected


def test_a_model_that_cannot_pad_reads_prompts_one_by_one() -> None:
    model = ARCHITECTURES["xlstm"].build()
    choose_kernels(model)
    prompts, drafts = [[5, 6, 7, 8], [9, 10]], [[], [3, 4]]
    together = generate_greedily(model, prompts, max_new_tokens=[3, 5], drafts=drafts)
    for prompt, limit, made in zip(prompts, [3, 5], together, strict=True):
        text = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(limit):
                text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert made == text[0, len(prompt) :].tolist()


def test_generation_agrees_with_transformers(hybrid, tokenizer) -> None:
    prompts = [instance.prompt for instance in draw_instances("arithmetic", tokenizer, n_instances=3)]
    length = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in prompts])
    mask = (ids != tokenizer.pad_token_id).long()
    made = hybrid.generate(ids, attention_mask=mask, max_new_tokens=30, min_new_tokens=30, do_sample=False, past_key_values=make_cache(hybrid))  # fmt: skip
    ours = generate_greedily(hybrid, prompts, max_new_tokens=[30] * 3)
    assert [row[length:] for row in made.tolist()] == ours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [], "max_new_tokens": []}, "at least one token"),
        ({"prompts": [[1], []], "max_new_tokens": [1, 1]}, "got lengths [1, 0]"),
        ({"prompts": [[1]], "max_new_tokens": [0]}, "a budget of at least 1"),
        ({"prompts": [[1]], "max_new_tokens": [1, 2]}, "for each of 1 prompts"),
        ({"prompts": [[1]], "max_new_tokens": [1], "drafts": [[1], [2]]}, "2 drafts"),
    ],
)
def test_wrong_batches_are_refused(hybrid, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generate_greedily(hybrid, **arguments)


def test_choices_are_those_of_one_forward(tiny_model) -> None:
    prompts, continuations = some_rows([5, 40]), some_rows([4, 9], seed=1)
    for prompt, continuation, best in zip(
        prompts, continuations, greedy_choices(tiny_model, prompts, continuations), strict=True
    ):
        with torch.no_grad():
            logits = tiny_model(torch.tensor([prompt + continuation]), use_cache=False).logits[0]
        assert best == logits[len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_scores_one_and_another_less(task: str, tokenizer) -> None:
    [(prompt, answer)] = draw_instances(task, tokenizer, n_instances=1)
    nothing = tokenizer.encode(" nothing\n")
    assert TASKS[task].score(answer, answer, tokenizer) == 1
    assert TASKS[task].score(nothing, answer, tokenizer) < 0.1
    assert len(prompt) < 1100
    assert answer[-1] in line_ends(tokenizer)


def test_scores_look_at_the_answer_alone(tokenizer) -> None:
    one, two, three = (tokenizer.encode(text) for text in (" 123\n", " 123\nmore", " 1234\n"))
    assert exact(two, one, tokenizer) == 1
    assert exact(three, one, tokenizer) == 0
    said = tokenizer.encode("2 + 2 = 5. The answer is 4. The answer is 5.")
    assert exact_final(said, tokenizer.encode("The answer is 4.\n"), tokenizer) == 1
    assert copied_tokens([1, 2, 9, 4], [1, 2, 3, 0], tokenizer) == pytest.approx(2 / 3)
    assert copied_tokens([1], [1, 2, 0], tokenizer) == 1 / 2


def test_needles_stand_where_they_were_put(tokenizer) -> None:
    for depth, expected in ((0.0, 0), (0.5, 0.5), (1.0, 1)):
        turn = needle_task(1, 400, depth).draw(random.Random(0), tokenizer)
        text = turn.prompt.split("\nQuestion:")[0]
        assert text.index("The secret number") / len(text) == pytest.approx(expected, abs=0.12)
        assert len(tokenizer.encode(turn.prompt)) == pytest.approx(400, abs=25)
    with pytest.raises(ValueError, match="depth is a share of the filler, 0..1, got 2"):
        needle_task(1, 400, 2.0).draw(random.Random(0), tokenizer)
    with pytest.raises(ValueError, match="no room for prose"):
        needle_task(3, 50).draw(random.Random(0), tokenizer)


def test_instances_follow_from_their_number_alone(tokenizer) -> None:
    few, many = (draw_instances(arithmetic_task(3, 3), tokenizer, n_instances=n, seed=1) for n in (2, 5))
    assert many[:2] == few
    assert draw_instances(arithmetic_task(3, 3), tokenizer, n_instances=2, seed=2) != few


def test_evaluation_is_the_same_in_any_batch(hybrid, tokenizer) -> None:
    with ablate_heads(hybrid, all_heads(hybrid)[::5]):
        one, other = (evaluate("arithmetic", hybrid, tokenizer, n_instances=4, batch_size=size) for size in (1, 3))
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("recal", {"n_instances": 1}, "unknown task 'recal'"),
        ("recall", {"n_instances": 0}, "n_instances must be at least 1, got 0"),
        ("recall", {"n_instances": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_impossible_evaluations_are_refused(hybrid, tokenizer, task: str, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(task, hybrid, tokenizer, **options)


def test_losses_agree_with_the_model_s_own(tiny_model) -> None:
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = [tiny_model(row[None], labels=row[None], use_cache=False).loss.item() for row in ids]
    np.testing.assert_allclose(token_nats(tiny_model, ids).mean(1), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        token_nats(tiny_model, ids[:, :1])


def test_answer_losses_are_of_the_answer_and_take_another_reading(hybrid, tokenizer) -> None:
    [(prompt, answer)] = draw_instances("recall", tokenizer, n_instances=1)
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(hybrid(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    [own] = answer_nats("recall", hybrid, tokenizer, n_instances=1)
    assert own == pytest.approx(losses[-len(answer) :].mean().item(), rel=1e-3, abs=1e-6)
    [edited] = answer_nats(
        "recall", hybrid, tokenizer, n_instances=1,
        read=lambda ids: forward_with_edits(hybrid, ids, heads=all_heads(hybrid), edit=lambda state: 0 * state, every=1),
    )  # fmt: skip
    assert edited > own + 0.1


def test_intervals_of_scores() -> None:
    perfect = score_interval(np.ones(100))
    assert perfect.point == 1
    assert perfect.low < 0.98
    shares = score_interval(np.linspace(0.5, 1, 50))
    assert shares.low < shares.point < shares.high


def test_an_evaluation_without_memory_says_what_to_lower(hybrid, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluation, "generate_greedily", full)
    with pytest.raises(
        torch.OutOfMemoryError, match="not enough memory for 2 prompts of up to .* tokens.*lower batch_size"
    ):
        evaluate("recall", hybrid, tokenizer, n_instances=2)
