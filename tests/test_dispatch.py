"""Any model object is served, side by side with others, and nothing is left behind: in transformers, in fla, in the model."""

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from staterank_utils.architectures import linear_layers
from staterank_utils.dispatch import Kernel, backends, choose_kernels, suited_kernels
from staterank_utils.fla_cpu import loses_its_cache
from staterank_utils.memory import scale_decay
from staterank_utils.models import EMBEDDED, load_model, make_cache, read_tokens
from staterank_utils.pruning import prune_heads
from staterank_utils.rebinding import Rebinding, calls_through, functions_called
from staterank_utils.surgery import ablate_heads, all_heads
from staterank_utils.tracing import trace_states

N_TOKENS = 24
FAMILIES = ("qwen3_next", "kimi_linear", "mamba2", "minimax", "xlstm", "fla GatedDeltaNet", "fla Mamba2", "fla RWKV7")
each_family = pytest.mark.parametrize("family", [name for name in FAMILIES if name in ARCHITECTURES])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 56, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))


def attributes(model: PreTrainedModel) -> dict[tuple[Any, ...], Any]:
    """Every attribute of the modules, classes and functions of transformers and fla that are imported, and of a model's modules."""
    found: dict[tuple[Any, ...], Any] = {}
    for path, module in list(sys.modules.items()):
        if path.startswith(("transformers.modeling", "transformers.models.", "transformers.cache", "fla.")):
            for name, value in list(vars(module).items()):
                found[path, name] = value
                if isinstance(value, FunctionType):
                    found |= {(path, name, attribute): inner for attribute, inner in vars(value).items()}
                if isinstance(value, type) and value.__module__ == path:
                    found |= {(path, name, attribute): inner for attribute, inner in vars(value).items()}
    for path, module in model.named_modules():
        hooks = {name: value for name, value in vars(module).items() if name.endswith("_hooks") and value is not None}
        found |= {("model", path, "number of", name): len(value) for name, value in hooks.items()}
        found |= {("model", path, name): value for name, value in vars(module).items()}
        found |= {("model", path, "parameters", name): value for name, value in module._parameters.items()}
        found |= {("model", path, "buffers", name): value for name, value in module._buffers.items()}
    return found


def check_left_alone(before: dict[tuple[Any, ...], Any], after: dict[tuple[Any, ...], Any]) -> None:
    """Nothing is another object than before, and nothing is new in what was there."""
    assert [key for key, value in before.items() if after.get(key) is not value] == []
    there = {key[0] for key in before}
    new = [key for key in after.keys() - before.keys() if key[0] in there and not isinstance(after[key], ModuleType)]
    assert new == []


@each_family
def test_a_model_that_its_constructor_made_is_served_and_left_alone(family: str, ids: Tensor) -> None:
    model, prepared = ARCHITECTURES[family].build(), ARCHITECTURES[family].build()
    choose_kernels(prepared)
    heads = all_heads(model)[:2]
    expected = trace_states(prepared, ids, positions=[7, N_TOKENS])
    with ablate_heads(prepared, heads):
        without = read_tokens(prepared, ids)
    has_decay = linear_layers(model)[0].decay_can_change
    before = attributes(model)
    trace = trace_states(model, ids, positions=[7, N_TOKENS], log_norms=True)
    assert torch.equal(trace.values, expected.values)
    assert torch.equal(trace.log_decay, expected.log_decay)
    with ablate_heads(model, heads):
        assert torch.equal(read_tokens(model, ids), without)
    if has_decay:
        with scale_decay(model, 2.0):
            read_tokens(model, ids)
    check_left_alone(before, attributes(model))


@each_family
def test_other_kernels_leave_what_they_were_chosen_in_the_place_of(family: str) -> None:
    model = ARCHITECTURES[family].build()
    before = attributes(model)
    choose_kernels(model)
    after = attributes(model)
    changed = {key for key, value in before.items() if after.get(key) is not value}
    assert all(key[0] == "model" for key in changed)


def test_two_models_are_read_in_two_threads(ids: Tensor) -> None:
    """Which once left module functions replaced, for the rest of the process."""
    models = [ARCHITECTURES["nemotron_h"].build() for _ in range(2)]
    expected = [trace_states(model, ids, positions=[N_TOKENS]).values for model in models]
    found: list[list[Tensor]] = [[], []]

    def run(place: int) -> None:
        for _ in range(4):
            found[place].append(trace_states(models[place], ids, positions=[N_TOKENS]).values)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(values) for values in found] == [4, 4]
    for values, value in zip(found, expected, strict=True):
        assert all(torch.equal(each, value) for each in values)


def test_a_copy_of_a_model_with_kernels_has_its_own() -> None:
    model = load_model("hybrid", device="cpu")
    twin = copy.deepcopy(model)
    forward = vars(linear_layers(twin)[0].module)["forward"]
    assert forward.__self__ is linear_layers(twin)[0].module
    choose_kernels(twin, plain=True)
    [kernel] = functions_called(linear_layers(model)[0].module, ["causal_conv1d_fn"])["causal_conv1d_fn"][:1]
    assert isinstance(kernel, Kernel)
    assert not kernel.plain


