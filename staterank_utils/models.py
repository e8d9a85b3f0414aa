"""Load a model: an embedded one by name, a folder, or a hub id; with the kernels that its device can run."""

import functools
import hashlib
import importlib.util
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import ModelCard
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file
from yaml import YAMLError

from staterank_utils import fla_cpu
from staterank_utils.architectures import cache_name, linear_layers, model_adapter
from staterank_utils.budget import in_words, out_of_memory, weight_bytes
from staterank_utils.dispatch import choose_kernels, suited_kernels
from staterank_utils.pruned import MODEL_TYPE, RECORD, auto_class, config_class_of

EMBEDDED = ("hybrid", "pure")
CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of weights, by the name that a notebook takes

FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
PARTS_OF_FURTHER = ("eh_proj", "enorm", "hnorm")  # which no other layer has
MORE_ROOM = (
    "load them with dtype=torch.bfloat16, spread them over more GPUs with device='auto', or take a smaller model"
)

log = logging.getLogger(__name__)


def load_model(
    name_or_path: str,
    *,
    weights: Literal["trained", "initial", "shuffled"] = "trained",
    seed: int = 0,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a linear-attention language model for measuring.

    Source: the architectures' own classes in transformers; the embedded models are described in their cards.

    Args:
        name_or_path: an embedded name (`EMBEDDED`, no network), a folder in Hugging Face format, or a hub id.
        weights: "trained"; "initial", as before training; or "shuffled", the trained values of each tensor in random
            order. The last two are controls.
        seed: of the initial weights where the model's configuration names none, and of the shuffle.
        device: "cpu", "cuda", ...; by default the GPU if there is one; "auto" spreads the layers over all GPUs, by accelerate.
        dtype: of the weights; by default float32 on a CPU and the checkpoint's own dtype on a GPU.
        revision: commit or tag on the hub; required for a hub id, so that a result names what it measured.
        trust_remote_code: run Python code that comes with the weights. Off unless asked for.

    Returns:
        The model in evaluation mode, on its device. One log line (level INFO) says what was chosen.

    Raises:
        FileNotFoundError: an embedded name without the repository's checkpoints, or a folder without weights.
        ValueError: an unknown name or device, a hub id without a revision or another model with one, a model that `linear_layers` refuses,
            weights that fail `verify_weights`, or that are not those of the configuration.
        ModuleNotFoundError: "auto" without accelerate.
        OSError: a hub id that could not be fetched: no network, no access, or no such revision.
        torch.OutOfMemoryError: a device, or all of them, without room for the weights, with what to do.

    Example:
        >>> model = load_model("hybrid")
        >>> model.config.num_hidden_layers
        12
    """
    source, options = _source(name_or_path, revision, trust_remote_code)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if device == "auto" and importlib.util.find_spec("accelerate") is None:
        raise ModuleNotFoundError("device='auto' needs accelerate: pip install accelerate")
    chosen = dtype or (torch.float32 if runs_on_cpu(device) else "auto")
    # What cannot be measured is refused before its weights are read.
    config = model_outline(name_or_path, revision=revision, trust_remote_code=trust_remote_code).config
    if Path(source).is_dir():
        verify_weights(Path(source))
    if weights == "initial":
        model = initial_model(config, seed=seed)
        model = model.to(dtype=None if chosen == "auto" else chosen)
    elif weights in ("trained", "shuffled"):
        # Controls are made on a CPU, trained weights go to their devices as they are read.
        spread = {"device_map": "auto"} if (device, weights) == ("auto", "trained") else {}
        with out_of_memory(f"no room for the weights of {name_or_path}", advice=MORE_ROOM):
            model = _fetched(_with_weights, source, options, config=config, dtype=chosen, **spread)
    else:
        raise ValueError(f"weights must be 'trained', 'initial' or 'shuffled', got {weights!r}")
    if device != "auto":
        with out_of_memory(
            f"{device} has no room for the weights of {name_or_path}, {in_words(weight_bytes(model))}", advice=MORE_ROOM
        ):
            model = model.to(device)
    if weights == "shuffled":
        shuffle_weights(model, seed=seed)
    if device == "auto":
        model = model if weights == "trained" else _spread(model)
        _refuse_offloaded(model, name_or_path)
    model.requires_grad_(False).eval()
    chosen_kernels = choose_kernels(model)
    log.info(
        "%s (%s weights): %s on %s, %s, kernels: %s",
        name_or_path,
        weights,
        type(model).__name__,
        device,
        next(model.parameters()).dtype,
        chosen_kernels,
    )
    return model


def model_outline(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model as its configuration describes it, without weights: what it would take, and whether it can be measured.

    Args:
        name_or_path, revision, trust_remote_code: as in `load_model`.

    Returns:
        A model on the device "meta".

    Raises:
        FileNotFoundError, ValueError, OSError: as in `load_model`.

    Example:
        >>> outline = model_outline("hybrid")
        >>> outline.device.type, len(linear_layers(outline))
        ('meta', 9)
    """
    source, options = _source(name_or_path, revision, trust_remote_code)
    folder = Path(source) if Path(source).is_dir() else None
    if folder and not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: expected a folder written by save_pretrained")
    config = _fetched(_config, source, options)
    with torch.device("meta"):
        outline: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    linear_layers(outline)
    if folder and not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} has no .safetensors file: expected a folder written by save_pretrained")
    return outline


