"""A tiny random xLSTM: the real class, d_k != d_v, gates of every strength."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, xLSTMConfig, xLSTMForCausalLM

from architectures.oracle import ALL, Architecture, Expected, recurrence
from staterank_utils.architectures import linear_layers


def _xlstm() -> PreTrainedModel:
    config = xLSTMConfig(
        vocab_size=64, hidden_size=128, embedding_dim=128, num_heads=4, num_hidden_layers=2, qk_dim_factor=0.5, v_dim_factor=1.0,
        chunk_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = xLSTMForCausalLM(config).float().eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            # (its gates begin nearly shut)
            parameter += (0.5 if "gate_preact.bias" in name else 0.05) * torch.randn(parameter.shape)
            if "igate_preact.bias" in name:
                parameter += 8.0
    return model


@torch.no_grad()
def expected(model: PreTrainedModel, ids: Tensor) -> list[Expected]:
    """From what one full pass gives to the recurrence of every layer, (batch, head, token, ...)."""
    found: list[Expected] = []

    def look(_: object, __: object, given: dict[str, Tensor]) -> None:
        key, value, write, forget = (
            given[name].double().transpose(1, 2) for name in ("key", "value", "igate", "fgate")
        )
        log_decay, write = F.logsigmoid(forget), write.exp()
        found.append(Expected(recurrence(key, value * write[..., None], log_decay[..., None]), log_decay, write))

    hooks = [
        layer.module.mlstm_backend.register_forward_pre_hook(look, with_kwargs=True) for layer in linear_layers(model)
    ]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


ARCHITECTURES = {"xlstm": Architecture(_xlstm, expected, refused=ALL, pads=False)}
