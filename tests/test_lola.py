"""The cache of pairs: held to a version in lists, in float64, and to the model that it is put into."""

import pytest
import torch
import torch.nn.functional as F
from architectures import delta, fla_models
from matplotlib.figure import Figure
from torch import Tensor

from staterank_utils import load_model, plotting, reference
from staterank_utils.architectures import linear_layers
from staterank_utils.decoding import pad_left, read_padded
from staterank_utils.dispatch import choose_kernels
from staterank_utils.evaluation import token_nats
from staterank_utils.lola import cache_pairs, pairs_in_state, read_cached, read_normalised, recall_errors, why_not
from staterank_utils.models import EMBEDDED, make_cache, read_tokens
from staterank_utils.studies import caching


def _tokens(n_tokens: int, *, by_channel: bool = False, seed: int = 0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, n_tokens, 3, *shape, generator=draw, dtype=torch.float64)

    query, key = (torch.nn.functional.normalize(normal(6), dim=-1) for _ in range(2))
    # Some keys come again, and some tokens write nothing.
    key[:, 5::4] = key[:, 1:-4:4]
    strength = normal().sigmoid()
    strength[:, 3:4] = 0.0
    return query, key, normal(4), -normal(*((6,) if by_channel else ())).exp() / 8, strength


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize(("window", "sparse"), [(0, 0), (3, 0), (0, 4), (2, 3), (50, 2)])
def test_pairs_are_read_as_the_version_in_lists_reads_them(
    window: int, sparse: int, stateful: bool, by_channel: bool
) -> None:
    tokens = _tokens(40, by_channel=by_channel)
    out, _ = read_cached(*tokens, window=window, sparse=sparse, stateful=stateful)
    for row in range(2):
        for head in range(3):
            of_head = (x[row, :, head] for x in tokens)
            expected = reference.lola(*of_head, window=window, sparse=sparse, stateful=stateful)
            assert (out[row, :, head] - expected).abs().max() < 1e-9


def _with_features(n_tokens: int) -> tuple[Tensor, ...]:
    query, key, value, *_ = _tokens(n_tokens)
    return query, key, value, query.exp(), key.exp()


@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize(("window", "sparse"), [(0, 0), (3, 0), (0, 4), (2, 3), (50, 2)])
def test_normalised_pairs_are_read_as_the_version_in_lists_reads_them(window: int, sparse: int, stateful: bool) -> None:
    tokens, options = _with_features(40), {"window": window, "sparse": sparse, "stateful": stateful}
    out, _ = read_normalised(*tokens, **options)
    for row in range(2):
        for head in range(3):
            expected = reference.normalised_lola(*(x[row, :, head] for x in tokens), **options)
            assert (out[row, :, head] - expected).abs().max() < 1e-8


def test_keys_that_stand_against_their_query_are_read_all_the_same() -> None:
    key = 10 * torch.ones(1, 3, 1, 4)
    value, features = torch.tensor([3.0, 4.0, 5.0]).reshape(1, 3, 1, 1), torch.ones(1, 3, 1, 4)
    out, _ = read_normalised(-key, key, value, features, features, window=1, sparse=1)
    # The third token reads two pairs at exp(-200) and one that is written, at 4.
    assert out.flatten().tolist() == pytest.approx([3.0, 3.5, 3.0])


def test_without_a_cache_it_is_linear_attention() -> None:
    tokens = _with_features(30)
    *_, value, query, key = tokens
    weights = torch.einsum("bthd, bshd -> bhts", query, key).tril()
    expected = torch.einsum("bhts, bshv -> bthv", weights / weights.sum(-1, keepdim=True), value)
    assert (read_normalised(*tokens, window=0, sparse=0)[0] - expected).abs().max() < 1e-9


def test_normalised_segments_give_what_one_pass_gives() -> None:
    tokens, held, parts = _with_features(40), None, []
    for segment in zip(*(x.split((13, 1, 1, 25), 1) for x in tokens), strict=True):
        out, held = read_normalised(*segment, window=2, sparse=3, held=held)
        parts.append(out)
    assert torch.equal(torch.cat(parts, 1), read_normalised(*tokens, window=2, sparse=3)[0])
    with pytest.raises(ValueError, match=r"held has 5 pairs, expected 2 \+ 2"):
        read_normalised(*tokens, window=2, sparse=2, held=held)


def test_without_a_cache_it_is_the_gated_delta_rule() -> None:
    tokens = _tokens(30)
    out, held = read_cached(*tokens, window=0, sparse=0)
    expected, states = reference.gated_delta_rule(*tokens)
    assert (out - expected).abs().max() < 1e-12
    assert (held.state - states[:, -1]).abs().max() < 1e-12