def load_tokenizer(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that belongs to a model.

    Args:
        name_or_path, revision, trust_remote_code: as in `load_model`; a folder needs no weights.

    Raises:
        FileNotFoundError: an embedded name without the repository's checkpoints.
        ValueError: as in `load_model`, or a folder without a tokenizer.
        OSError: a hub id that could not be fetched.

    Example:
        >>> load_tokenizer("hybrid").decode(load_tokenizer("hybrid").encode("state rank"))
        'state rank'
    """
    source, options = _source(name_or_path, revision, trust_remote_code)
    tokenizer = _fetched(lambda source, options: AutoTokenizer.from_pretrained(source, **options), source, options)
    if not tokenizer.encode("a", add_special_tokens=False):
        # Where its files are missing, transformers makes an empty one.
        raise ValueError(f"{name_or_path} has no tokenizer: save one with its save_pretrained, or copy tokenizer.json")
    return tokenizer


def stored_license(name_or_path: str, *, revision: str | None = None) -> str | None:
    """The licence that the front matter of a model's card names.

    Args:
        name_or_path, revision: as in `load_model`.

    Returns:
        As it stands there, such as "apache-2.0"; None where there is no card, or none that names one. A card that cannot be read is warned of.

    Example:
        >>> stored_license("hybrid")
        'apache-2.0'
    """
    source, options = _source(name_or_path, revision, False)
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    card = cached_file(source, "README.md", revision=options.get("revision"), **optional)
    try:
        return ModelCard.load(card).data.license if card else None
    except (ValueError, YAMLError) as error:
        log.warning("the front matter of %s cannot be read, so no licence is taken from it: %s", card, error)
        return None


def runs_on_cpu(device: str | None) -> bool:
    """Whether a model runs on a CPU if it is loaded onto a device.

    Args:
        device: as `load_model` takes it; None is what that chooses.

    Example:
        >>> runs_on_cpu("cpu"), runs_on_cpu("cuda:0"), runs_on_cpu(None) == (not torch.cuda.is_available())
        (True, False, True)
    """
    return not torch.cuda.is_available() if device in (None, "auto") else torch.device(device).type == "cpu"


def check_device(device: str) -> None:
    """Refuse a device that torch does not know, or that this machine does not have.

    Args:
        device: as `load_model` takes it.

    Raises:
        ValueError: with what was expected.

    Example:
        >>> check_device("tpu")
        Traceback (most recent call last):
            ...
        ValueError: unknown device 'tpu': expected 'cpu', 'cuda', 'cuda:0', ... or 'auto'
    """
    if device == "auto":
        return
    expected = "expected 'cpu', 'cuda', 'cuda:0', ... or 'auto'"
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: {expected}") from error
    if known.type == "meta":
        raise ValueError(f"device {device!r} holds no weights: {expected}")
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} is not there, torch sees {torch.cuda.device_count()} CUDA devices: {expected}"
        )


def _source(name_or_path: str, revision: str | None, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    folder = Path(name_or_path)
    if revision is not None and (name_or_path in EMBEDDED or folder.is_dir()):
        raise ValueError(f"{name_or_path} is here and has no revisions, got revision={revision!r}: leave it out")
    if name_or_path in EMBEDDED:
        folder = CHECKPOINTS / name_or_path
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the embedded model {name_or_path!r} is part of the repository, not of the installed package: clone the repository "
                f"and install it with `pip install -e .`, or pass the path of its folder checkpoints/{name_or_path} (looked in {CHECKPOINTS})"
            )
        return str(folder), {"local_files_only": True}
    if name_or_path and folder.is_dir():
        return str(folder), {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/")):
        raise ValueError(
            f"unknown model {name_or_path!r}: expected one of {', '.join(EMBEDDED)}, an existing folder, or a hub id OWNER/NAME"
        )
    if revision is None:
        raise ValueError(
            f"there is no folder {name_or_path!r}; if it is a hub id, pass revision=..., a commit or tag, so that the result names what it measured"
        )
    return name_or_path, {"revision": revision, "trust_remote_code": trust_remote_code}


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """A model in memory, its layers moved to all GPUs as far as there is room."""
    import accelerate

    whole = model._no_split_modules
    memory = accelerate.utils.get_balanced_memory(model, no_split_module_classes=whole)
    places = accelerate.infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    spread: PreTrainedModel = accelerate.dispatch_model(model, places)
    return spread


def _refuse_offloaded(model: PreTrainedModel, name: str) -> None:
    """accelerate would bring such weights in and out module by module, past what reads a layer's weights directly."""
    if left := sum(parameter.nbytes for parameter in model.parameters() if parameter.is_meta):
        raise torch.OutOfMemoryError(
            f"device='auto' found no room for {in_words(left)} of the {in_words(weight_bytes(model))} of weights of {name}: "
            "load them with dtype=torch.bfloat16, on more GPUs, or take a smaller model"
        )


def _fetched(load: Callable[..., Any], source: str, options: dict[str, Any], **more: Any) -> Any:
    """What `load` makes of a source; where a hub id fails, say what to do."""
    try:
        return load(source, options, **more)
    except OSError as error:
        if "revision" not in options:
            raise
        raise OSError(
            f"{source} at revision {options['revision']!r} could not be fetched ({str(error).strip().splitlines()[0]}). Without a network, "
            f"download it elsewhere (hf download {source} --revision {options['revision']} --local-dir FOLDER) and pass FOLDER; a gated "
            "model needs `hf auth login` with an account that was let in; revisions are listed on the model's page"
        ) from error


def _with_weights(source: str, options: dict[str, Any], *, config: PreTrainedConfig, **more: Any) -> PreTrainedModel:
    """A model whose weights are all there, and of the configuration's shapes."""
    model, found = auto_class(config).from_pretrained(
        source, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **more, **options
    )  # fmt: skip
    text = config.get_text_config()
    # Layers behind the last one, for guesses of tokens further on, which transformers leaves out.
    n_further = max(getattr(text, name, None) or 0 for name in FURTHER_LAYERS)
    further = tuple(
        layer
        for layer in (f".layers.{text.num_hidden_layers + i}." for i in range(n_further))
        if any(layer in key and key.split(layer)[1].startswith(PARTS_OF_FURTHER) for key in found["unexpected_keys"])
    )
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "of another shape": sorted(str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"]),
        "of layers that the configuration does not have": sorted(
            key for key in found["unexpected_keys"] if ".layers." in key and not any(part in key for part in further)
        ),
    }
    if any(wrong.values()):
        said = "; ".join(f"{len(keys)} {what}, such as {keys[0]}" for what, keys in wrong.items() if keys)
        raise ValueError(
            f"the weights in {source} are not those of its configuration: {said}. Compare config.json with the files"
        )
    loaded: PreTrainedModel = model
    return loaded


def _config(source: str, options: dict[str, Any]) -> PreTrainedConfig:
    """A model's configuration, of the library that wrote it."""
    settings, _ = PreTrainedConfig.get_config_dict(source, **options)
    model_type = settings.get("model_type")
    if model_type != MODEL_TYPE and (RECORD in settings or RECORD in (settings.get("text_config") or {})):
        raise ValueError(
            f"{source} was pruned by an earlier version of staterank_utils, which kept the model type {model_type!r}: load it with the "
            "version that pruned it, or prune the whole model again"
        )
    if "auto_map" in settings and not fla_cpu.wrote(settings):
        return AutoConfig.from_pretrained(source, **options)
    return config_class_of(settings).from_pretrained(source, **options)


def verify_weights(folder: Path) -> None:
    """Compare the files of a model folder with its list of checksums `SHA256SUMS`.

    Without a list, see that its safetensors files are whole: such a file says at its start how long it must be, so one that
    was cut off is found without reading it.

    Args:
        folder: in Hugging Face format.

    Raises:
        ValueError: a file is missing or differs, or the list cannot be read; or, without a list, a safetensors file is cut off or is none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
        ...     _ = Path(folder, "model.safetensors").write_bytes(b"cut off")
        ...     verify_weights(Path(folder))
        Traceback (most recent call last):
            ...
        ValueError: ...model.safetensors is not a whole safetensors file (7 bytes...
    """
    sums = folder / "SHA256SUMS"
    if not sums.exists():
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                size = file.stat().st_size
                raise ValueError(
                    f"{file} is not a whole safetensors file ({size:,} bytes; {error}): copy or download it again"
                ) from error
        return
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if len(expected) != 64 or not name:
            raise ValueError(
                f"{sums} has a line that is no checksum: {line!r}; expected 64 digits, two spaces and a name"
            )
        file = folder / name
        actual = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "no such file"
        if actual != expected:
            raise ValueError(
                f"{file} does not match its checksum (SHA-256 {actual}, expected {expected}): restore it with `git checkout -- {file}`"
            )


# ---------------------------------------------------------------- weights as controls


@dataclass(frozen=True)
class Gates:
    """How the decay of heads begins: log a = -A softplus(dt), before any input.

    Attributes:
        rate: bounds between which A is drawn, uniform.
        step: bounds between which softplus(dt) is drawn, uniform in its logarithm.

    Example:
        >>> gates = GATES["normal weights, narrow gates"]
        >>> round(math.log(2) / (gates.rate[0] * gates.step[0]), 3)  # half-life of every head, tokens
        2.4
    """

    rate: tuple[float, float]
    step: tuple[float, float]


GATES = {
    "normal weights, Mamba-2 gates": Gates((1.0, 16.0), (1e-3, 1e-1)),
    "normal weights, narrow gates": Gates((4.0, 4.0), (math.log(2) / 2.4 / 4,) * 2),
    # of Qwen3-Next itself: dt = 1 for every head
    "normal weights, gates of the class": Gates((0.01, 16.0), (math.log1p(math.e),) * 2),
    "normal weights, open gates": Gates((0.0, 0.0), (1e-3, 1e-1)),  # log a = 0, also under training
}


def initial_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A model with the weights it had before training.

    A configuration of this project names its own seed and scheme (`initialization`), and gets the same bits on every machine:
    normal weights of standard deviation `initializer_range` from NumPy's PCG64, gates as `GATES` says, everything rounded to
    bfloat16. Any other configuration gets its class's own initialization with torch's generator at `seed`.

    Args:
        config: of the model.
        seed: where the configuration names no scheme of its own.

    Returns:
        The model in float32 on the CPU.

    Raises:
        ValueError: a scheme that is not one of `GATES`.

    Example:
        >>> config = AutoConfig.from_pretrained(CHECKPOINTS / "hybrid")
        >>> a, b = (initial_model(config).model.layers[0].linear_attn.A_log for _ in range(2))
        >>> bool((a == b).all())
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32)
    scheme = getattr(config, "initialization", None)
    if scheme is None:
        return model
    if scheme["scheme"] not in GATES:
        raise ValueError(f"unknown initialization {scheme['scheme']!r}: expected one of {', '.join(map(repr, GATES))}")
    gates = GATES[scheme["scheme"]]
    rng = np.random.Generator(np.random.PCG64(scheme["seed"]))
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        if name.endswith("A_log"):
            with np.errstate(divide="ignore"):  # of no decay the logarithm is -inf
                value = np.log(rng.uniform(*gates.rate, shape))
        elif name.endswith("dt_bias"):
            step = np.exp(rng.uniform(math.log(gates.step[0]), math.log(gates.step[1]), shape))
            value = step + np.log(-np.expm1(-step))  # inverse of softplus
        elif parameter.ndim >= 2:
            scale = 1 / np.sqrt(shape[-1]) if "conv1d" in name else config.initializer_range
            value = scale * rng.standard_normal(shape)
        else:
            # Norm weights keep the constant that their class gives them.
            continue
        parameter.data.copy_(torch.from_numpy(value).to(torch.bfloat16))
    return model


