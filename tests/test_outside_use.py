"""What people did with models that this package did not make, or in places where it was not thought of: right, or refused with the reason."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import tiny_qwen3_next, unchecked
from torch import Tensor
from torch.autograd import forward_ad

from staterank_utils.architectures import linear_layers
from staterank_utils.decoding import generate_greedily
from staterank_utils.dispatch import choose_kernels
from staterank_utils.evaluation import answer_nats, evaluate, token_nats
from staterank_utils.models import load_tokenizer, make_cache, read_tokens
from staterank_utils.pruning import prune_heads
from staterank_utils.streaming import stream_states
from staterank_utils.surgery import ablate_heads, all_heads, mean_outputs
from staterank_utils.tasks import domain_prompts
from staterank_utils.tracing import trace_states

N_TOKENS = 24
SEGMENTED = [5, 9, N_TOKENS]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 56, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"])


def states(model: Any, ids: Tensor) -> Tensor:
    return unchecked(trace_states)(model, ids, positions=SEGMENTED).values


def runs(script: str) -> None:
    """A script ends well in a process of its own."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- compiled, wrapped, in training


def test_a_compiled_model_is_ablated(model, ids: Tensor) -> None:
    """torch.compile does not look at hooks again."""
    heads = all_heads(model)[:3]
    with torch.no_grad(), ablate_heads(model, heads):
        expected = model(ids).logits
    whole = torch.compile(model, backend="eager")
    with torch.no_grad():
        intact = whole(ids).logits
        with ablate_heads(model, heads):
            assert torch.equal(whole(ids).logits, expected)
        assert torch.equal(whole(ids).logits, intact)
    model.compile(backend="eager")
    with torch.no_grad():
        model(ids)
        with ablate_heads(model, heads):
            assert torch.equal(model(ids).logits, expected)


def test_an_ablated_model_with_a_static_cache_makes_the_tokens_of_any_other(model, ids: Tensor) -> None:
    heads = all_heads(model)[:5]
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }

    def logits(**more: str) -> Tensor:
        return torch.stack(model.generate(ids, **options, **more).logits)

    intact = logits()
    with ablate_heads(model, heads):
        expected = logits()
        torch.testing.assert_close(logits(cache_implementation="static"), expected)
    assert (expected - intact).abs().max() > 1e-3
    torch.testing.assert_close(logits(cache_implementation="static"), intact)