@pytest.mark.parametrize("cuts", [(1, 39), (13, 14, 13), (1,) * 40])
def test_segments_give_what_one_pass_gives(cuts: tuple[int, ...]) -> None:
    tokens, held, parts = _tokens(40), None, []
    for segment in zip(*(x.split(cuts, 1) for x in tokens), strict=True):
        out, held = read_cached(*segment, window=2, sparse=3, held=held)
        parts.append(out)
    whole, _ = read_cached(*tokens, window=2, sparse=3)
    assert torch.equal(torch.cat(parts, 1), whole)


def test_the_pairs_that_the_state_recalls_worst_stay() -> None:
    key = torch.eye(4)[[0, 1, 2, 3]].reshape(1, 4, 1, 4)
    value = torch.tensor([9.0, 1.0, 2.0, 8.0]).reshape(1, 4, 1, 1)
    _, held = read_cached(key, key, value, torch.zeros(1, 4, 1), torch.ones(1, 4, 1), window=0, sparse=2)
    assert sorted(held.values.flatten().tolist()) == [8.0, 9.0]
    assert sorted(held.state.flatten().tolist()) == [0.0, 0.0, 1.0, 2.0]


def test_a_pair_that_is_there_twice_is_read_once() -> None:
    key, gates = torch.ones(1, 2, 1, 1), (torch.zeros(1, 2, 1), torch.full((1, 2, 1), 0.9999))
    out, _ = read_cached(key, key, 3 * key, *gates, window=2, sparse=0)
    assert out.flatten().tolist() == pytest.approx([3.0, 3.0], rel=1e-3)


def test_a_model_with_empty_caches_is_the_model() -> None:
    model = load_model("hybrid", device="cpu")
    ids = torch.randint(0, 8000, (2, 70), generator=torch.Generator().manual_seed(1))
    heads = [(0, 2), (0, 15), (5, 7)]
    with torch.inference_mode():
        whole = model(ids).logits
        with cache_pairs(model, heads, window=0, sparse=0):
            same = model(ids).logits
        with cache_pairs(model, heads, window=4, sparse=4, stateful=False):
            other = model(ids).logits
        again = model(ids).logits
    assert (same - whole).abs().max() < 1e-3
    assert (other - whole).abs().max() > 1e-2
    assert torch.equal(again, whole)


def test_a_model_reads_segments_and_tokens_as_a_whole_prompt() -> None:
    model = load_model("pure", device="cpu")
    ids = torch.randint(0, 8000, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(), cache_pairs(model, [(1, 3), (4, 0)], window=3, sparse=5):
        whole = read_tokens(model, ids)
        cache, parts, start = make_cache(model), [], 0
        for size in (20, 1, 1, 18):
            positions = torch.arange(start, start + size)[None]
            parts.append(read_tokens(model, ids[:, start : start + size], positions=positions, cache=cache))
            start += size
        read_tokens(model, ids[:, 5:9])
        with pytest.raises(ValueError, match="one set of prompts at a time"):
            read_tokens(model, ids[:, :3], positions=torch.arange(40, 43)[None], cache=cache)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-3


@pytest.fixture
def with_normaliser():
    pytest.importorskip("fla")
    model = fla_models.tiny("LinearAttention, normalised")
    choose_kernels(model)
    return model


def test_linear_attention_with_empty_caches_is_the_model(with_normaliser) -> None:
    model, heads = with_normaliser, [(0, 0), (0, 3), (1, 2)]
    assert why_not(model) is None
    assert "not divided" in str(why_not(fla_models.tiny("LinearAttention")))
    config = model.config
    config.feature_map = "hedgehog"
    with pytest.raises(ValueError, match="of another width"):
        linear_layers(type(model)(config))
    ids = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model(ids).logits
        with cache_pairs(model, heads, window=0, sparse=0):
            same = model(ids).logits
        with cache_pairs(model, heads, window=2, sparse=3):
            other = model(ids).logits
        with cache_pairs(model, heads, window=2, sparse=3, stateful=False):
            alone = model(ids).logits
        assert torch.equal(model(ids).logits, whole)
    assert (same - whole).abs().max() < 1e-5
    assert all((a - b).abs().max() > 1e-3 for a, b in ((other, whole), (alone, whole), (alone, other)))


def test_linear_attention_reads_segments_and_tokens_as_a_whole_prompt(with_normaliser) -> None:
    model, start, parts = with_normaliser, 0, []
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(), cache_pairs(model, [(0, 1), (1, 3)], window=3, sparse=5):
        whole, cache = read_tokens(model, ids), make_cache(model)
        for size in (20, 1, 1, 18):
            parts.append(read_tokens(model, ids[:, start : start + size], cache=cache))
            start += size
        with pytest.raises(ValueError, match="padded ones"):
            read_padded(model, *pad_left(model, [[3, 4, 5], [6]]))
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5


def test_recall_errors_of_linear_attention_are_those_of_its_last_pairs(with_normaliser) -> None:
    ids = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(2))
    calls = []

    def look(kernel, *, raw, **options):
        calls.append((raw, options))
        return kernel(**options)

    with linear_layers(with_normaliser)[0].pairs_through(look), torch.no_grad():
        with_normaliser(ids)
    [((query, key), options)] = calls
    assert torch.allclose(F.elu(query) + 1, options["q"])
    assert torch.allclose(F.elu(key) + 1, options["k"])
    k, v = (options[name].double().transpose(1, 2) for name in ("k", "v"))
    weights = k[:, :, -5:] @ k.mT
    wrong = (weights @ v / weights.sum(-1, keepdim=True) - v[:, :, -5:]).square().sum((0, 2, 3))
    found = recall_errors(with_normaliser, ids, n_pairs=5)[:4]
    torch.testing.assert_close(found.double(), wrong / v[:, :, -5:].square().sum((0, 2, 3)), rtol=1e-4, atol=0)