def test_a_model_with_kernels_is_pickled(ids: Tensor) -> None:
    model = ARCHITECTURES["mamba2"].build()
    choose_kernels(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(read_tokens(again, ids), read_tokens(model, ids))


def test_while_it_is_trained(ids: Tensor) -> None:
    """Between two steps of an optimizer, in train mode, with gradient checkpointing."""
    model = ARCHITECTURES["qwen3_next"].build().requires_grad_(True).train()
    expected = trace_states(model, ids, positions=[N_TOKENS]).values
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert torch.equal(trace_states(model, ids, positions=[N_TOKENS]).values, expected)
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
    optimizer.step()
    assert not torch.equal(trace_states(model, ids, positions=[N_TOKENS]).values, expected)
    assert model.training


def test_a_subclass_of_a_layer_is_that_layer(ids: Tensor) -> None:
    class MyNet(Qwen3NextGatedDeltaNet):
        pass

    class Deaf(Qwen3NextGatedDeltaNet):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    model = ARCHITECTURES["qwen3_next"].build()
    expected = trace_states(model, ids, positions=[N_TOKENS]).values
    for layer in linear_layers(model):
        layer.module.__class__ = MyNet
    assert torch.equal(trace_states(model, ids, positions=[N_TOKENS]).values, expected)
    for layer in linear_layers(model):
        layer.module.__class__ = Deaf
    with pytest.raises(ValueError, match="Deaf does not call torch_chunk_gated_delta_rule, .* overrides a method"):
        trace_states(model, ids, positions=[N_TOKENS])


def test_nothing_in_transformers_or_fla_is_ours() -> None:
    """After the import, and after whatever ran before this test."""
    ours = []
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] in ("transformers", "fla"):
            for name, value in list(vars(module).items()):
                inner = vars(value).items() if isinstance(value, type) and value.__module__ == path else ()
                for attribute, each in [(name, value), *inner]:
                    if str(getattr(each, "__module__", None)).startswith("staterank"):
                        ours.append((path, name, attribute))
    assert ours == []


def test_other_models_are_built_as_without_this_package() -> None:
    from transformers import (
        EncodecConfig,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        T5Config,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MusicgenConfig(
        text_encoder=T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).to_dict(),
        audio_encoder=EncodecConfig(hidden_size=16, num_filters=2, codebook_size=32, codebook_dim=16).to_dict(),
        decoder=MusicgenDecoderConfig(vocab_size=32, ffn_dim=16, **small).to_dict(),
    )
    assert config.sub_configs
    assert MusicgenForConditionalGeneration(config).num_parameters() > 0


def test_a_pruned_model_is_of_a_subclass_and_the_whole_one_of_its_own() -> None:
    model = ARCHITECTURES["qwen3_next"].build()
    pruned = prune_heads(model, {0: [1]})
    assert isinstance(pruned, Qwen3NextForCausalLM)
    assert type(model) is Qwen3NextForCausalLM
    assert type(model.config) is not type(pruned.config)


def test_backends_are_those_that_were_chosen() -> None:
    model = load_model("hybrid", device="cpu")
    assert set(backends(model).values()) == {"torch"}
    assert list(backends(model)) == [layer.index for layer in linear_layers(model)]


# ---------------------------------------------------------------- rebinding


def shout(word: str) -> str:
    return word.upper()


def decorated(function: Callable[..., str]) -> Callable[..., str]:
    def inner(*args: Any) -> str:
        return function(*args)

    return inner


class Loud(nn.Module):
    @decorated
    def forward(self, word: str, *, again: str = "!") -> str:
        return (lambda: shout(word))() + again

    def recursive(self, n: int) -> str:
        return shout("x") + (self.recursive(n - 1) if n else "")


def test_methods_are_rebound_through_decorators_and_inner_functions() -> None:
    module = Loud()
    with calls_through(module, {"shout": lambda function, word: function(word) + "?"}):
        assert module("a") == "A?!"
        assert module.recursive(1) == "X?X?"
        with calls_through(module, {"shout": lambda function, word: "(" + function(word) + ")"}):
            assert module("a") == "(A?)!"
        assert Loud()("a") == "A!"
    assert module("a") == "A!"
    assert not {"forward", "recursive"} & set(vars(module))


def test_a_function_that_reaches_itself_is_copied_once() -> None:
    def outer() -> Callable[[int], str]:
        def inner(n: int) -> str:
            return shout("x") + (inner(n - 1) if n else "")

        return inner

    copied = Rebinding({"shout": lambda function: lambda word: "y"}).of(outer())
    assert copied(0) == "y"


def test_a_block_of_suited_kernels_ends_with_an_error() -> None:
    model = ARCHITECTURES["qwen3_next"].build()

    def stop() -> None:
        assert any("forward" in vars(module) for module in model.modules())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), suited_kernels(model):
        stop()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", EMBEDDED)
def test_generate_of_an_embedded_model_says_the_same_with_our_cache(name: str) -> None:
    model = load_model(name)
    prompt = torch.randint(3, 8000, (2, 12), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, past_key_values=make_cache(model), use_cache=True, **options), expected)


GENERATES = [name for name in ARCHITECTURES if not name.startswith(("mamba2", "xlstm"))]  # whose generate takes a cache


@pytest.mark.parametrize("name", GENERATES)
def test_generate_says_the_same_with_our_cache(name: str) -> None:
    model = ARCHITECTURES[name].build()
    if loses_its_cache(model):
        pytest.skip("fla 0.6 does not know how transformers 5.24 names a cache")
    choose_kernels(model)
    prompt = torch.randint(3, 56, (2, 12), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, past_key_values=make_cache(model), use_cache=True, **options), expected)


def test_who_is_given_a_model_that_loses_its_cache_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("staterank_utils.fla_cpu.loses_its_cache", lambda model: True)
    model = ARCHITECTURES["qwen3_next"].build()
    choose_kernels(model)
    choose_kernels(model)
    told = [record.getMessage() for record in caplog.records if "loses its cache" in record.message]
    assert len(told) == 1
    assert told[0].startswith("Qwen3NextForCausalLM: fla loses its cache in `generate` with transformers 5.")
