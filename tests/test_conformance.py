"""What must hold for every architecture, each on a tiny random model of the real class (`architectures`).

Where there is a GPU, all of it runs there, flash-linear-attention's models through its kernels.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import conformance
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, delta, fla_models, mlstm, oracle, ssd
from architectures.oracle import Architecture
from torch import Tensor, nn
from transformers import PreTrainedModel

from staterank_utils.architectures import cache_bytes, linear_layers
from staterank_utils.channels import keep_channels, order_channels
from staterank_utils.decoding import pad_left
from staterank_utils.dispatch import choose_kernels
from staterank_utils.fla_cpu import loses_its_cache
from staterank_utils.memory import cap_half_life, check_memory_bound, scale_decay
from staterank_utils.models import load_model, make_cache, output_logits, read_tokens
from staterank_utils.pruning import prune_heads, removed_heads
from staterank_utils.reference import gated_delta_rule
from staterank_utils.surgery import ablate_heads, all_heads, forward_with_edits, mean_outputs
from staterank_utils.tracing import trace_states

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 1e-4  # float32 sums in another order, of logits with a standard deviation of about 0.5
TOLERANCE = {"cpu": ROUNDING, "cuda": 1e-3}[DEVICE]
# Of a standard deviation, root mean square. What kernels on a GPU pass on to each other is in bfloat16 too.
HALF, HALF_OF_LOGITS = 0.05, {"cpu": 0.05, "cuda": 0.1}[DEVICE]
NARROW_STATES = 0.15
N_TOKENS = 96
POSITIONS = [1, 2, 3, 63, 65, 96]
AT = [position - 1 for position in POSITIONS]
CUTS = {"32+64": [32], "5+91": [5], "32+1+63": [32, 33], "token by token": [*range(1, N_TOKENS)]}
LATE = [90, *range(91, N_TOKENS)]  # a prompt, then token by token

pytestmark = [
    pytest.mark.filterwarnings("ignore:According to Bo"),
    pytest.mark.filterwarnings("ignore:ChunkDeltaRuleFunction does not support float32"),  # on all platforms, RWKV-7's
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
Removal = dict[int, list[int]]


def _removals(first: int, last: int, n_heads: int, per_key: int) -> dict[str, Removal]:
    heads = list(range(n_heads))
    return {
        "a group": {first: heads[:per_key]},
        "one of each group": {last: [key + key // per_key % per_key for key in heads[:: max(2, per_key)]]},
        "unevenly": {first: [1], last: [0, 2]},
        "all but one": {first: heads[:-1]},
        "a whole layer": {first: heads},
    }


REMOVALS = tuple(_removals(0, 1, 4, 2))
few_removals = pytest.mark.parametrize("removal", ["unevenly", "a whole layer"], indirect=True)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ARCHITECTURES]
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def architecture(name: str) -> Architecture:
    return ARCHITECTURES[name]


@pytest.fixture(scope="module")
def model(architecture: Architecture) -> PreTrainedModel:
    torch.set_num_threads(1)
    made = architecture.build().to(DEVICE)
    choose_kernels(made)
    return made


@pytest.fixture(scope="module")
def half(architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return loaded(architecture.build(), tmp_path_factory.mktemp("half"), torch.bfloat16)


@pytest.fixture(params=["float32", "bfloat16"])
def of_dtype(request: pytest.FixtureRequest, model, half) -> PreTrainedModel:
    return model if request.param == "float32" else half


@pytest.fixture(scope="module")
def three() -> Tensor:
    return torch.randint(3, 56, (3, N_TOKENS), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.fixture(params=[1, 3], ids=["batch 1", "batch 3"])
def ids(request: pytest.FixtureRequest, three: Tensor) -> Tensor:
    return three[: request.param]


@pytest.fixture(params=REMOVALS)
def removal(request: pytest.FixtureRequest, architecture: Architecture, model: PreTrainedModel) -> Removal:
    chosen = removals(model)[request.param]
    if request.param in architecture.refused:
        with pytest.raises(ValueError, match="cannot be removed exactly|whole groups, or as many heads of each"):
            prune_heads(model, chosen)
        pytest.skip("cannot be exact, and is refused")
    return chosen


@pytest.fixture
def keep(name: str) -> Callable[..., float]:
    return partial(conformance.keep, name)


def removals(model: PreTrainedModel) -> dict[str, Removal]:
    layers = linear_layers(model)
    n_heads = layers[0].n_heads
    return _removals(layers[0].index, layers[-1].index, n_heads, n_heads // layers[0].n_keys)


def pairs(removal: Removal) -> list[tuple[int, int]]:
    return [(layer, head) for layer, heads in removal.items() for head in heads]


def dtype_of(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def loaded(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Saved and loaded, so that what a class keeps in float32 in a model of bfloat16 is kept so."""
    model.save_pretrained(folder)
    return load_model(str(folder), dtype=dtype, device=DEVICE)