def shuffle_weights(model: nn.Module, *, seed: int = 0) -> None:
    """Put the values of each tensor in random order, in place: same distribution of weights, nothing learned.

    Args:
        model: any module; all its parameters are shuffled, on whatever device they are.
        seed: of the orders.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> shuffle_weights(layer, seed=0)
        >>> layer.weight.tolist() != [[1.0, 2.0, 3.0, 4.0]], sorted(layer.weight[0].tolist())
        (True, [1.0, 2.0, 3.0, 4.0])
    """
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.data.copy_(parameter.data.flatten()[order].view_as(parameter))


def parameters_hash(model: nn.Module) -> str:
    """SHA-256 over all parameters in bfloat16, in order of their names: what two machines compare.

    Args:
        model: any module, on any device.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = parameters_hash(layer)
        >>> layer.bias.data += 1
        >>> len(before), parameters_hash(layer) == before
        (64, False)
    """
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(name.encode())
        total.update(
            parameter.detach().to(device="cpu", dtype=torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        )
    return total.hexdigest()


# ---------------------------------------------------------------- cache


def make_cache(model: PreTrainedModel, *, max_tokens: int | None = None) -> Any:
    """An empty cache that suits the model, for `forward` and `generate`.

    Args:
        model: from `load_model`.
        max_tokens: room for the keys and values of so many tokens, in one place from the start, as a loop wants it that is
            recorded once and replayed; by default they grow.

    Returns:
        The stock cache of transformers for a model that has softmax attention too, else a `LinearOnlyCache`, whose states need
        the same room at any length; or the architecture's own (xLSTM's is for `read_tokens` alone). To `generate` of a
        model without softmax attention, whose configuration may say that it uses no cache, give use_cache=True beside it.

    Example:
        >>> model = load_model("hybrid")
        >>> cache = make_cache(model)
        >>> _ = model(torch.arange(9).reshape(1, 9).to(model.device), past_key_values=cache)
        >>> cache.get_seq_length(), type(cache).__name__
        (9, 'DynamicCache')
    """
    return model_adapter(unwrapped(model)).make_cache(max_tokens)


def read_tokens(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch token"],
    *,
    positions: Int[Tensor, "rows token"] | None = None,
    cache: Any = None,
    mask: Int[Tensor, "batch all_tokens"] | None = None,
) -> Float[Tensor, "batch token d_model"]:
    """Hidden states of tokens before the output embedding, whatever the model calls its arguments.

    Args:
        model: from `load_model`.
        input_ids: the tokens that are new.
        positions: of these, one row for each prompt or one for all; always passed on where the model takes them, since some count from 0 in every segment.
        cache: from `make_cache`, to go on from and to be updated; without one the tokens are all there is.
        mask: 0 for padding, over all tokens read so far.

    Example:
        >>> model, ids = load_model("hybrid"), torch.arange(9).reshape(1, 9)
        >>> read_tokens(model, ids.to(model.device)).shape
        torch.Size([1, 9, 256])
    """
    model = unwrapped(model)
    if torch.is_autocast_enabled(input_ids.device.type):
        raise ValueError(
            "a model is read in the dtype of its weights, and torch.autocast would compute in another: leave its block"
        )
    base = unwrapped(model.base_model)
    known = _argument_names(type(base).forward)
    if positions is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    positions = positions.expand(len(input_ids), -1)
    options: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "use_cache": cache is not None}
    options = {name: value for name, value in options.items() if name in known and value is not None}
    fitted, name = model_adapter(model).fitted(cache, input_ids), cache_name(known)
    if name and fitted is not None:
        options[name] = fitted
    with suited_kernels(model), evaluating(model):
        made = base(input_ids=input_ids, **options)
    hidden: Tensor = made[0] if isinstance(made, tuple) else made.last_hidden_state
    return hidden.to(input_ids.device)  # layers may be spread over several


