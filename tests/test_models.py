import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import delta
from conftest import tiny_qwen3_next, unchecked
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from staterank_utils import models, pruning
from staterank_utils.decoding import generate_greedily
from staterank_utils.dispatch import choose_kernels
from staterank_utils.evaluation import answer_nats
from staterank_utils.models import (
    CHECKPOINTS,
    EMBEDDED,
    initial_model,
    load_model,
    load_tokenizer,
    parameters_hash,
)
from staterank_utils.pruning import prune_heads
from staterank_utils.surgery import ablate_heads
from staterank_utils.tracing import trace_states


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_load_with_transformers_alone(name: str) -> None:
    stock = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    ours = load_model(name)
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_are_small_safe_and_described(name: str) -> None:
    shards = [file.stat().st_size for file in (CHECKPOINTS / name).glob("*.safetensors")]
    assert max(shards) < 15_000_000
    assert sum(shards) <= 40_000_000
    assert not list((CHECKPOINTS / name).glob("*.bin"))
    card = (CHECKPOINTS / name / "README.md").read_text()
    assert all(word in card for word in ("Data", "seed", "million tokens", "bits per byte", "SHA-256", "Limits"))


@pytest.mark.parametrize("name", EMBEDDED)
def test_initial_weights_have_the_hash_of_the_card(name: str) -> None:
    initial = load_model(name, weights="initial")
    assert parameters_hash(initial) in (CHECKPOINTS / name / "README.md").read_text()


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_have_enough_linear_heads(name: str) -> None:
    config = load_model(name).config
    n_heads = config.layer_types.count("linear_attention") * config.linear_num_value_heads
    assert n_heads >= {"hybrid": 144, "pure": 192}[name]
    assert config.linear_num_value_heads == 2 * config.linear_num_key_heads


