"""Shrink states from the other side: keep every head, and fewer channels of its queries and keys.

A state is d_k x d_v. Where keys leave some directions of d_k empty, channels can go at little loss; which, a rank-revealing
QR decomposition of the keys says. The method is that of Nazari and Rusch (arXiv:2602.04852), made anew from its description:
structured pruning of query and key channels by such a decomposition. Whether theirs reads keys before or after
normalization, alone or with queries, is not known to us; here it is keys alone, as the recurrence reads them.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import scipy.linalg
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.architectures import LinearLayer, linear_layers
from staterank_utils.dispatch import choose_kernels
from staterank_utils.models import read_tokens
from staterank_utils.surgery import check_no_intervention

Channels = dict[int, dict[int, list[int]]]  # decoder layer -> key head -> channels


def order_channels(model: PreTrainedModel, prompts: Int[Tensor, "prompt token"]) -> Channels:
    """The channels of every key head, those first that span its keys best.

    Keys of all tokens, each of length 1, are decomposed as K P = Q R with column pivoting: the next channel is the one
    with most length left once those before it are projected out.

    Source: arXiv:2602.04852 (see the module).

    Args:
        model: from `load_model`, pruned or not.
        prompts: calibration prompts; together at least as many tokens as a key has channels.

    Returns:
        Decoder layer -> key head, by its index in the whole model -> all d_k channels, in that order.

    Raises:
        ValueError: there are fewer tokens than channels, or the architecture knows one number for both sides of a state.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> order = order_channels(load_model("hybrid"), torch.arange(128).reshape(1, 128))
        >>> len(order), list(order[0]), sorted(order[0][3]) == list(range(64))
        (9, [0, 1, 2, 3, 4, 5, 6, 7], True)
    """
    check_no_intervention(model, "cut channels")
    layers = _with_channels(model)
    d_k = layers[0].d_k
    if prompts.numel() < d_k:
        raise ValueError(f"{prompts.numel()} tokens cannot order {d_k} channels: give more or longer prompts")
    seen: dict[int, list[Tensor]] = {}

    def read(index: int, kernel: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        seen.setdefault(index, []).append(F.normalize(key.detach().double(), dim=-1).flatten(0, 1).cpu())
        return kernel(query, key, *rest, **options)

    with ExitStack() as stack, torch.inference_mode():
        for layer in layers:
            stack.enter_context(layer.scans_through(partial(read, layer.index)))
        for prompt in prompts.to(model.device):
            read_tokens(model, prompt[None])
    order: Channels = {}
    for layer in layers:
        order[layer.index] = {}
        for place, name in enumerate(layer.keys):
            # Some versions of a layer repeat each key head for its value heads.
            keys = torch.cat(seen[layer.index]).unflatten(1, (layer.n_keys, -1))[:, place, 0]
            order[layer.index][name] = scipy.linalg.qr(keys, mode="r", pivoting=True)[1].tolist()
    return order


def keep_channels(
    model: PreTrainedModel, order: Mapping[int, Mapping[int, Sequence[int]]], *, share: float
) -> PreTrainedModel:
    """A copy of a model without a share of the channels of its queries and keys, whose states are so many rows smaller.

    Queries and keys are normalized over the channels that are left. The configuration holds the new d_k, so
    `from_pretrained` needs to know nothing else. Composes with `prune_heads`, in either order.

    Args:
        model: from `load_model`, pruned or not; it is not changed.
        order: for every linear-attention layer and every of its key heads, by its index in the whole model, all its
            channels, those first that are to stay (`order_channels`). Key heads that were removed may be in it.
        share: of channels to remove, and so of the recurrent state's bytes, rounded to whole channels.

    Returns:
        A model of the same class and dtype, on the same device.

    Raises:
        ValueError: a share outside [0, 1) or that leaves no channel, a layer or key head without an order, an order that
            does not hold every channel once, or a model under an intervention such as `ablate_heads`.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> from staterank_utils.architectures import cache_bytes
        >>> model, ids = load_model("hybrid"), torch.arange(128).reshape(1, 128)
        >>> smaller = keep_channels(model, order_channels(model, ids), share=0.5)
        >>> cache_bytes(smaller(ids.to(model.device), use_cache=True).past_key_values)["recurrent"]  # half of 144 * 64 * 64 * 4
        1179648
    """
    check_no_intervention(model, "cut channels")
    layers = _with_channels(model)
    d_k = layers[0].d_k
    n_channels = round((1 - share) * d_k) if 0 <= share < 1 else 0
    if not n_channels:
        raise ValueError(
            f"the share of channels to remove lies in [0, 1) and leaves at least one of {d_k}; got {share}"
        )
    for layer in layers:
        for name in layer.keys:
            found = list(order.get(layer.index, {}).get(name, []))
            if sorted(found) != list(range(d_k)):
                raise ValueError(
                    f"layer {layer.index}, key head {name}: expected an order of all channels 0..{d_k - 1}, got {found}: "
                    "make one of this model with order_channels"
                )
    with torch.inference_mode(False), torch.no_grad():  # in the other, weights would be no ordinary ones
        reduced = copy.deepcopy(model)
        for layer in _with_channels(reduced):
            names, per_key = layer.keys, layer.n_heads // max(1, layer.n_keys)
            groups = [(place, range(place * per_key, (place + 1) * per_key)) for place in range(len(names))]
            of_heads = [sorted(order[layer.index][name][:n_channels]) for name in names]
            for blocks in layer.blocks:
                rows = blocks.rows(groups, n_keys=len(names), per_key=per_key, sizes=layer.sizes, channels=of_heads)
                blocks.cut(layer.module, rows)
            layer.resize(len(names), layer.n_heads, n_channels)
            setattr(reduced.config.get_text_config(), str(layer.d_k_setting), n_channels)
    choose_kernels(reduced)
    return reduced


def why_not(model: PreTrainedModel) -> str | None:
    """Why the key channels of a model cannot be cut, or None where they can.

    Args:
        model: any that `linear_layers` accepts.

    Example:
        >>> from staterank_utils import load_model
        >>> why_not(load_model("hybrid")) is None
        True
    """
    for layer in linear_layers(model):
        if layer.d_k_setting is None or not layer.scans:
            return f"key channels of {layer.name} cannot be cut: its adapter names no setting for their number, or no kernel whose keys could be looked at"
    return None


def _with_channels(model: PreTrainedModel) -> list[LinearLayer]:
    """`linear_layers`, of an architecture whose key channels can be cut."""
    if reason := why_not(model):
        raise ValueError(reason)
    return linear_layers(model)
