"""Sparse State Expansion on the gated delta rule, a small class on that of Qwen3-Next: `import staterank_utils` makes it known to the Auto classes.

Source: Sparse State Expansion (arXiv:2507.16577). Every value head has one shared state and N sparse ones, the partitions. A router
chooses k active partitions per token; the others are neither written nor decayed. Where its text leaves a choice, it is made
here: the router is one per layer; a partition's key and query are of length 1 before the router's probability scales them; each state has its own
decay and write strength; LoRA is added behind the convolution. Keys are not row-sparse (its Eq. 7).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen3NextModel,
)
from transformers import initialization as init
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNormGated,
    causal_conv1d_fn,
    causal_conv1d_update,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from staterank_utils.kernels import unit


class SSEConfig(Qwen3NextConfig):
    """Of Qwen3-Next, and of the partitions.

    Args:
        n_partitions: sparse states per value head (N).
        n_active: active partitions per token (k).
        lora_rank: of what is added to queries and keys of the partitions.
        balance: weight of the auxiliary loss, which keeps the router from choosing one partition alone.
        kwargs: as Qwen3-Next's configuration takes them.

    Example:
        >>> SSEConfig(n_partitions=2).model_type
        'staterank_sse'
    """

    model_type = "staterank_sse"

    def __init__(
        self, *, n_partitions: int = 4, n_active: int = 1, lora_rank: int = 16, balance: float = 0.01, **kwargs: Any
    ):
        self.n_partitions, self.n_active, self.lora_rank, self.balance = n_partitions, n_active, lora_rank, balance
        super().__init__(**kwargs)


class SSEGatedDeltaNet(nn.Module):
    """A layer whose value heads have 1 + N states each: the shared ones first, then those of one partition after the other.

    Source: with e = softmax(W x), for each of the k partitions n with the largest e, the active ones: S_n <- a_n (I - b_n e_n^2 k k^T) S_n + b_n e_n k v^T, and the output
    is the sum of S_n^T (e_n q) over the active partitions, and of the shared state's, for which e is 1. Keys and queries are of length 1.

    Args:
        config: of the model.
        layer_idx: of its decoder layer.

    Raises:
        ValueError: a number of partitions, or of active ones, that cannot be.

    Example:
        >>> SSEGatedDeltaNet(SSEConfig(n_partitions=2, n_active=3), 0)
        Traceback (most recent call last):
            ...
        ValueError: n_active must lie in 1..n_partitions, got 3 of 2
    """

    def __init__(self, config: SSEConfig, layer_idx: int):
        super().__init__()
        if not 1 <= config.n_active <= config.n_partitions:
            raise ValueError(f"n_active must lie in 1..n_partitions, got {config.n_active} of {config.n_partitions}")
        self.layer_idx, self.n_partitions, self.n_active = layer_idx, config.n_partitions, config.n_active
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.keys, self.values = config.linear_num_key_heads, config.linear_num_value_heads
        n_states = 1 + config.n_partitions
        self.num_k_heads, self.num_v_heads = n_states * self.keys, n_states * self.values
        self.key_dim, self.value_dim = self.keys * self.head_k_dim, self.values * self.head_v_dim
        self.conv_dim, self.conv_kernel_size = 2 * self.key_dim + self.value_dim, config.linear_conv_kernel_dim
        self.activation = config.hidden_act

        def linear(n_in: int, n_out: int) -> nn.Linear:
            return nn.Linear(n_in, n_out, bias=False)

        width = config.hidden_size
        self.in_proj_qkvz = linear(width, self.conv_dim + self.value_dim)
        self.in_proj_ba = linear(width, 2 * self.num_v_heads)
        self.router = linear(width, self.n_partitions)
        self.lora_down, self.lora_up = linear(width, config.lora_rank), linear(config.lora_rank, 2 * self.key_dim)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, self.conv_kernel_size, groups=self.conv_dim, padding=self.conv_kernel_size - 1, bias=False
        )  # fmt: skip
        self.dt_bias = nn.Parameter(torch.ones(self.num_v_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads).uniform_(0.01, 16).log())
        self.states = nn.Identity()  # outputs of every state, before the sum over partitions
        self.norm = Qwen3NextRMSNormGated(self.head_v_dim, eps=config.rms_norm_eps)
        self.out_proj = linear(self.value_dim, width)
        self.balance: Tensor | None = None

    def forward(
        self,
        hidden_states: Float[Tensor, "batch token d_model"],
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch token d_model"]:
        """As a linear-attention layer of Qwen3-Next is called."""
        cache = kwargs.pop("cache_params", cache)  # its name before transformers 5.24
        x = hidden_states
        if attention_mask is not None:
            x = x * attention_mask[:, :, None].to(x.dtype)
        n_tokens, conv_state, state, recording = x.shape[1], None, None, False
        if cache is not None:
            held = cache.layers[self.layer_idx]
            recording = held.record_past
            if held.has_previous_state[0]:
                conv_state, state = held.conv_states[0], held.recurrent_states[0]
        mixed, z = self.in_proj_qkvz(x).split([self.conv_dim, self.value_dim], -1)
        query, key, value = self._convolved(mixed.mT, conv_state, cache, recording).split(
            [self.key_dim, self.key_dim, self.value_dim], -1
        )
        more_q, more_k = self.lora_up(self.lora_down(x)).chunk(2, -1)
        weights, active = self.route(self.router(x))
        query, key = (
            self._expanded(own, own + more, weights, 1 + self.n_partitions)
            for own, more in ((query, more_q), (key, more_k))
        )
        value = value.unflatten(-1, (self.values, -1)).repeat(1, 1, 1 + self.n_partitions, 1)
        # (Before transformers 5.20 its rule in plain torch wants a key head per value head.)
        query, key = (part.repeat_interleave(self.values // self.keys, 2) for part in (query, key))
        log_decay, strength = self.gates(self.in_proj_ba(x), active)
        rule = torch_recurrent_gated_delta_rule if state is not None and n_tokens == 1 else torch_chunk_gated_delta_rule
        out, last = rule(
            query, key, value, g=log_decay, beta=strength.to(x.dtype), initial_state=state,
            output_final_state=cache is not None, use_qk_l2norm_in_kernel=False,
        )  # fmt: skip
        if cache is not None:
            cache.update_recurrent_state(last, self.layer_idx)
        out = self.states(out.flatten(2)).unflatten(-1, (1 + self.n_partitions, self.values, -1)).sum(2)
        gated: Tensor = self.norm(out, z.unflatten(-1, (self.values, -1)))
        put_out: Tensor = self.out_proj(gated.flatten(2))
        return put_out

    def route(
        self, logits: Float[Tensor, "batch token partition"]
    ) -> tuple[Float[Tensor, "batch token partition"], Float[Tensor, "batch token partition"]]:
        """The probability of each active partition, 0 for the others, and 1 for the active ones.

        In training, `balance` is then the auxiliary loss, over all tokens, padding among them.

        Args:
            logits: of the router.
        """
        shares = logits.float().softmax(-1)
        active = torch.zeros_like(shares).scatter(-1, shares.topk(self.n_active, -1).indices, 1.0)
        self.balance = None
        if self.training:
            self.balance = self.n_partitions / self.n_active * (shares.mean((0, 1)) * active.mean((0, 1))).sum()
        return shares * active, active

    def gates(
        self, ba: Float[Tensor, "batch token gate"], active: Float[Tensor, "batch token partition"]
    ) -> tuple[Float[Tensor, "batch token state"], Float[Tensor, "batch token state"]]:
        """Log-decay and write strength of every state: a partition that is not active does not decay.

        Args:
            ba: of `in_proj_ba`.
            active: from `route`.
        """
        b, a = ba.chunk(2, -1)
        log_decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        return log_decay * F.pad(active, (1, 0), value=1.0).repeat_interleave(self.values, -1), b.float().sigmoid()

    def _expanded(self, own: Tensor, of_partitions: Tensor, weights: Tensor, n_states: int) -> Tensor:
        """Queries or keys of all states, of length 1 times the router's probability."""
        heads = torch.stack([own, *[of_partitions] * (n_states - 1)], 2).unflatten(-1, (self.keys, -1))
        scaled = unit(heads) * F.pad(weights, (1, 0), value=1.0)[..., None, None]
        return scaled.flatten(2, 3).to(own.dtype)

    def _convolved(self, mixed: Tensor, conv_state: Tensor | None, cache: Any, recording: bool) -> Tensor:
        n_tokens, weight = mixed.shape[-1], self.conv1d.weight.squeeze(1)
        if conv_state is not None and n_tokens == 1 and not recording:
            return causal_conv1d_update(mixed, conv_state, weight, None, self.activation).mT  # type: ignore[no-any-return]
        if cache is not None:
            mixed = cache.update_conv_state(mixed, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        made: Tensor = causal_conv1d_fn(mixed, weight, None, activation=self.activation)
        return made[:, :, -n_tokens:].mT


class _Partitioned:
    """What both models have before the classes of Qwen3-Next: the layers, and how they begin."""

    config_class = SSEConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, SSEGatedDeltaNet):
            init.ones_(module.dt_bias)
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(0.01, 16).log_())