@torch.no_grad()
def whole(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens in one pass, as users call a model."""
    more = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    return model(ids, use_cache=False, **more).logits


@torch.no_grad()
def in_pieces(
    model: PreTrainedModel, ids: Tensor, cuts: list[int], mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits of all tokens, read through the cache in pieces that end at the cuts, and the states in the cache after them."""
    cache, parts = make_cache(model), []
    positions = (torch.ones_like(ids) if mask is None else mask).cumsum(1).sub(1).clamp_min(0)
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :stop]
        hidden = read_tokens(model, ids[:, start:stop], positions=positions[:, start:stop], cache=cache, mask=seen)
        parts.append(output_logits(model, hidden))
    return torch.cat(parts, 1), [layer.state(cache).clone() for layer in linear_layers(model) if layer.n_heads]


def apart(found: Tensor, expected: Tensor) -> float:
    return (found.cpu().double() - expected.cpu().double()).abs().max().item()


def apart_of_std(found: Tensor, expected: Tensor) -> float:
    found, expected = found.cpu().double(), expected.cpu().double()
    return ((found - expected).square().mean().sqrt() / expected.std()).item()


# ---------------------------------------------------------------- reading


def property_of(cuts: str) -> str:
    return conformance.TOKENS if cuts == "token by token" else conformance.SEGMENTS


@pytest.mark.parametrize("cuts", CUTS)
def test_pieces_are_one_pass(model, ids, cuts: str, keep) -> None:
    logits, _ = in_pieces(model, ids, CUTS[cuts])
    assert keep(property_of(cuts), apart(logits, whole(model, ids))) < TOLERANCE


@pytest.mark.parametrize("cuts", CUTS)
def test_pieces_are_one_pass_in_bfloat16(architecture, half, three, cuts: str, keep) -> None:
    expected = whole(half, three)
    logits, states = in_pieces(half, three, CUTS[cuts])
    assert keep(property_of(cuts), apart_of_std(logits, expected), dtype="bfloat16") < (
        HALF_OF_LOGITS if architecture.wide_states else NARROW_STATES
    )
    assert all(state.dtype == (torch.float32 if architecture.wide_states else torch.bfloat16) for state in states)


def test_states_follow_the_float64_recurrence(architecture, model, ids, keep) -> None:
    trace = trace_states(model, ids, positions=POSITIONS, logits=True, batch_size=len(ids))
    layers = architecture.expected(model, ids)
    assert len(layers) == len(trace.layers)
    for row, expected in enumerate(layers):
        states = expected.states[:, AT]
        assert trace.values[row].shape == states.shape
        assert keep(conformance.STATES, apart(trace.values[row], states) / states.abs().max().item()) < TOLERANCE
        gates = (trace.log_decay[row], trace.write_strength[row])
        for found, gate in zip(gates, (expected.log_decay, expected.write_strength), strict=True):
            assert apart(found, gate.mean(1)) < TOLERANCE * max(1.0, gate.abs().max().item())
    assert trace.values.abs().max() > 0.01
    assert apart(trace.logits, whole(model, ids)[:, AT]) < TOLERANCE


