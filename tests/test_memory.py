"""The law "rank is memory length": formulas against slow oracles, interventions that change no weight."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.channels import keep_channels
from staterank_utils.memory import (
    cap_half_life,
    check_memory_bound,
    half_life_at,
    half_lives,
    predicted_rank,
    rank_bound,
    scale_decay,
)
from staterank_utils.models import load_model, make_cache
from staterank_utils.pruning import prune_heads
from staterank_utils.spectra import effective_rank
from staterank_utils.surgery import ablate_heads, ablations
from staterank_utils.tracing import trace_states

EPS = 1e-4


def slow_bound(log_norms: list[float], state_norms: list[float], d: int) -> int:
    """The theorem as it is written, one m after the other."""
    t = len(log_norms)
    for m in range(1, d):
        lost = -math.fsum(log_norms[t - m : t])
        before = state_norms[t - m]
        if before == 0 or lost >= math.log(1 / EPS) + math.log(before / state_norms[t]):
            return m
    return d


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
def test_the_bound_is_that_of_the_theorem(scale: float) -> None:
    rng = np.random.default_rng(0)
    log_norms = -scale * rng.exponential(size=(50, 70))
    norms = rng.uniform(0.1, 3.0, size=(50, 71))
    norms[:10, :60] = 0  # nothing was written at first
    found = rank_bound(torch.from_numpy(log_norms), torch.from_numpy(norms), d=64)
    expected = [slow_bound(list(a), list(b), 64) for a, b in zip(log_norms, norms, strict=True)]
    assert found.rank.tolist() == expected
    assert found.void.tolist() == [rank >= min(64, 11 if row < 10 else 64) for row, rank in enumerate(expected)]


def test_the_bound_holds_of_states_that_the_recurrence_makes_and_is_met_by_some() -> None:
    """Scalar, diagonal and matrix transitions, in float64; with a decay so fast that the bound is far under d."""
    torch.manual_seed(0)
    n_tokens, d, near = 96, 16, 0
    kinds: dict[str, Callable[[], Tensor]] = {
        "scalar": lambda: torch.eye(d) * torch.rand(1) * 0.5,
        "diagonal": lambda: torch.diag(torch.rand(d) * 0.5),
        "matrix": lambda: 0.3 * torch.linalg.qr(torch.randn(d, d))[0] @ torch.diag(torch.rand(d)),
    }
    for make in kinds.values():
        for _ in range(20):
            transitions = torch.stack([make() for _ in range(n_tokens)]).double()
            states = [torch.zeros(d, d, dtype=torch.float64)]
            for transition in transitions:
                states.append(transition @ states[-1] + torch.outer(torch.randn(d), torch.randn(d)))
            log_norms = torch.linalg.matrix_norm(transitions, ord=2).log()
            norms = torch.linalg.matrix_norm(torch.stack(states), ord=2)
            bound = rank_bound(log_norms, norms, d=d)
            rank = effective_rank(states[-1], rel_tol=EPS)
            assert rank <= bound.rank <= d
            near += int(rank >= bound.rank - 1)
    assert near >= 20  # every scalar one


def test_a_state_without_decay_is_bounded_by_its_size_or_by_the_tokens() -> None:
    none = torch.zeros(5)
    assert rank_bound(none, torch.ones(6), d=4).void
    few = rank_bound(none[:3], torch.tensor([0.0, 1.0, 1.0, 1.0]), d=8)
    assert (few.rank.item(), few.void.item()) == (3, True)
    assert rank_bound(none, torch.zeros(6), d=4).rank == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3), torch.ones(3)), "expected 4 norms of states"),
        ((torch.zeros(3), -torch.ones(4)), "norms of states must be finite and at least 0, got -1.0"),
        ((torch.zeros(3), torch.full((4,), float("nan"))), "norms of states must be finite"),
        ((torch.full((3,), float("nan")), torch.ones(4)), "a log-decay is at most 0"),
    ],
    ids=["count", "negative", "not finite", "decay"],
)
def test_what_the_bound_refuses(arguments: tuple[Tensor, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rank_bound(*arguments, d=4)


def test_the_predicted_rank_is_that_of_the_formula() -> None:
    decays = -np.logspace(-4, 2, 60)
    found = predicted_rank(torch.from_numpy(decays), d=64)
    assert found.tolist() == pytest.approx([min(64.0, 1 + math.log(1e4) / abs(a)) for a in decays], rel=1e-15)
    assert predicted_rank(torch.tensor(float("-inf")), d=64) == 1


@pytest.mark.parametrize(
    ("log_decay", "options", "words"),
    [
        (0.9, {}, "a log-decay is at most 0, got 0.899.*: is it the decay itself"),
        (float("nan"), {}, "a log-decay is at most 0, got nan"),
        (-1.0, {"d": 0}, "d must be at least 1, got 0"),
        (-1.0, {"rel_tol": 1.0}, "rel_tol must be in"),
    ],
)
def test_what_the_prediction_refuses(log_decay: float, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predicted_rank(torch.tensor(log_decay), **{"d": 64} | options)


def test_the_half_life_of_a_rank_is_the_inverse_of_the_prediction() -> None:
    for rank in (2, 12.8, 51.2, 64):
        decay = -math.log(2) / half_life_at(rank)
        assert predicted_rank(torch.tensor(decay, dtype=torch.float64), d=64).item() == pytest.approx(rank)
    with pytest.raises(ValueError, match="a rank over 1, got rank=1"):
        half_life_at(1)
    with pytest.raises(ValueError, match=r"rel_tol must be in \(0, 1\), got 2"):
        half_life_at(8, rel_tol=2.0)


@pytest.fixture(params=["hybrid", "pure"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model(request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(5, 8000, (2, 80), generator=torch.Generator().manual_seed(0))


def test_half_lives_are_those_of_the_mean_decay(model, ids) -> None:
    trace = trace_states(model, ids, positions=[80])
    expected = math.log(2) / trace.log_decay.abs()
    assert torch.equal(half_lives(trace), expected)
    assert (0.5 ** (1 / half_lives(trace)) - trace.log_decay.exp()).abs().max() < 1e-12


def test_no_head_of_the_embedded_models_exceeds_the_bound(model, ids) -> None:
    check = check_memory_bound(model, ids, positions=[1, 40, 80])
    assert check.n_violations == 0
    assert (~check.void).float().mean() > 0.2
    assert (
        check.rank
        == trace_states(
            model, ids, positions=[1, 40, 80], reduce=lambda s: effective_rank(s, rel_tol=1.01 * EPS)
        ).values
    ).all()


BLOCKS: dict[str, Callable[[PreTrainedModel], AbstractContextManager[None]]] = {
    "cap": lambda model: cap_half_life(model, 8),
    "scale": lambda model: scale_decay(model, 3.0),
}
blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


@blocks
def test_generate_follows_the_changed_model(model, ids, block) -> None:
    with block(model):
        made = model.generate(
            ids[:1],
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=1,
            use_cache=True,
            past_key_values=make_cache(model),
        )
        expected = ids[:1]
        for _ in range(6):
            best = model(expected, use_cache=False).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, best[:, None]], 1)
    assert torch.equal(made, expected[:, : made.shape[1]])


@blocks
def test_nothing_is_left_behind_also_after_an_exception(model, ids, block) -> None:
    before, weights = model(ids).logits, copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}

    def fail_inside() -> None:
        with block(model):
            assert not torch.equal(model(ids).logits, before)
            assert ablations(model)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()


def test_blocks_nest_and_the_outer_one_changes_the_decay_first(model, ids) -> None:
    with scale_decay(model, 0.1), cap_half_life(model, 16):
        assert half_lives(trace_states(model, ids, positions=[80])).max() <= 16 + 1e-6
    with cap_half_life(model, 16), scale_decay(model, 0.1):
        longest = half_lives(trace_states(model, ids, positions=[80])).max().item()
    assert longest == pytest.approx(160, rel=1e-4)


@pytest.mark.parametrize(
    "block", [*BLOCKS.values(), lambda model: ablate_heads(model, [(0, 1)])], ids=[*BLOCKS, "ablate"]
)
def test_a_model_under_an_intervention_is_not_saved_or_pruned(model, block, tmp_path) -> None:
    with block(model):
        with pytest.raises(ValueError, match="under an intervention .* leave its block before you save it"):
            model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="under an intervention .* leave its block before you remove heads"):
            prune_heads(model, {0: [1]})
        with pytest.raises(ValueError, match="under an intervention .* leave its block before you cut channels"):
            keep_channels(model, {0: {0: [0]}}, share=0.5)
    assert not any(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("enter", "words"),
    [
        (lambda model: cap_half_life(model, 0), "a half-life is a number of tokens over 0, got 0"),
        (lambda model: cap_half_life(model, math.inf), "over 0, got inf"),
        (lambda model: scale_decay(model, -1.0), "factor must be a number over 0, got -1.0"),
        (lambda model: scale_decay(model, math.nan), "factor must be a number over 0, got nan"),
        (lambda model: scale_decay(model, 2.0, [(0, 99)]), "layer 0 has no head 99"),
        (lambda model: scale_decay(model, 2.0, [(99, 0)]), "layer 99 has no linear-attention heads"),
    ],
)
def test_what_an_intervention_refuses(model, enter, words: str) -> None:
    with pytest.raises(ValueError, match=words), enter(model):
        pass