class SSEModel(_Partitioned, Qwen3NextModel):
    """The decoder, with `SSEGatedDeltaNet` where Qwen3-Next has its linear-attention layers.

    Args:
        config: of the model.

    Example:
        >>> AutoModel._model_mapping[SSEConfig].__name__
        'SSEModel'
    """

    def __init__(self, config: SSEConfig):
        super().__init__(config)
        for index, kind in enumerate(config.layer_types):
            if kind == "linear_attention":
                self.layers[index].linear_attn = SSEGatedDeltaNet(config, index)
        self.post_init()


class SSEForCausalLM(_Partitioned, Qwen3NextForCausalLM):
    """A language model with sparse state expansion; its loss in training has the auxiliary loss of every layer in it.

    Args:
        config: of the model.

    Example:
        >>> config = SSEConfig(
        ...     vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        ...     layer_types=["linear_attention", "full_attention"], linear_num_key_heads=1, linear_num_value_heads=2,
        ...     linear_key_head_dim=8, linear_value_head_dim=8, num_experts=0, mlp_only_layers=[0, 1], pad_token_id=0, eos_token_id=0,
        ... )
        >>> AutoModelForCausalLM.from_config(config).model.layers[0].linear_attn.num_v_heads
        10
    """

    def __init__(self, config: SSEConfig):
        super().__init__(config)
        self.model = SSEModel(config)
        self.post_init()

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """As of Qwen3-Next."""
        made = super().forward(*args, labels=labels, **kwargs)
        if labels is not None and self.training:
            balance = self.config.balance * self.balance()
            if isinstance(made, tuple):  # return_dict=False
                return (made[0] + balance, *made[1:])
            made.loss = made.loss + balance
        return made

    def balance(self) -> Float[Tensor, ""]:
        """The auxiliary loss of the last forward in training: per layer, N / k times the sum over partitions of mean probability times frequency.

        Raises:
            ValueError: there was none.
        """
        told = [module.balance for module in self.modules() if isinstance(module, SSEGatedDeltaNet)]
        if not told or any(each is None for each in told):
            raise ValueError("no router has chosen in training yet: call train(), and then the model")
        return torch.stack([each.to(self.device) for each in told if each is not None]).sum()


AutoConfig.register(SSEConfig.model_type, SSEConfig, exist_ok=True)
AutoModel.register(SSEConfig, SSEModel, exist_ok=True)
AutoModelForCausalLM.register(SSEConfig, SSEForCausalLM, exist_ok=True)