def test_padding_is_not_kept() -> None:
    model = load_model("hybrid", device="cpu")
    rows = [list(range(5, 25)), list(range(50, 58))]
    with torch.inference_mode(), cache_pairs(model, [(0, 3), (2, 1)], window=2, sparse=4):
        side_by_side = read_padded(model, *pad_left(model, rows))
        alone = read_padded(model, *pad_left(model, rows[1:]))
    assert (side_by_side[1, -8:] - alone[0]).abs().max() < 1e-3


def test_bad_input_is_refused() -> None:
    tokens = _tokens(3)
    with pytest.raises(ValueError, match="at least 0, got window -1"):
        read_cached(*tokens, window=-1, sparse=0)
    with pytest.raises(ValueError, match="at most 1, got 2"):
        read_cached(*tokens[:4], torch.full_like(tokens[4], 2.0), window=1, sparse=0)
    model = load_model("hybrid", device="cpu")
    with pytest.raises(ValueError, match="less than one pair"):
        pairs_in_state(linear_layers(model)[0], 0.001)
    with pytest.raises(ValueError, match="linear-attention"), cache_pairs(model, [(3, 0)], window=1, sparse=1):
        pass


def test_losses_are_taken_under_it() -> None:
    model = load_model("hybrid", device="cpu")
    ids = torch.randint(0, 8000, (1, 64), generator=torch.Generator().manual_seed(3))
    plain = token_nats(model, ids)
    with cache_pairs(model, [(0, head) for head in range(16)], window=2, sparse=2, stateful=False):
        assert abs(token_nats(model, ids) - plain).max() > 1e-3


def test_a_key_that_is_written_again_stays_in_the_cache_with_its_old_value() -> None:
    """Where the delta rule forgets it: what the module says of its difference from the plain rule."""
    key, value = torch.ones(1, 2, 1, 1), torch.tensor([9.0, 1.0]).reshape(1, 2, 1, 1)
    gates = torch.zeros(1, 2, 1), torch.full((1, 2, 1), 0.99)
    plain, _ = read_cached(key, key, value, *gates, window=0, sparse=0)
    kept, held = read_cached(key, key, value, *gates, window=0, sparse=1)
    assert plain[0, 1].item() == pytest.approx(1.08, abs=0.01)
    assert held.values.item() == 9.0
    assert kept[0, 1].item() > 8


def test_a_window_over_the_whole_prompt_reads_different_keys_as_the_plain_rule_does() -> None:
    key = torch.eye(6).reshape(1, 6, 1, 6)
    value = torch.arange(6.0).reshape(1, 6, 1, 1)
    gates = torch.zeros(1, 6, 1), torch.full((1, 6, 1), 0.7)
    query = torch.ones(1, 6, 1, 6) / 6**0.5
    plain, cached = (read_cached(query, key, value, *gates, window=n, sparse=0)[0] for n in (0, 6))
    assert (plain - cached).abs().max() < 1e-3


def test_what_is_held_must_have_the_slots_that_are_asked_for() -> None:
    tokens = _tokens(4)
    _, held = read_cached(*tokens, window=1, sparse=1)
    with pytest.raises(ValueError, match="held has a window of 1 of 2 pairs, expected 2 of 2"):
        read_cached(*tokens, window=2, sparse=0, held=held)


