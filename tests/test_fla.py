"""Models of flash-linear-attention: how they are loaded and dispatched to kernels, and which settings are refused."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("fla")

from architectures.fla_models import KERNELS, MODELS, tiny
from transformers import AutoConfig, AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from staterank_utils.architectures import linear_layers
from staterank_utils.dispatch import choose_kernels
from staterank_utils.fla_cpu import FlaKernel
from staterank_utils.models import _config, load_model, model_outline
from staterank_utils.pruning import prune_heads
from staterank_utils.rebinding import functions_called
from staterank_utils.surgery import ablate_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.filterwarnings("ignore:According to Bo"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 64, (3, 96), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def test_mamba2_reads_a_prompt_as_fla_does(ids) -> None:
    """Of one group, where fla's own torch code is right."""
    model = tiny("Mamba2").to(DEVICE)
    choose_kernels(model)
    ours = model(ids).logits
    for layer in linear_layers(model):
        del layer.module.torch_forward
    assert (model(ids).logits - ours).abs().max() < (1e-4 if DEVICE == "cpu" else 5e-2)


def test_a_fresh_process_loads_a_pruned_model(ids, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = tiny("KDA").to(DEVICE)
    pruned = prune_heads(model, {0: [0, 1], 1: [3]})
    pruned.save_pretrained(tmp_path)
    torch.save((ids, pruned(ids).logits), tmp_path / "expected")
    script = (
        "import sys, torch, logging\n"
        "from staterank_utils import load_model\n"
        "from staterank_utils.dispatch import limit_autotuning\n"
        "torch.set_num_threads(1)\n"
        "limit_autotuning()\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "model = load_model(sys.argv[1], dtype=torch.float32)\n"
        "ids, logits = torch.load(sys.argv[1] + '/expected')\n"
        "apart = (model(ids).logits - logits).abs().max()\n"
        "assert apart <= (0 if ids.device.type == 'cpu' else 5e-2), apart  # of another precision than tests are in\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fla" in done.stderr


def test_a_type_that_both_libraries_have_is_loaded_from_the_one_that_wrote_it(tmp_path: Path) -> None:
    config = Mamba2Config(
        vocab_size=64, hidden_size=32, num_heads=8, head_dim=8, state_size=16, num_hidden_layers=2, n_groups=2, chunk_size=32
    )  # fmt: skip
    Mamba2ForCausalLM(config).save_pretrained(tmp_path / "transformers")
    tiny("Mamba2").save_pretrained(tmp_path / "fla")
    assert type(AutoConfig.from_pretrained(tmp_path / "transformers")).__module__.startswith("fla.")
    loaded = _config(str(tmp_path / "transformers"), {})
    assert type(loaded) is Mamba2Config
    assert type(AutoModelForCausalLM.from_config(loaded)) is Mamba2ForCausalLM
    assert type(load_model(str(tmp_path / "fla"), device="cpu")).__module__.startswith("fla.")


def test_triton_that_is_missing_is_asked_for_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("GLA").config.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModuleNotFoundError, match="'gla' is a model of flash-linear-attention, which imports triton"):
        model_outline(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "of nobody"}')
    with pytest.raises(ValueError, match="does not know the model type 'of nobody'"):
        model_outline(str(tmp_path))


def test_what_a_kernel_refuses_for_its_dtype_goes_to_the_naive_operator() -> None:
    def chunk_delta_rule(q: Tensor) -> str:
        return "kernel"

    call = FlaKernel(chunk_delta_rule, lambda q: "naive", plain=False)
    # Neither on a CPU nor on a GPU, so that only the dtype decides.
    assert call(torch.empty(1, device="meta")) == "naive"
    assert call(torch.empty(1, device="meta", dtype=torch.bfloat16)) == "kernel"


@pytest.mark.parametrize("name", sorted(name for name in MODELS if not name.startswith("Mamba2")))
def test_a_kernel_is_put_before_fla_s_once(name: str) -> None:
    model = tiny(name)
    layer = linear_layers(model)[0].module
    kernel = KERNELS[model.config.model_type]
    [stock] = functions_called(layer, [kernel])[kernel]
    for _ in range(2):
        choose_kernels(model)
        [found] = functions_called(layer, [kernel])[kernel]
        assert isinstance(found, FlaKernel)
        assert found.stock is stock


# ---------------------------------------------------------------- refusals


def test_the_log_says_how_slow_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny("GLA").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="staterank_utils"):
        load_model(str(tmp_path), device="cpu")
    assert "fla's naive operators (slow, exact)" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("GLA", {"attn_mode": "fused_chunk"}, "attn_mode='chunk'"),
        ("RetNet", {"attn_mode": "parallel"}, "keeps no state"),
        ("DeltaNet", {"use_beta": False}, "no write strength"),
        ("Mamba2", {"dt_limit": (0.01, 1.0)}, "lower bound"),
    ],
)
def test_settings_that_would_be_wrong_are_refused(name, settings, reason) -> None:
    config = tiny(name).config
    for key, value in settings.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    with pytest.raises(ValueError, match=reason):
        choose_kernels(AutoModelForCausalLM.from_config(config))


def test_hybrids_with_softmax_layers_are_refused() -> None:
    model = tiny("GLA")
    model.config.attn = {"layers": [1], "num_heads": 2}
    with pytest.raises(ValueError, match="gla with softmax layers .* cannot be traced"):
        linear_layers(model)


def test_writes_of_a_shared_value_head_stop_together(ids) -> None:
    model = tiny("GLA")
    choose_kernels(model)
    with pytest.raises(ValueError, match="share one key and value head"), ablate_heads(model, [(0, 0)], kind="frozen"):
        model(ids.cpu())


def test_uneven_groups_under_one_norm_are_refused() -> None:
    with pytest.raises(ValueError, match="whole groups, or as many heads of each"):
        prune_heads(tiny("Mamba2, two groups"), {0: [0]})