def test_states_in_bfloat16(architecture, half, ids, keep) -> None:
    """Against the float64 recurrence over what the projections put out in bfloat16."""
    assert any(layer.keeps_dtype for layer in linear_layers(half)) is not architecture.wide_states
    if not architecture.wide_states:
        with pytest.raises(ValueError, match="keeps its states in torch.bfloat16"):
            trace_states(half, ids, positions=POSITIONS)
        return
    trace = trace_states(half, ids, positions=POSITIONS, batch_size=len(ids))
    assert trace.values.dtype == torch.float32
    for found, expected in zip(trace.values, architecture.expected(half, ids), strict=True):
        states = expected.states[:, AT]
        assert keep(conformance.STATES, apart_of_std(found, states), dtype="bfloat16") < HALF


def test_an_adapter_reads_the_gates_off_the_projections(architecture, model, three) -> None:
    """Also where a trace takes them from the kernel's arguments."""
    layers, seen = linear_layers(model), {}
    hooks = [
        layer.module.get_submodule(name).register_forward_hook(
            lambda _, __, output, key=(row, name): seen.update({key: output})
        )
        for row, layer in enumerate(layers)
        for name in layer.gate_modules
    ]
    expected = architecture.expected(model, three)
    for hook in hooks:
        hook.remove()
    for row, (layer, gates) in enumerate(zip(layers, expected, strict=True)):
        log_decay, strength = layer.gates(*(seen[row, name] for name in layer.gate_modules))
        over_channels = log_decay.mean(-1) if log_decay.ndim == 4 else log_decay
        for read, gate in ((over_channels, gates.log_decay), (strength, gates.write_strength)):
            assert read.shape == gate.shape
            assert apart(read, gate) < TOLERANCE * max(1.0, gate.abs().max().item())


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU all of the checks are about the plain kernels")
def test_plain_kernels_on_a_gpu_follow_the_float64_recurrence(architecture, model, three) -> None:
    choose_kernels(model, plain=True)
    try:
        trace = trace_states(model, three, positions=POSITIONS)
        for found, expected in zip(trace.values, architecture.expected(model, three), strict=True):
            states = expected.states[:, AT]
            assert apart(found, states) / states.abs().max().item() < TOLERANCE
    finally:
        choose_kernels(model)


def test_the_cache_holds_the_traced_state_to_read_and_to_write(model, three) -> None:
    _, states = in_pieces(model, three, [])
    trace = trace_states(model, three, positions=[N_TOKENS], batch_size=3)
    for state, traced in zip(states, trace.values, strict=True):
        assert apart(state, traced[:, 0]) / traced.abs().max().item() < TOLERANCE
    run = {"heads": all_heads(model)[1:2], "every": 32}
    kept = forward_with_edits(model, three, edit=lambda state: state, **run)
    cleared = forward_with_edits(model, three, edit=torch.zeros_like, **run)
    assert torch.equal(kept[:, :32], cleared[:, :32])
    assert apart(kept[:, 32:], cleared[:, 32:]) > 10 * ROUNDING


def test_left_padding_changes_nothing(architecture, model, half, three, keep) -> None:
    if not architecture.pads:
        with pytest.raises(ValueError, match="prompts of different lengths side by side.*batch_size=1"):
            pad_left(model, [[5, 6], [7]])
        return
    mask = torch.ones_like(three)
    mask[0, :9], mask[1, :20] = 0, 0
    found = [whole(model, three, mask), *(in_pieces(model, three, cuts, mask)[0] for cuts in ([32], LATE))]
    for row, skip in ((0, 9), (1, 20)):
        alone = whole(model, three[row : row + 1, skip:])
        assert keep(conformance.PADDING, max(apart(logits[row, skip:], alone[0]) for logits in found)) < TOLERANCE
        in_half, alone = whole(half, three, mask)[row, skip:], whole(half, three[row : row + 1, skip:])[0]
        assert keep(conformance.PADDING, apart_of_std(in_half, alone), dtype="bfloat16") < HALF_OF_LOGITS


# ---------------------------------------------------------------- ablating


@pytest.mark.parametrize("kind", ["zero", "mean", "frozen"])
def test_ablation_leaves_the_other_heads_alone(of_dtype, architecture, three, kind: str, keep) -> None:
    model = of_dtype
    means = {"means": mean_outputs(model, three)} if kind == "mean" else {}
    for row, layer in enumerate(linear_layers(model)):
        index, n_heads = layer.index, layer.n_heads
        # Heads that share a value stop writing together.
        chosen = list(range(n_heads // layer.n_keys)) if kind == "frozen" else [1]
        others = [head for head in range(n_heads) if head not in chosen]
        for cuts in ([], [32], LATE):
            logits, states = in_pieces(model, three, cuts)
            with ablate_heads(model, [(index, head) for head in chosen], kind=kind, **means):
                ablated, inside = in_pieces(model, three, cuts)
            after, left = in_pieces(model, three, cuts)
            assert torch.equal(after, logits)
            assert all(torch.equal(a, b) for a, b in zip(left, states, strict=True))
            assert apart(ablated, logits) > 10 * ROUNDING
            changed = [apart(a, b) for a, b in zip(inside[:row], states[:row], strict=True)]
            if others:
                changed.append(apart(inside[row][:, others], states[row][:, others]))
            assert keep(conformance.OTHERS, max(changed, default=0.0), dtype=dtype_of(model)) == 0
            if kind == "frozen":
                assert not inside[row][:, chosen].any()
            else:
                assert torch.equal(inside[row], states[row])


def test_a_trace_under_ablation_is_of_the_same_states(model, three) -> None:
    index = linear_layers(model)[0].index
    before = trace_states(model, three, positions=POSITIONS).values
    with ablate_heads(model, [(index, 1)]):
        inside = trace_states(model, three, positions=POSITIONS).values
    assert torch.equal(inside[0], before[0])
    assert not torch.equal(inside[-1], before[-1])
    assert torch.equal(trace_states(model, three, positions=POSITIONS).values, before)


# ---------------------------------------------------------------- memory

NO_DECAY = ("fla DeltaNet", "fla DeltaNet, gated", "fla LinearAttention", "fla LinearAttention, normalised")


def test_no_rank_exceeds_the_memory_bound(name, model, three) -> None:
    check = check_memory_bound(model, three, positions=[3, 33, N_TOKENS])
    assert check.n_violations == 0
    assert check.void.all() or name not in NO_DECAY
    assert (check.rank <= torch.tensor(check.positions)[:, None]).all()


def _scaled(factor: float, head: int) -> Callable[[Tensor], Tensor]:
    def change(log_decay: Tensor) -> Tensor:
        factors = torch.ones(log_decay.shape[2], dtype=log_decay.dtype, device=log_decay.device)
        factors[head] = factor
        return log_decay * factors.view(-1, *[1] * (log_decay.ndim - 3))

    return change


CHANGES = {
    "capped": (lambda model: cap_half_life(model, 0.5), lambda log_decay: log_decay.clamp_max(-math.log(2) / 0.5)),
    "slower": (lambda model: scale_decay(model, 0.25, [(linear_layers(model)[0].index, 1)]), _scaled(0.25, 1)),
    "faster": (lambda model: scale_decay(model, 4.0, [(linear_layers(model)[0].index, 0)]), _scaled(4.0, 0)),
}
changes = pytest.mark.parametrize("change", CHANGES)


@pytest.fixture
def decaying(name: str, model: PreTrainedModel) -> PreTrainedModel:
    if name in NO_DECAY:
        with pytest.raises(ValueError, match="has no decay that can be changed"), cap_half_life(model, 2.0):
            pass
        pytest.skip("has no decay, and is refused")
    return model


@changes
def test_a_changed_decay_is_that_of_the_float64_recurrence(
    architecture, decaying, three, change: str, monkeypatch
) -> None:
    """Of the first layer, whose inputs the change leaves as they are."""
    within, changed = CHANGES[change]
    means: list[Tensor] = []

    def of_changed(rule: Callable[..., object], place: int) -> Callable[..., object]:
        def call(*args: Tensor, **options: Tensor) -> object:
            own = args[place].double()
            log_decay = torch.where(own == 0, own, changed(own))  # what is idle, a partition of SSE, does not decay
            means.append((log_decay.mean(-1) if log_decay.ndim == 4 else log_decay).mean(1))
            return rule(*args[:place], log_decay, *args[place + 1 :], **options)

        return call

    for module in (ssd, mlstm, fla_models):
        monkeypatch.setattr(module, "recurrence", of_changed(oracle.recurrence, 2))
    monkeypatch.setattr(delta, "gated_delta_rule", of_changed(gated_delta_rule, 3))
    states = architecture.expected(decaying, three)[0].states[:, AT]
    with within(decaying):
        trace = trace_states(decaying, three, positions=POSITIONS, batch_size=3)
    assert apart(trace.values[0], states) / states.abs().max().item() < TOLERANCE
    assert apart(trace.log_decay[0], means[0]) < TOLERANCE * max(1.0, means[0].abs().max().item())
    whole_trace = trace_states(decaying, three, positions=POSITIONS, batch_size=3)
    assert apart(whole_trace.values[0], states) / states.abs().max().item() > 10 * TOLERANCE


@changes
def test_pieces_are_one_pass_also_where_decay_is_changed(decaying, three, change: str) -> None:
    before = whole(decaying, three)
    with CHANGES[change][0](decaying):
        inside = whole(decaying, three)
        for cuts in ([32], LATE):
            assert apart(in_pieces(decaying, three, cuts)[0], inside) < TOLERANCE
    assert apart(inside, before) > 10 * ROUNDING
    assert torch.equal(whole(decaying, three), before)


def test_changes_of_the_decay_nest(decaying, three) -> None:
    with scale_decay(decaying, 0.5):
        half = whole(decaying, three)
    with scale_decay(decaying, 4.0), scale_decay(decaying, 0.125):
        assert apart(whole(decaying, three), half) < TOLERANCE
        assert apart(in_pieces(decaying, three, LATE)[0], half) < TOLERANCE


def test_a_layer_tells_the_decay_under_which_it_runs(decaying, three) -> None:
    layer = linear_layers(decaying)[0]
    seen: dict[str, Tensor] = {}
    told: list[Tensor] = []

    def look(name: str, output: Tensor) -> None:
        seen[name] = output
        if len(seen) == len(layer.gate_modules):
            told.append(layer.gates(*(seen[each] for each in layer.gate_modules))[0])
            seen.clear()

    hooks = [
        layer.module.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name in layer.gate_modules
    ]
    whole(decaying, three)
    with scale_decay(decaying, 3.0):
        whole(decaying, three)
    for hook in hooks:
        hook.remove()
    before, inside = told
    torch.testing.assert_close(inside, 3 * before)


def test_a_changed_decay_and_ablated_heads_compose_in_any_order(decaying, three) -> None:
    index = linear_layers(decaying)[0].index
    with cap_half_life(decaying, 2.0), ablate_heads(decaying, [(index, 1)]):
        first = whole(decaying, three)
    with ablate_heads(decaying, [(index, 1)]), cap_half_life(decaying, 2.0):
        assert torch.equal(whole(decaying, three), first)
    with cap_half_life(decaying, 2.0):
        assert apart(whole(decaying, three), first) > 10 * ROUNDING


# ---------------------------------------------------------------- removing


@torch.no_grad()
def state_bytes(model: PreTrainedModel, ids: Tensor) -> int:
    cache = make_cache(model)
    read_tokens(model, ids, cache=cache)
    return cache_bytes(cache)["recurrent"]


def test_removed_equals_ablated(model, three, removal, keep) -> None:
    pruned = prune_heads(model, removal)
    with ablate_heads(model, pairs(removal)):
        expected = whole(model, three)
        alone = whole(model, three[:1])
    assert apart(whole(model, three), expected) > 10 * ROUNDING
    share = 1 - len(pairs(removal)) / len(all_heads(model))
    assert state_bytes(pruned, three) == round(share * state_bytes(model, three))
    assert keep(conformance.REMOVED, apart(whole(pruned, three[:1]), alone)) < TOLERANCE
    for logits in (whole(pruned, three), *(in_pieces(pruned, three, cuts)[0] for cuts in ([32], [5], LATE))):
        assert keep(conformance.REMOVED, apart(logits, expected)) < TOLERANCE


def test_removed_equals_ablated_with_left_padding(model, three, removal, keep) -> None:
    mask = torch.ones_like(three)
    mask[0, :9] = 0
    pruned = prune_heads(model, removal)
    for cuts in ([], [32], LATE):
        with ablate_heads(model, pairs(removal)):
            expected, _ = in_pieces(model, three, cuts, mask)
        found, _ = in_pieces(pruned, three, cuts, mask)
        assert keep(conformance.REMOVED, apart(found[mask == 1], expected[mask == 1])) < TOLERANCE


@few_removals
def test_removed_equals_ablated_in_bfloat16(half, three, removal, keep) -> None:
    pruned = prune_heads(half, removal)
    for ids in (three[:1], three):
        with ablate_heads(half, pairs(removal)):
            expected = whole(half, ids)
        assert keep(conformance.REMOVED, apart_of_std(whole(pruned, ids), expected), dtype="bfloat16") < 2 * HALF


def test_removing_twice_is_removing_at_once(architecture, model, three) -> None:
    first = linear_layers(model)[0].index
    if architecture.refused:
        pytest.skip("which heads can be removed depends on those that are left")
    twice = prune_heads(prune_heads(model, {first: [0, 3]}), {first: [2]})
    once = prune_heads(model, {first: [0, 2, 3]})
    assert not {0, 2, 3} & set(linear_layers(twice)[0].heads)
    assert apart(whole(twice, three), whole(once, three)) < TOLERANCE


def assert_the_same_when_loaded(
    model: PreTrainedModel, ids: Tensor, folder: Path, keep: Callable[..., float]
) -> PreTrainedModel:
    """A model saved and loaded, which is the same bit for bit."""
    again = loaded(model, folder, model.dtype)
    for (key, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b), key
    assert keep(conformance.SAVED, apart(whole(again, ids), whole(model, ids)), dtype=dtype_of(model)) == 0
    return again


def test_saved_and_loaded_bit_for_bit(of_dtype, three, tmp_path: Path, keep) -> None:
    assert_the_same_when_loaded(of_dtype, three, tmp_path, keep)


@few_removals
def test_pruned_saved_and_loaded_bit_for_bit(of_dtype, three, removal, tmp_path: Path, keep) -> None:
    again = assert_the_same_when_loaded(prune_heads(of_dtype, removal), three, tmp_path, keep)
    assert removed_heads(again.config.get_text_config()) == removal


@few_removals
@pytest.mark.skipif(DEVICE == "cuda", reason="two nearly equal logits change places where products are in TF32")
def test_generation(model, three, removal) -> None:
    if loses_its_cache(model):
        pytest.skip("fla 0.6 does not know how transformers 5.24 names a cache")
    prompt, options = three[:, :20], {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    made = prune_heads(model, removal).generate(prompt, **options)
    expected = prompt
    with ablate_heads(model, pairs(removal)):
        assert torch.equal(made, model.generate(prompt, **options))
        for _ in range(options["max_new_tokens"]):
            expected = torch.cat((expected, whole(model, expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, expected)


@few_removals
def test_a_pruned_model_trains(name, model, three, removal) -> None:
    if DEVICE == "cpu" and name.startswith("fla "):
        pytest.skip("fla's layers have their gradients from Triton kernels alone")
    pruned = prune_heads(model, removal).requires_grad_(True).train()
    logits = pruned(three[:, :20], use_cache=False).logits
    try:
        F.cross_entropy(logits[:, :-1].flatten(0, 1), three[:, 1:20].flatten()).backward()
    except RuntimeError as error:
        if "Please upgrade Triton" not in str(error):
            raise
        pytest.skip(f"fla refuses the backward pass: {error}")
    for layer in linear_layers(pruned):
        for blocks in layer.blocks:
            weight = blocks.tensor(layer.module)
            if isinstance(weight, nn.Parameter) and weight.numel():
                assert weight.grad is not None, blocks.weight
                assert weight.grad.any(), blocks.weight


def test_key_channels_are_cut_or_refused(model, three, tmp_path: Path) -> None:
    layer = linear_layers(model)[0]
    if layer.d_k_setting is None:
        with pytest.raises(ValueError, match="key channels of .* cannot be cut"):
            order_channels(model, three)
        return
    reduced = keep_channels(model, order_channels(model, three), share=0.25)
    kept = 0.75 * layer.d_k
    assert trace_states(reduced, three, positions=[N_TOKENS]).values.shape[-2:] == (kept, layer.d_v)
    assert torch.equal(whole(loaded(reduced, tmp_path, reduced.dtype), three), whole(reduced, three))