def test_weights_are_float32_on_a_cpu_and_the_log_says_what_was_chosen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="staterank_utils.models"):
        model = load_model("hybrid", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "torch.float32" in caplog.text
    assert "kernels: torch" in caplog.text
    assert not model.training


def test_shuffled_weights_keep_every_tensor_s_values(hybrid) -> None:
    shuffled = load_model("hybrid", weights="shuffled", seed=1)
    for (name, a), b in zip(hybrid.named_parameters(), shuffled.parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values), name
    assert not torch.equal(hybrid.model.embed_tokens.weight, shuffled.model.embed_tokens.weight)


def test_initial_weights_of_a_foreign_configuration_follow_the_seed() -> None:
    config = tiny_qwen3_next(["linear_attention", "full_attention"]).config
    one, same, other = (parameters_hash(initial_model(config, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_a_folder_is_loaded_like_a_name(tmp_path: Path) -> None:
    tiny = tiny_qwen3_next(["linear_attention", "full_attention"])
    tiny.save_pretrained(tmp_path)
    assert parameters_hash(load_model(str(tmp_path))) == parameters_hash(tiny)


def test_a_list_of_checksums_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("not a checksum\n")
    with pytest.raises(ValueError, match="a line that is no checksum: 'not a checksum'"):
        models.verify_weights(tmp_path)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown model ''"):
        load_model("")
    with pytest.raises(ValueError, match=r"unknown model 'hybird': expected one of .*hybrid"):
        load_model("hybird")


@pytest.mark.parametrize(
    ("card", "licence"),
    [("---\nlicense: mit\n---\n# A model", "mit"), ("# A model", None), ("---\na: [\n---\n", None), (None, None)],
)
def test_the_licence_is_read_from_a_card(card: str | None, licence: str | None, tmp_path: Path, caplog) -> None:
    if card:
        (tmp_path / "README.md").write_text(card)
    assert models.stored_license(str(tmp_path)) == licence
    assert ("cannot be read" in caplog.text) == (card is not None and "[" in card)


def test_a_hub_id_without_a_network_has_no_known_licence() -> None:
    assert models.stored_license("OWNER/NAME", revision="main") is None


def test_a_hub_id_needs_a_revision() -> None:
    with pytest.raises(ValueError, match="revision"):
        load_model("owner/name")


def test_a_folder_is_refused_for_what_it_lacks_first(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(str(tmp_path))
    tiny_qwen3_next(["linear_attention", "full_attention"]).config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        load_model(str(tmp_path))
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2 has no linear-attention layer"):
        load_model(str(tmp_path))


def test_unknown_kinds_of_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="'trained', 'initial' or 'shuffled'"):
        unchecked(load_model)("hybrid", weights="random")


def test_without_the_repository_an_embedded_name_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "CHECKPOINTS", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="clone the repository"):
        load_model("hybrid")
    with pytest.raises(FileNotFoundError, match="clone the repository"):
        load_tokenizer("hybrid")


def test_a_truncated_weight_file_fails_its_checksum(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(CHECKPOINTS / "hybrid", folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"does not match its checksum.*git checkout"):
        load_model(str(folder))


@pytest.mark.parametrize("size", [0, 4, 100, -1000], ids=["empty", "no length", "no header", "no end"])
def test_a_truncated_weight_file_without_a_checksum_is_named(tmp_path: Path, size: int) -> None:
    tiny_qwen3_next(["linear_attention", "full_attention"]).save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].write_bytes(shards[1].read_bytes()[:size])
    with pytest.raises(
        ValueError, match=f"{shards[1].name} is not a whole safetensors file.*copy or download it again"
    ):
        load_model(str(tmp_path))


def test_a_tokenizer_needs_no_weights(tmp_path: Path, tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert load_tokenizer(str(tmp_path)).encode("state rank") == tokenizer.encode("state rank")


PROBE = """
import torch
{prelude}
from staterank_utils import load_model, trace_states, effective_rank
print(trace_states(load_model("hybrid"), torch.arange(130)[None], positions=[64, 65, 130], reduce=effective_rank).values.sum().item())
"""


def test_results_on_a_cpu_are_the_same_with_and_without_fla(hybrid) -> None:
    pytest.importorskip("fla", reason="fla is not installed on this platform: then there is only one case")
    sums = []
    for prelude in ("import fla", "import sys; sys.modules['fla'] = None"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROBE.format(prelude=prelude)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        sums.append(done.stdout.split()[-1])
    assert sums[0] == sums[1]


@pytest.mark.gpu
def test_fla_kernels_give_the_states_of_the_plain_ones() -> None:
    ids = torch.arange(300)[None]
    fast = trace_states(load_model("hybrid", device="cuda", dtype=torch.float32), ids, positions=[64, 65, 300])
    slow = trace_states(load_model("hybrid", device="cpu"), ids, positions=[64, 65, 300])
    # tf32 products inside the kernels
    assert (fast.values - slow.values).abs().max() < 5e-3 * slow.values.abs().max()


@pytest.mark.parametrize("weights", ["trained", "initial", "shuffled"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_model_spread_over_devices_gives_the_same_states(
    device: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ids = torch.arange(100)[None]
    spread, whole = (
        load_model("hybrid", weights=weights, device=where, dtype=torch.float32) for where in ("auto", device)
    )
    if device == "cuda":
        assert len({parameter.device for parameter in spread.parameters()}) > 1
    traces = [trace_states(model, ids, positions=[3, 100], logits=True) for model in (spread, whole)]
    torch.testing.assert_close(traces[0].values, traces[1].values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(traces[0].logits, traces[1].logits, rtol=1e-4, atol=1e-4)
    prompt, tokenizer = ids[0, :40].tolist(), load_tokenizer("hybrid")
    with ablate_heads(spread, [(0, 1), (6, 2)]), ablate_heads(whole, [(0, 1), (6, 2)]):
        made = [generate_greedily(model, [prompt], max_new_tokens=[8]) for model in (spread, whole)]
        losses = [answer_nats("recall", model, tokenizer, n_instances=2) for model in (spread, whole)]
    assert made[0] == made[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_model_is_spread_by_accelerate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install accelerate"):
        load_model("hybrid", device="auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 64}, "9 of another shape, such as model.layers.0.mlp.down_proj.weight"),
        ({"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}, "of layers that the configuration does not have, such as model.layers.2."),
        ({"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 4, "mlp_only_layers": [0, 1, 2, 3]}, "missing, such as model.layers.1.linear_attn"),
    ],
    ids=["shape", "fewer layers", "more layers"],
)  # fmt: skip
def test_weights_of_another_configuration_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=f"not those of its configuration: .*{re.escape(message)}"):
        load_model(str(tmp_path), device="cpu")


# What transformers makes of the errors of the hub's client.
FETCHING = {
    "no network": "We couldn't connect to the hub to load the files\nand more",
    "no access": "You are trying to access a gated repo.\nMake sure to have access to it",
    "no such revision": "v1 is not a valid git identifier (branch name, tag name or commit id) that exists for this model name",
}


@pytest.mark.parametrize("said", FETCHING.values(), ids=FETCHING)
@pytest.mark.parametrize("load", [load_model, load_tokenizer], ids=["model", "tokenizer"])
def test_a_hub_id_that_cannot_be_fetched_says_what_to_do(monkeypatch: pytest.MonkeyPatch, load, said: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(said)

    monkeypatch.setattr(models, "_config", fails)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(
        OSError, match=r"could not be fetched \(.*hf download o/n --revision v1.*hf auth login"
    ) as raised:
        load("o/n", revision="v1")
    assert said.split("\n")[0] in str(raised.value)


def test_a_model_published_with_its_vision_is_loaded_as_the_text_model_in_it(tmp_path: Path) -> None:
    """As Qwen3.5-0.8B is."""
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 1, "temporal_patch_size": 1, "num_position_embeddings": 16,
    }  # fmt: skip
    config = Qwen3_5Config(text_config=delta.COMMON | delta.GROUPED, vision_config=vision)
    whole = Qwen3_5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    choose_kernels(whole)  # else transformers calls fla's here, where a test before this one has imported it
    loaded = load_model(str(tmp_path), device="cpu")
    ids = torch.randint(3, 56, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, whole(ids).logits, rtol=0, atol=1e-4)
    assert trace_states(loaded, ids, positions=[1, 40]).layers == (0, 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)), "llama has no linear-attention layer"),
        (lambda: FalconMambaForCausalLM(FalconMambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=8)), "falcon_mamba cannot be traced: a continuation"),
    ],
    ids=["no matrix state", "wrong in segments"],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch, model, reason
) -> None:
    model().save_pretrained(tmp_path)
    monkeypatch.setattr(models, "_with_weights", lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(ValueError, match=reason):
        load_model(str(tmp_path), device="cpu")


def test_a_device_without_room_for_the_weights_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"no room for the weights of hybrid, 68\.8 MB.*device='auto'"):
        load_model("hybrid", device="cpu")


# What torch raises when memory runs out on a GPU and on a CPU.
FULL = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
)


@pytest.mark.parametrize("error", FULL, ids=["GPU", "CPU"])
def test_a_trace_without_memory_says_what_to_lower(hybrid, error: RuntimeError) -> None:
    def full(states: torch.Tensor) -> torch.Tensor:
        raise error

    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(
        torch.OutOfMemoryError, match="4 tokens of 2 prompts and 1 positions.*: lower batch_size, or take shorter"
    ):
        trace_states(hybrid, ids, positions=[4], reduce=full, batch_size=2)


@pytest.mark.parametrize("error", FULL, ids=["GPU", "CPU"])
def test_pruning_without_memory_says_what_to_do(hybrid, error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise error

    monkeypatch.setattr(pruning.copy, "deepcopy", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"second copy of the weights, 68\.8 MB.*bfloat16"):
        prune_heads(hybrid, {0: [1]})


def test_a_model_that_the_gpus_have_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate leaves what it brings in layer by layer on the device "meta"."""
    offloaded = tiny_qwen3_next(["linear_attention", "full_attention"])
    offloaded.model.layers[1].to("meta")
    monkeypatch.setattr(models, "_with_weights", lambda *_, **__: offloaded)
    with pytest.raises(
        torch.OutOfMemoryError, match="device='auto' found no room for .* of the .* of weights of hybrid"
    ):
        load_model("hybrid", device="auto")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: load_model("hybrid", device="gpu"), "unknown device 'gpu': expected 'cpu', 'cuda'"),
        (lambda: load_model("hybrid", device="meta"), "device 'meta' holds no weights"),
        (lambda: load_model("hybrid", device="cuda:99"), "device 'cuda:99' is not there, torch sees"),
        (lambda: load_model("hybrid", revision="v1"), "hybrid is here and has no revisions, got revision='v1'"),
        (lambda: load_tokenizer(str(CHECKPOINTS / "pure"), revision="v1"), "has no revisions, got revision='v1'"),
    ],
    ids=["device", "no device", "absent device", "revision of a name", "revision of a folder"],
)
def test_what_cannot_be_meant_is_refused(load, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_qwen3_next(["linear_attention"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer: save one"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("n_further", [1, 0])
def test_layers_for_tokens_further_on_are_left_out(tmp_path: Path, n_further: int) -> None:
    tiny_qwen3_next(["linear_attention", "full_attention"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": n_further}))
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.2.eh_proj.weight": torch.zeros(4, 4)}, file, metadata={"format": "pt"})
    if n_further:
        assert len(load_model(str(tmp_path), device="cpu").model.layers) == 2
    else:
        with pytest.raises(ValueError, match=r"configuration does not have, such as model\.layers\.2\."):
            load_model(str(tmp_path), device="cpu")