def check_ids(model: PreTrainedModel, input_ids: object) -> None:
    """Refuse what are no prompts for a model.

    Args:
        model: that is to read them.
        input_ids: expected to be int64 or int32, (batch, token).

    Raises:
        TypeError: not a tensor, or not of an integer dtype that a model reads.
        ValueError: another shape, no tokens, or an id outside the vocabulary.

    Example:
        >>> check_ids(load_model("hybrid"), [1, 2])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        TypeError: expected token ids as a tensor of shape (batch, token), got list: ...
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"expected token ids as a tensor of shape (batch, token), got {type(input_ids).__name__}: make one with "
            "torch.tensor, or take a tokenizer's 'input_ids' with return_tensors='pt'"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"expected token ids of dtype int64 or int32, got {input_ids.dtype}: convert them with .long()")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"expected prompts of shape (batch, token) with at least one token, got shape {tuple(input_ids.shape)}"
        )
    low, high, size = int(input_ids.min()), int(input_ids.max()), model.config.get_text_config().vocab_size
    if low < 0 or high >= size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary 0..{size - 1}: was the prompt made with another tokenizer?"
        )


def check_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer that makes ids which a model does not know.

    Args:
        model, tokenizer: that are used together.

    Raises:
        ValueError: it has more tokens than the model.

    Example:
        >>> check_tokenizer(load_model("hybrid"), range(10_000))  # as long as a tokenizer of 10,000 tokens
        Traceback (most recent call last):
            ...
        ValueError: the tokenizer has 10,000 tokens and the model knows 8,192: load the tokenizer that belongs to the model
    """
    size = model.config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model knows {size:,}: load the tokenizer that belongs to the model"
        )


def unwrapped(model: Any) -> Any:
    """The model that torch.compile or PEFT wrapped something around; adapters that PEFT put into its layers stay.

    Args:
        model: any.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> unwrapped(torch.compile(model)) is model
        True
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which a model is in evaluation mode: no dropout, and a cache also where gradients are checkpointed.

    Args:
        model: any; each of its modules is in the mode that it was in afterwards.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(model):
        ...     model.training, model[0].training
        (False, False)
        >>> model.training, model[0].training, model[1].training
        (True, True, False)
    """
    trained = [module for module in model.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def takes_mask(model: PreTrainedModel) -> bool:
    """Whether a model's forward can be told which tokens are padding.

    Example:
        >>> takes_mask(load_model("hybrid"))
        True
    """
    return "attention_mask" in _argument_names(type(unwrapped(unwrapped(model).base_model)).forward)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT put adapters into a model's layers.

    Example:
        >>> has_adapters(load_model("hybrid"))
        False
    """
    return any(hasattr(module, "base_layer") for module in model.modules())


def output_logits(model: PreTrainedModel, hidden: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead vocabulary"]:
    """Logits of hidden states from `read_tokens`.

    Example:
        >>> model, ids = load_model("hybrid"), torch.arange(9).reshape(1, 9)
        >>> with torch.no_grad():
        ...     logits = output_logits(model, read_tokens(model, ids.to(model.device)))
        >>> logits.shape[-1] == model.config.vocab_size
        True
    """
    model = unwrapped(model)
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no output embedding, so it gives no logits: load it as a language model"
        )
    return model_adapter(model).logits(hidden).to(hidden.device)


@functools.cache
def _argument_names(forward: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(forward).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    named = frozenset(parameters)
    return (
        named | {"attention_mask", "position_ids", "use_cache", "past_key_values"}
        if takes_any and "input_ids" not in named
        else named
    )