def test_prompts_are_told_apart_where_no_head_of_a_layer_keeps_a_state() -> None:
    model = load_model("hybrid", device="cpu")
    cache, ids = make_cache(model), torch.arange(12).reshape(1, 12)
    with (
        torch.inference_mode(),
        cache_pairs(model, [(0, head) for head in range(16)], window=4, sparse=0, stateful=False),
    ):
        read_tokens(model, ids, cache=cache)
        read_tokens(model, ids + 100)
        with pytest.raises(ValueError, match="one set of prompts at a time"):
            read_tokens(model, ids, positions=torch.arange(12, 24)[None], cache=cache)


def test_which_models_can_have_a_cache() -> None:
    assert {name: why_not(delta.tiny(name)) for name in ("kimi_linear", "olmo_hybrid", "staterank_sse")} == {
        "kimi_linear": None, "olmo_hybrid": "its write strengths may be over 1", "staterank_sse": "its keys are not of length 1",
    }  # fmt: skip
    with (
        pytest.raises(ValueError, match="write strengths may be over 1"),
        cache_pairs(delta.tiny("olmo_hybrid"), [(0, 0)], window=1, sparse=0),
    ):
        pass


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_5", "qwen3_next"])
def test_other_models_with_empty_caches_are_the_models(name: str) -> None:
    model, ids = delta.tiny(name), torch.randint(3, 56, (2, 40), generator=torch.Generator().manual_seed(6))
    choose_kernels(model)
    pairs = [(layer.index, 1) for layer in linear_layers(model)]
    with torch.inference_mode():
        whole = model(ids).logits
        with cache_pairs(model, pairs, window=0, sparse=0):
            assert (model(ids).logits - whole).abs().max() < 1e-4
        with cache_pairs(model, pairs, window=3, sparse=2):
            assert (model(ids).logits - whole).abs().max() > 1e-4


def test_the_errors_of_recall_are_those_of_the_last_states() -> None:
    model = load_model("hybrid", device="cpu")
    ids = torch.randint(0, 8000, (2, 50), generator=torch.Generator().manual_seed(7))
    seen: list[tuple[Tensor, ...]] = []

    def look(kernel, query, key, value, *, g, beta, **options):
        seen.append((key, value, g, beta))
        return kernel(query, key, value, g=g, beta=beta, **options)

    layer = linear_layers(model)[0]
    with torch.inference_mode(), layer.scans_through(look):
        model(ids, use_cache=False)
    key, value, g, beta = (x.double() for x in seen[0])
    key = torch.nn.functional.normalize(key, dim=-1).repeat_interleave(2, 2)
    _, states = reference.gated_delta_rule(key, key, value, g, beta)
    recalled = torch.einsum("bthk,bhkv->bthv", key[:, -8:], states[:, -1])
    expected = (recalled - value[:, -8:]).square().sum((0, 1, 3)) / value[:, -8:].square().sum((0, 1, 3))
    assert (recall_errors(model, ids, n_pairs=8)[:16] - expected).abs().max() < 1e-3
    with pytest.raises(ValueError, match="n_pairs must lie in 1..50"):
        recall_errors(model, ids, n_pairs=51)


def test_what_is_stored_of_the_embedded_models_can_be_drawn_and_said() -> None:
    found = {}
    for name in EMBEDDED:
        stored = caching.load_caching(name)
        assert stored is not None
        found[name], _ = stored
    for of in found.values():
        for share in of.outcomes:
            curves = {split: of.curve(share, split) for split in caching.SPLITS}
            assert all(list(curve) == [0.0, 1 / 8, 1 / 4, 1 / 2] for curve in curves.values())
            plotting.plot_caches(Figure().subplots(), curves, other={})
    for of in found.values():
        head, (intact, removed, *rows) = caching.caching_table(of, 0.25)
        assert all(len(row) == len(head) for row in (intact, removed, *rows))
        freed = {row[0]: row[1] for row in (removed, *rows)}
        assert freed["no cache"] == freed["key channels"] == freed["random heads: no cache"] == "25.0%"
        assert freed["the last pairs, 1/8"] == freed["random heads: the last pairs, 1/8"] == "21.9%"
        assert freed["beside the states: half of each"] == "-12.5%"
    assert caching.left_in_words(found, 0.25).count("Removing these states costs") == 2
    assert caching.beside_in_words(found, 0.25).count("Beside the whole states of") == 2
    assert caching.beside_in_words(found, caching.PAPER_SHARE) == "Caches beside whole states were not measured."
