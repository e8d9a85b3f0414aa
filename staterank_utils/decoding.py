"""Greedy continuation of prompts, side by side: through the cache, and faster where the answer is expected."""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.architectures import cache_name, linear_layers, model_adapter
from staterank_utils.dispatch import suited_kernels
from staterank_utils.kernels import ordered_weights
from staterank_utils.models import evaluating, make_cache, output_logits, read_tokens, takes_mask, unwrapped

Tokens = list[int]
ORDER_FROM = 16  # tokens that may be left to decode, from which on other strides of the weights pay
STEPS_AT_ONCE = 16  # on a GPU, between two looks at what was made


@torch.inference_mode()
def generate_greedily(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: Sequence[int],
    stop: Collection[int] = (),
    drafts: Sequence[Tokens] | None = None,
    first_error_ends: bool = False,
) -> list[Tokens]:
    """Continue prompts, most likely token first, until a stop token or the budget.

    With drafts, one forward pass over prompt and draft checks every token of the draft; what the model would have said
    itself is kept, and decoding through the cache begins at the first error. So an answer that is as expected costs no
    decoding step, and the tokens are the same as without a draft, up to ties within rounding.

    Source of the idea: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023, with the expected
    answer in the place of a draft model.

    Args:
        model: from `load_model`.
        prompts: token ids; padded on the left where lengths differ, or read one by one by a model that `check_padding` refuses.
        max_new_tokens: for each prompt, at least 1.
        stop: ids that end a continuation; the one that did is its last token.
        drafts: for each prompt, an expected continuation; may be empty.
        first_error_ends: a continuation also ends with the first token that is not its draft's, for a score that is then
            decided.

    Returns:
        For each prompt, the new tokens.

    Raises:
        ValueError: no prompts, an empty one, or lists of different lengths.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> model, tokenizer = load_model("hybrid"), load_tokenizer("hybrid")
        >>> prompt = tokenizer.encode("The king said to")
        >>> [tokens] = generate_greedily(model, [prompt], max_new_tokens=[5], stop=tokenizer.encode("\\n"))
        >>> tokenizer.decode(tokens)
        ' him, "I am'
    """
    model = unwrapped(model)
    drafts = [[]] * len(prompts) if drafts is None else drafts
    if not prompts or not all(prompts):
        raise ValueError(f"expected prompts of at least one token, got lengths {[len(prompt) for prompt in prompts]}")
    if not len(prompts) == len(max_new_tokens) == len(drafts) or min(max_new_tokens) < 1:
        raise ValueError(
            f"expected a budget of at least 1 and a draft for each of {len(prompts)} prompts, got budgets {list(max_new_tokens)} and {len(drafts)} drafts"
        )
    if len(prompts) > 1 and _padding_refusal(model):
        alone = zip(prompts, max_new_tokens, drafts, strict=True)
        options: dict[str, Any] = {"stop": stop, "first_error_ends": first_error_ends}
        return [
            generate_greedily(model, [prompt], max_new_tokens=[limit], drafts=[draft], **options)[0]
            for prompt, limit, draft in alone
        ]
    made: list[Tokens] = [[] for _ in prompts]
    over = [False] * len(prompts)
    if any(drafts):
        for row, best in enumerate(greedy_choices(model, prompts, drafts)):
            draft = drafts[row]
            right = next((i for i, (a, b) in enumerate(zip(draft, best, strict=False)) if a != b), len(draft))
            made[row] = [*draft[:right], best[right]]
            over[row] = first_error_ends and right < len(draft)
    for row, limit in enumerate(max_new_tokens):
        ends = [i for i, token in enumerate(made[row]) if token in stop]
        made[row] = made[row][: min([limit, *(end + 1 for end in ends)])]
        over[row] = over[row] or bool(ends) or len(made[row]) >= limit
    pending = [row for row in range(len(prompts)) if not over[row]]
    if pending:
        _decode(model, [[*prompts[row], *made[row]] for row in pending], [made[row] for row in pending],
                [max_new_tokens[row] for row in pending], stop)  # fmt: skip
    return made


@torch.inference_mode()
def greedy_choices(model: PreTrainedModel, prompts: Sequence[Tokens], continuations: Sequence[Tokens]) -> list[Tokens]:
    """What the model would say at every token of a given continuation, and behind its end; one forward pass for all.

    Args:
        model: from `load_model`.
        prompts, continuations: token ids, as many of each.

    Returns:
        For each prompt, one token more than its continuation has.

    Example:
        >>> from staterank_utils import load_model
        >>> [len(best) for best in greedy_choices(load_model("hybrid"), [[5, 6], [7]], [[1, 2, 3], []])]
        [4, 1]
    """
    ids, mask = pad_left(model, [[*p, *c] for p, c in zip(prompts, continuations, strict=True)])
    hidden = read_padded(model, ids, mask)
    ends = [hidden[row, ids.shape[1] - len(c) - 1 :] for row, c in enumerate(continuations)]
    best = output_logits(model, torch.cat(ends)).argmax(-1).cpu()
    return [part.tolist() for part in best.split([len(part) for part in ends])]


