"""Fixtures: tiny models of the supported class, and the embedded ones, each loaded once."""

import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
from architectures import ARCHITECTURES
from transformers import PreTrainedModel, Qwen3NextConfig, Qwen3NextForCausalLM

from staterank_utils.decoding import generate_greedily
from staterank_utils.dispatch import choose_kernels, limit_autotuning
from staterank_utils.evaluation import Task, exact
from staterank_utils.models import CHECKPOINTS, load_model, load_tokenizer
from staterank_utils.results import STORED, provenance, write_json
from staterank_utils.tasks import Turn, text_tokens

ROOT = Path(__file__).resolve().parents[1]


def make(target: str, **variables: object) -> list[str]:
    """The command that makes a target of the Makefile with the packages of this process."""
    given = [f"{name}={value}" for name, value in {"BIN": Path(sys.executable).parent, **variables}.items()]
    return ["make", f"--directory={ROOT}", "--assume-old=.venv/installed", target, *given]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store-conformance", action="store_true", help="write results/conformance_{cpu,gpu}.json")


def pytest_configure(config: pytest.Config) -> None:
    # What a shell starts in the background ignores Ctrl-C, and so would every program that a test stops with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit_autotuning():  # else every shape of every kernel is tuned, for minutes
        full_precision()


def full_precision() -> None:
    """Let kernels make up float32 with three products of TF32, whose three digits alone would hide what is compared."""
    os.environ["TRITON_F32_DEFAULT"] = "tf32x3"
    torch.backends.cudnn.allow_tf32 = False
    if find_spec("fla") is not None:
        # These name their precision themselves, for triangular systems, in fla 0.6.
        for name in ("fla.ops.gated_delta_rule.chunk_fwd", "fla.ops.kda.chunk_intra"):
            module: Any = importlib.import_module(name)
            if known := getattr(module, "SOLVE_TRIL_DOT_PRECISION", None):
                module.SOLVE_TRIL_DOT_PRECISION = type(known)("tf32x3")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests of one expensive fixture in one process of xdist, which otherwise makes it twice."""
    for item in items:
        shared = [
            name
            for name in ("stored", "made", "made_few", "by_task", "study")
            if name in getattr(item, "fixturenames", ())
        ]
        if shared:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}.{shared[0]}"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["conformance"] = conformance.MEASURED
    elif session.config.getoption("store_conformance") and exitstatus == 0:
        if missing := sorted(set(ARCHITECTURES) - set(conformance.MEASURED)):
            pytest.exit(f"the table needs every architecture, and these were not measured: {', '.join(missing)}", 1)
        made = {"provenance": provenance(parameters={}), "rows": conformance.table()}
        write_json(STORED / f"conformance_{'gpu' if torch.cuda.is_available() else 'cpu'}.json", made)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A process of xdist is done: what it measured, if it came to its end."""
    conformance.join(getattr(node, "workeroutput", {}).get("conformance", {}))


def tiny_qwen3_next(
    layer_types: list[str], *, n_k: int = 2, n_v: int = 4, d_k: int = 8, d_v: int = 8, vocab_size: int = 64
) -> Qwen3NextForCausalLM:
    """A random model of a few thousand weights with grouped value heads."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=len(layer_types), layer_types=layer_types,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, linear_num_key_heads=n_k, linear_num_value_heads=n_v,
        linear_key_head_dim=d_k, linear_value_head_dim=d_v, num_experts=0, mlp_only_layers=list(range(len(layer_types))),
        tie_word_embeddings=True, use_cache="full_attention" in layer_types,
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).eval()
    choose_kernels(model)
    return model


def save_tiny(folder: Path, layer_types: list[str]) -> Path:
    """A random model under the tokenizer of the embedded models."""
    return save_with_tokenizer(tiny_qwen3_next(layer_types, vocab_size=8192), folder)


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    """A model with 8,192 tokens, as a folder with the tokenizer of the embedded models."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINTS / "hybrid" / name, folder)
    return folder


def unchecked(function: Callable) -> Callable:
    """A function as users call it, without the shape checks that the test run wraps around it."""
    return getattr(function, "__wrapped__", function)


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


@pytest.fixture(scope="session", params=["hybrid", "pure", "d_k != d_v"])
def tiny_model(request: pytest.FixtureRequest) -> Qwen3NextForCausalLM:
    layers = ["linear_attention", "full_attention", "linear_attention"]
    if request.param == "pure":
        layers = ["linear_attention", "linear_attention"]
    return tiny_qwen3_next(layers, d_v=16 if request.param == "d_k != d_v" else 8)


@pytest.fixture(scope="session")
def hybrid():
    return load_model("hybrid")


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("hybrid")


def continued(model: PreTrainedModel, tokenizer: Any) -> dict[str, str]:
    """Passages of 48 tokens of a book -> the 4 tokens with which the model itself continues them."""
    answers = {}
    for passage in text_tokens("books", tokenizer)[:2400].unflatten(0, (-1, 48))[::10]:
        [tokens] = generate_greedily(model, [passage.tolist()], max_new_tokens=[4], stop=[])
        answers[tokenizer.decode(passage)] = tokenizer.decode(tokens)
    return answers


@pytest.fixture(scope="session")
def own_words(hybrid, tokenizer) -> Task:
    """A task that the embedded hybrid masters: to continue a passage as it does."""
    answers = list(continued(hybrid, tokenizer).items())
    assert all(
        len(tokenizer.encode(passage)) == 48 and len(tokenizer.encode(answer)) == 4 for passage, answer in answers
    )
    return Task("its own words", lambda rng, _: Turn(*rng.choice(answers)), exact, True)