def test_a_compiled_model_or_base_is_traced(model, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staterank_utils.dispatch.SEGMENT", 8)
    expected = states(model, ids)
    assert torch.equal(states(torch.compile(model, backend="eager"), ids), expected)
    model.model = torch.compile(model.model, backend="eager")
    assert torch.equal(states(model, ids), expected)


def test_gradient_checkpointing_in_train_mode_keeps_the_cache(model, ids, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staterank_utils.dispatch.SEGMENT", 8)
    expected = states(model, ids)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(states(model, ids), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["bamba", "mamba2", "kimi_linear"])
def test_gradient_checkpointing_keeps_the_cache_of_other_families(name: str, ids, monkeypatch) -> None:
    monkeypatch.setattr("staterank_utils.dispatch.SEGMENT", 8)
    model = ARCHITECTURES[name].build()
    expected = states(model, ids)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(states(model, ids), expected)


def test_a_base_model_that_takes_anything_gets_its_cache(model, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staterank_utils.dispatch.SEGMENT", 8)
    expected = states(model, ids)
    base_class = type(model.model)

    class Takes(base_class):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return base_class.forward(self, *args, **kwargs)

    model.model.__class__ = Takes
    assert torch.equal(states(model, ids), expected)

    class Drops(base_class):
        def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            return base_class.forward(self, *args, **kwargs | {"use_cache": False})

    model.model.__class__ = Drops
    with pytest.raises(ValueError, match="did not keep the states after 8 tokens in it"):
        states(model, ids)


def test_dropout_does_not_touch_a_trace(ids: Tensor) -> None:
    model = tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"])
    expected = states(model, ids)
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    assert torch.equal(states(model, ids), expected)


def test_autocast_is_refused_for_states_and_right_for_logits(model, ids: Tensor) -> None:
    stock = copy.deepcopy(model)
    choose_kernels(stock, plain=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with pytest.raises(ValueError, match=r"torch\.autocast would compute in another"):
            states(model, ids)
        assert torch.equal(model(ids).logits, stock(ids).logits)


def test_adapters_are_traced_and_not_pruned(model, ids: Tensor) -> None:
    plain = states(model, ids)
    config = peft.LoraConfig(target_modules=["in_proj_qkvz", "out_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    found = states(adapted, ids)
    assert not torch.allclose(found, plain)
    with pytest.raises(ValueError, match="merge them first"):
        unchecked(prune_heads)(adapted, {0: [1]})
    with pytest.raises(ValueError, match="merge them first"):
        prune_heads(adapted.get_base_model(), {0: [1]})
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(states(merged, ids), found, atol=1e-5, rtol=1e-4)
    assert len(all_heads(prune_heads(merged, {0: [1]}))) == len(all_heads(model)) - 1


def test_a_configuration_that_asks_for_tuples(model, ids: Tensor) -> None:
    expected = read_tokens(model, ids)
    model.config.return_dict = False
    assert torch.equal(read_tokens(model, ids), expected)


# ---------------------------------------------------------------- results in ordinary torch


def test_what_is_returned_is_ordinary(model, ids: Tensor) -> None:
    trace = trace_states(model, ids, positions=[N_TOKENS], logits=True, log_norms=True)
    means = mean_outputs(model, ids)[0]
    for tensor in (trace.values, trace.log_decay, trace.write_strength, trace.logits, trace.log_norms, means):
        weight = torch.ones((), requires_grad=True)
        (tensor.double() * weight).sum().backward()
        tensor += 1
        assert weight.grad is not None


def test_a_model_that_is_pruned_in_inference_mode_is_ordinary(model, ids: Tensor) -> None:
    with torch.inference_mode():
        pruned = prune_heads(model, {0: [1]})
        pruned(ids)
    assert not any(parameter.is_inference() for parameter in pruned.parameters())
    assert generate_greedily(pruned, [[5, 6]], max_new_tokens=[20])
    pruned.requires_grad_(True)(ids, labels=ids, use_cache=False).loss.backward()


def test_an_intervention_is_seen_from_every_side(model, ids: Tensor) -> None:
    """Wrapped, by its base, and copied; blocks may end in any order."""
    before = dict(vars(model))
    for passed in (model, model.model):
        with (
            ablate_heads(passed, [(0, 1)]),
            pytest.raises(ValueError, match="under an intervention"),
        ):
            prune_heads(model, {0: [2]})
        assert prune_heads(model, {0: [2]}).config.removed_heads
    first, second = ablate_heads(model, [(0, 0)]), ablate_heads(model, [(0, 1)])
    first.__enter__()
    second.__enter__()
    with pytest.raises(ValueError, match=r"zero: \{0: \[0\]\}; zero: .* before you copy it"):
        copy.deepcopy(model)
    first.__exit__(None, None, None)
    with pytest.raises(ValueError, match="before you save it"):
        model.save_pretrained("nowhere")
    second.__exit__(None, None, None)
    assert dict(vars(model)) == before


def test_weights_keep_their_storage_while_a_model_decodes(model) -> None:
    places = [parameter.data_ptr() for parameter in model.parameters()]
    generate_greedily(model, [[5, 6]], max_new_tokens=[20])
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


@pytest.mark.parametrize("family", ["nemotron_h", "zamba2", "fla Mamba2", "falcon_h1"])
def test_a_pickled_model_is_read_as_before(family: str, ids: Tensor) -> None:
    """Token by token too, where transformers is corrected."""
    model = ARCHITECTURES[family].build()
    choose_kernels(model)
    layer = linear_layers(model)[0].index
    for each in (model, prune_heads(model, {layer: [0, 1, 2, 3]})):
        again = pickle.loads(pickle.dumps(each))
        caches = [make_cache(each), make_cache(again)]
        for token in range(4):
            one, other = (
                read_tokens(m, ids[:, token : token + 1], positions=torch.tensor([[token]]), cache=cache)
                for m, cache in zip((each, again), caches, strict=True)
            )
            assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["mamba2", "xlstm", "minimax", "qwen3_next"])
def test_a_model_is_pickled(family: str, ids: Tensor) -> None:
    model = ARCHITECTURES[family].build()
    choose_kernels(model)
    models = [model] if family == "xlstm" else [model, prune_heads(model, {0: [head for layer, head in all_heads(model) if layer == 0]})]  # fmt: skip
    for each in models:
        again = pickle.loads(pickle.dumps(each))
        assert type(again) is type(each)
        assert torch.equal(read_tokens(again, ids), read_tokens(each, ids))


def test_threads_that_are_started_later_have_as_many_as_before() -> None:
    script = (
        "import threading, torch\n"
        "from staterank_utils import singular_values\n"
        "torch.set_num_threads(2)\n"
        "singular_values(torch.eye(8).repeat(64, 1, 1))\n"
        "seen = []\n"
        "thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))\n"
        "thread.start(); thread.join()\n"
        "assert (seen, torch.get_num_threads()) == ([2], 2), seen\n"
    )
    runs(script)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux lists them")
def test_threads_that_decompose_start_no_threads_of_their_own() -> None:
    """OpenMP would count more threads than cores from then on, and all later work of the process take twice as long."""
    script = (
        "import os, torch\n"
        "from staterank_utils import singular_values\n"
        "def n_threads(): return len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(64, 128, 128)\n"
        "(x @ x).relu().sum()\n"
        "before = n_threads()\n"
        "for _ in range(2): singular_values(x)\n"
        "assert n_threads() <= before + 2, (before, n_threads())\n"
    )
    runs(script)


def test_forward_mode_differentiation_goes_the_plain_way(model, ids: Tensor) -> None:
    model.set_attn_implementation("eager")
    embedded = model.get_input_embeddings()(ids).detach()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(embedded, torch.ones_like(embedded))
        out = model(inputs_embeds=dual, use_cache=False).logits
        assert forward_ad.unpack_dual(out).tangent is not None


# ---------------------------------------------------------------- tables and traces of something else


def test_means_of_the_whole_model_are_refused_for_a_pruned_one(model, ids: Tensor) -> None:
    means = mean_outputs(model, ids)
    pruned = prune_heads(model, {0: [1]})
    with (
        pytest.raises(ValueError, match="means of layer 0 are of 4 heads, and it has 3"),
        ablate_heads(pruned, [(0, 2)], kind="mean", means=means),
    ):
        pass


def test_a_stored_trace_is_not_taken_for_that_of_another_model(model, ids: Tensor, tmp_path: Path) -> None:
    means = mean_outputs(model, ids)
    others = {layer: table + 1 for layer, table in means.items()}
    with ablate_heads(model, [(0, 1)], kind="mean", means=means):
        stream_states(model, ids, positions=[4], folder=tmp_path / "means")
    with (
        pytest.raises(ValueError, match="trace of other ablated heads"),
        ablate_heads(model, [(0, 1)], kind="mean", means=others),
    ):
        stream_states(model, ids, positions=[4], folder=tmp_path / "means")
    stream_states(model, ids, positions=[4], folder=tmp_path / "weights")
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data[:, torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))]
    with pytest.raises(ValueError, match="trace of other weights"):
        stream_states(model, ids, positions=[4], folder=tmp_path / "weights")
    mamba = ARCHITECTURES["falcon_h1"].build()
    stream_states(mamba, ids, positions=[4], folder=tmp_path / "buffers")
    mixer = next(module for module in mamba.modules() if "mup_vector" in module._buffers)
    mixer.mup_vector *= 2
    with pytest.raises(ValueError, match="trace of other weights"):
        stream_states(mamba, ids, positions=[4], folder=tmp_path / "buffers")


def test_positions_of_any_kind_and_measures_that_are_none(model, ids: Tensor, tmp_path: Path) -> None:
    for number, positions in enumerate((np.array([4, 8]), torch.tensor([4, 8]), [np.int64(4), np.int64(8)])):
        stored = unchecked(stream_states)(model, ids, positions=positions, folder=tmp_path / str(number))
        assert stored.positions == (4, 8)
    with pytest.raises(TypeError, match="must make one tensor of states, got tuple"):
        stored.measure(lambda states: (states.sum((-2, -1)), states.amax((-2, -1))))
    uneven = prune_heads(model, {0: [1]})
    with pytest.raises(ValueError, match="these have different numbers of them"):
        stream_states(uneven, ids, positions=[4], folder=tmp_path / "uneven")
    assert not (tmp_path / "uneven").exists()


# ---------------------------------------------------------------- bad input


class Drops:
    """A tokenizer that drops what it does not know."""

    all_special_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return 10**6

    def encode(self, text: str, **options: Any) -> list[int]:
        return []


def test_a_tokenizer_that_drops_characters_ends() -> None:
    with pytest.raises(ValueError, match="the tokenizer makes no token of"):
        domain_prompts("rare character", Drops(), n_prompts=1, n_tokens=8, seed=0)


class Wide:
    """A tokenizer of 150,000 tokens that counts how often it lists its special ones."""

    asked = 0

    def __len__(self) -> int:
        return 150_000

    @property
    def all_special_ids(self) -> list[int]:
        self.asked += 1
        return [0, 149_999]


def test_random_tokens_list_a_large_vocabulary_once() -> None:
    tokenizer = Wide()
    drawn = domain_prompts("random tokens", tokenizer, n_prompts=4, n_tokens=512, seed=0)
    assert tokenizer.asked == 1
    assert not set(tokenizer.all_special_ids) & set(drawn.flatten().tolist())


def test_a_tokenizer_of_another_model_names_both_sizes(model) -> None:
    tokenizer = load_tokenizer("hybrid")
    words = "the tokenizer has 8,192 tokens and the model knows 64"
    with pytest.raises(ValueError, match=words):
        evaluate("recall", model, tokenizer, n_instances=1)
    with pytest.raises(ValueError, match=words):
        answer_nats("recall", model, tokenizer, n_instances=1)
    with pytest.raises(ValueError, match=r"token id 999 is outside the model's vocabulary 0\.\.63"):
        token_nats(model, torch.full((1, 4), 999))


def test_what_is_no_input_is_named_in_a_process_without_a_type_checker(tmp_path: Path) -> None:
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from conftest import tiny_qwen3_next
from staterank_utils import load_tokenizer, prune_heads, singular_values, trace_states
from staterank_utils.evaluation import answer_nats, token_nats
from staterank_utils.models import output_logits, read_tokens
from staterank_utils.surgery import ablate_heads, forward_with_edits, mean_outputs

model, ids = tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"]), torch.ones(1, 8, dtype=torch.long)
no_prompts = [[1, 2]], np.array([[1, 2]]), torch.tensor([1, 2])
prompts = "shape (batch, token)"
pairs = "expected (layer, head) pairs, such as [(0, 3), (5, 1)], got"
axes = "reduce must keep the axes (batch, position, head)"
calls = [
    *((lambda x=x: token_nats(model, x), prompts) for x in no_prompts),
    *((lambda x=x: mean_outputs(model, x), prompts) for x in no_prompts),
    *((lambda x=x: forward_with_edits(model, x, heads=[(0, 1)], edit=lambda s: s), prompts) for x in no_prompts),
    *((lambda n=n: answer_nats("recall", model, load_tokenizer("hybrid"), n_instances=1, batch_size=n), f"at least 1, got {n}") for n in (-1, 0)),
    *((lambda x=x: ablate_heads(model, x).__enter__(), pairs) for x in ({0: [3]}, (0, 3), 3)),
    (lambda: prune_heads(model, {0: 3}), "expected the heads of layer 0 as a list, such as [3], got 3"),
    (lambda: trace_states(model, ids, positions=64), "positions are whole numbers of tokens, such as [32, 64], got 64"),
    *((lambda f=f: trace_states(model, ids, positions=[4, 8], reduce=f), axes) for f in (torch.sum, lambda s: s.sum((0, -2, -1)))),
    (lambda: singular_values([[1.0]]), "expected states as a tensor"),
    (lambda: output_logits(model.model, read_tokens(model.model, ids)), "Qwen3NextModel has no output embedding"),
]
for call, words in calls:
    try:
        call()
    except (TypeError, ValueError) as error:
        assert words in str(error), (words, str(error))
    else:
        raise AssertionError(words)
with ablate_heads(torch.compile(model, backend="eager"), [(0, 1)]):
    pass
assert "save_pretrained" not in vars(model)
print(len(calls))
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20