def pad_left(
    model: PreTrainedModel, rows: Sequence[Tokens]
) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"]]:
    """Rows of token ids as one tensor on the model's device, padded on the left, and the mask: 1 for a token, 0 for padding.

    Args:
        model: from `load_model`.
        rows: token ids, at least one row.

    Raises:
        ValueError: rows of different lengths, for a model whose layers do not see that padding is none of the text.

    Example:
        >>> from staterank_utils import load_model
        >>> [tensor.tolist() for tensor in pad_left(load_model("hybrid"), [[5, 6], [7]])]
        [[[5, 6], [0, 7]], [[1, 1], [0, 1]]]
    """
    length = max(map(len, rows))
    if length > min(map(len, rows)):
        check_padding(model)
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    return ids, mask


def check_padding(model: PreTrainedModel) -> None:
    """See that prompts of different lengths can be read side by side.

    Raises:
        ValueError: they cannot, and why.

    Example:
        >>> from staterank_utils import load_model
        >>> check_padding(load_model("hybrid")) is None
        True
    """
    if refusal := _padding_refusal(model):
        raise ValueError(f"{refusal}. Take batch_size=1")


def _padding_refusal(model: PreTrainedModel) -> str | None:
    """Which layer does not see that padding is none of the text, and why."""
    for layer in linear_layers(model):
        if reason := layer.padding_refusal:
            return f"layer {layer.index} ({layer.name}) cannot read prompts of different lengths side by side: {reason}"
    if not takes_mask(model):
        return f"{type(model).__name__} cannot read prompts of different lengths side by side: its forward takes no attention_mask"
    return None


def read_padded(
    model: PreTrainedModel, ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"]
) -> Float[Tensor, "row token d_model"]:
    """Hidden states, before the output embedding, of rows from `pad_left`; what stands at padding has no meaning.

    Args:
        model: from `load_model`.
        ids, mask: (row, token), int64.

    Returns:
        (row, token, d_model), in the dtype of the weights.

    Example:
        >>> from staterank_utils import load_model
        >>> model = load_model("hybrid")
        >>> read_padded(model, *pad_left(model, [[5, 6], [7]])).shape
        torch.Size([2, 2, 256])
    """
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return read_tokens(model, ids, positions=positions, mask=mask)


def _decode(
    model: PreTrainedModel, rows: list[Tokens], made: list[Tokens], limits: list[int], stop: Collection[int]
) -> None:
    """Append to each of `made` until its stop token or limit, one token per step for all rows."""
    ids, mask = pad_left(model, rows)
    room = max(limit - len(row) for row, limit in zip(made, limits, strict=True))
    on_one_gpu = model.device.type == "cuda" and len({p.device for p in model.parameters()}) == 1
    in_place = on_one_gpu and model_adapter(model).masks_by_kind
    next_tokens = _steps_in_place(model, ids, mask, room) if in_place else _steps(model, ids, mask)
    over = [False] * len(rows)
    with suited_kernels(model), evaluating(model), ordered_weights(model) if room >= ORDER_FROM else nullcontext():
        for tokens in next_tokens:
            for row, token in enumerate(tokens):
                if not over[row]:
                    made[row].append(token)
                    over[row] = token in stop or len(made[row]) >= limits[row]
            if all(over):
                return


def _steps(model: PreTrainedModel, ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"]) -> Iterator[Tokens]:
    """The next token of every row, again and again."""
    cache, positions = make_cache(model), (mask.cumsum(1) - 1).clamp_min(0)
    # Without padding no mask is needed, and none is cheaper.
    padded = not mask.all()
    while True:
        hidden = read_tokens(model, ids, positions=positions, cache=cache, mask=mask if padded else None)
        ids = output_logits(model, hidden[:, -1:]).argmax(-1)
        yield ids[:, 0].tolist()
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


def _steps_in_place(
    model: PreTrainedModel, ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"], room: int
) -> Iterator[Tokens]:
    """As `_steps`, for at most `room` tokens a row, over buffers that stay where they are; on a GPU each step replays one graph.

    A step of a small model is some hundred kernels of a few microseconds; launching them from Python takes ten times longer
    than they do. The prompt and the first step, which lets kernels choose their configuration, run as usual.
    """
    n_rows, n_read = ids.shape
    cache = make_cache(model, max_tokens=n_read + room)
    seen = torch.zeros(n_rows, 1, 1, n_read + room, dtype=torch.bool, device=ids.device)
    seen[:, 0, 0, :n_read] = mask.bool()
    now = torch.tensor([n_read], device=ids.device)
    made = torch.empty(n_rows, room, dtype=ids.dtype, device=ids.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cached = {str(cache_name(inspect.signature(model.base_model.forward).parameters)): cache, "use_cache": True}

    def read(ids: Tensor, masks: Any, positions: Tensor) -> Tensor:
        output = model.base_model(input_ids=ids, attention_mask=masks, position_ids=positions, **cached)
        best = output_logits(model, output.last_hidden_state[:, -1:]).argmax(-1)
        made.index_copy_(1, now - n_read, best)
        return best

    token = read(ids, mask, positions)
    yield token[:, 0].tolist()
    if room == 1:
        return
    position = positions[:, -1:] + 1

    def step() -> None:
        seen.index_fill_(3, now, True)
        now.add_(1)
        token.copy_(read(token, {"full_attention": seen, "linear_attention": None}, position))
        position.add_(1)

    step()
    yield token[:, 0].tolist()
    again = _captured(step, ids.device) if ids.device.type == "cuda" else step
    for start in range(2, room, STEPS_AT_ONCE):
        stop = min(start + STEPS_AT_ONCE, room)
        for _ in range(start, stop):
            again()
        yield from made[:, start:stop].T.tolist()


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A replay of what one step does on a GPU, which need not be the current one; the step is recorded, not done."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay
