"""What each training of the ladder is: data in one frozen table, by name.

A recipe says everything that decides the weights, but for the corpus and the machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transformers import (
    BambaConfig,
    BambaForCausalLM,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from staterank_utils.sse import SSEConfig, SSEForCausalLM

LINEAR, SOFTMAX = "linear_attention", "full_attention"
HYBRID = (LINEAR, LINEAR, LINEAR, SOFTMAX) * 3
SOFTMAX_FIRST = (SOFTMAX, LINEAR, LINEAR, LINEAR) * 3
PURE = (LINEAR,) * 12
TEXT = {"books": 0.75, "code": 0.25, "tasks": 0.0}
TASKS_63 = {"books": 0.28, "code": 0.09, "tasks": 0.63}
TASKS_25 = {"books": 0.5625, "code": 0.1875, "tasks": 0.25}
TASKS_10 = {"books": 0.675, "code": 0.225, "tasks": 0.10}
SCHEMES = {  # of `staterank_utils.models.GATES`
    "broad": "normal weights, Mamba-2 gates",  # half-lives from 0.4 to 700 tokens
    "narrow": "normal weights, narrow gates",  # half-lives of 2.4 tokens: by the law, ranks of d/2
    "default": "normal weights, gates of the class",  # half-lives under a token
    "open": "normal weights, open gates",  # nothing decays, and no gradient reaches A: the rule is that of DeltaNet
}
PARTITIONS = {"n_partitions": 4, "n_active": 1, "lora_rank": 16, "balance": 0.01}  # of sparse state expansion
RULES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "gated delta": (Qwen3NextConfig, Qwen3NextForCausalLM),
    "sparse state expansion": (SSEConfig, SSEForCausalLM),
    "KDA": (KimiLinearConfig, KimiLinearForCausalLM),
    "decay without delta": (BambaConfig, BambaForCausalLM),
}
TASKS = {"needle": 0.18, "arithmetic": 0.09, "recall": 0.11, "copying": 0.62}


def _frozen(shares: Mapping[str, float]) -> Any:
    return field(default_factory=lambda: MappingProxyType(dict(shares)))


@dataclass(frozen=True)
class Recipe:
    """One training.

    Attributes:
        name: of the recipe, of its run and of its result.
        layer_types: of the decoder, one per layer, "linear_attention" or "full_attention".
        seed: of the initial weights and of the batches.
        rows: shares of the rows of a batch: windows of books, windows of code, generated tasks.
        tasks: shares of the documents in a row of tasks.
        answer_weight: loss weight of a token that a task asks for, beside 1 for all others.
        steps: of the optimizers.
        batch_rows, n_tokens: size of a step.
        rule: update rule of the linear layers, one of `RULES`.
        gates: their initialisation, one of `SCHEMES`.
        hidden, intermediate, softmax_heads, key_value_heads, key_heads, value_heads, head_size: sizes.

    Example:
        >>> RECIPES["pure-text-0"].n_linear_heads, RECIPES["hybrid-tasks10-0"].rows["tasks"]
        (192, 0.1)
    """

    name: str
    layer_types: tuple[str, ...]
    seed: int
    rows: Mapping[str, float] = _frozen(TEXT)
    tasks: Mapping[str, float] = _frozen(TASKS)
    answer_weight: float = 1.0
    steps: int = 4000
    batch_rows: int = 32
    n_tokens: int = 2048
    rule: str = "gated delta"
    gates: str = "broad"
    hidden: int = 256
    intermediate: int = 512
    softmax_heads: int = 4
    key_value_heads: int = 2
    key_heads: int = 8
    value_heads: int = 16
    head_size: int = 64

    @property
    def n_linear_heads(self) -> int:
        """Value heads of all linear-attention layers."""
        return self.layer_types.count(LINEAR) * self.value_heads

    def settings(self) -> dict[str, Any]:
        """Every field, as JSON can hold it."""
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}
        return plain | {"layer_types": list(self.layer_types)}

    def configuration(self, tokenizer: Any) -> PreTrainedConfig:
        """Of the model: a small one of the rule's class, with dense MLPs, and tied embeddings where the class has them.

        Args:
            tokenizer: of the corpus.

        Raises:
            ValueError: a rule or gates that no model class here has.
        """
        if self.rule not in RULES:
            raise ValueError(f"{self.name}: no model class for rule {self.rule!r}: there is one for {', '.join(RULES)}")
        if self.gates not in SCHEMES:
            raise ValueError(f"{self.name}: unknown gates {self.gates!r}: choose from {', '.join(SCHEMES)}")
        n_layers = len(self.layer_types)
        of_rule, model_class = RULES[self.rule]
        sizes: dict[str, Any] = {} if of_rule is BambaConfig else {"layer_types": list(self.layer_types)}
        if issubclass(of_rule, Qwen3NextConfig):
            sizes |= {
                "num_key_value_heads": self.key_value_heads, "head_dim": self.head_size, "linear_num_key_heads": self.key_heads,
                "linear_num_value_heads": self.value_heads, "linear_key_head_dim": self.head_size, "linear_value_head_dim": self.head_size,
                "num_experts": 0, "mlp_only_layers": list(range(n_layers)),
                "tie_word_embeddings": True,
            } | (PARTITIONS if of_rule is SSEConfig else {})  # fmt: skip
        elif of_rule is BambaConfig:  # which knows its softmax layers by their places; its other layers are Mamba-2
            sizes |= {
                "num_key_value_heads": self.key_value_heads, "attn_layer_indices": [i for i, kind in enumerate(self.layer_types) if kind == SOFTMAX],
                "mamba_n_heads": self.value_heads, "mamba_d_head": self.head_size, "mamba_expand": self.value_heads * self.head_size // self.hidden,
                "mamba_n_groups": self.key_heads, "mamba_d_state": self.head_size, "mamba_conv_bias": False, "bos_token_id": None,
                "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
            }  # fmt: skip
        else:  # its softmax layers keep a latent of keys and values, and know no positions
            sizes |= {
                "num_key_value_heads": self.softmax_heads, "qk_nope_head_dim": self.head_size, "v_head_dim": self.head_size,
                "qk_rope_head_dim": self.head_size // 2, "kv_lora_rank": 2 * self.head_size, "linear_num_heads": self.value_heads,
                "linear_head_dim": self.head_size, "mlp_layer_types": ["dense"] * n_layers, "bos_token_id": None, "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
            }  # fmt: skip
        return of_rule(
            vocab_size=len(tokenizer), hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=n_layers,
            num_attention_heads=self.softmax_heads, max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, use_cache=SOFTMAX in self.layer_types,
            initialization={"scheme": SCHEMES[self.gates], "seed": self.seed}, architectures=[model_class.__name__], **sizes,
        )  # fmt: skip


def _recipes() -> dict[str, Recipe]:
    tasks63 = MappingProxyType(TASKS_63)
    # name -> how many seeds, and what differs from the base
    both: dict[str, tuple[int, dict[str, Any]]] = {
        "text": (3, {}),
        "tasks63": (2, {"rows": tasks63, "answer_weight": 4.0}),
        "tasks10": (1, {"rows": MappingProxyType(TASKS_10)}),
        "wide": (1, {"hidden": 320}),
        "long": (1, {"steps": 6000}),
    }
    hybrids: dict[str, tuple[int, dict[str, Any]]] = {
        "narrow": (2, {"gates": "narrow"}),
        "default": (3, {"gates": "default"}),
        "softmaxfirst": (3, {"layer_types": SOFTMAX_FIRST}),
        "deltanet": (1, {"gates": "open"}),
        # Fewer heads, each with five states, and wider MLPs: as many parameters as the others.
        "sse": (1, {"rule": "sparse state expansion", "key_heads": 4, "value_heads": 8, "intermediate": 1008}),
        "fewheads": (1, {"key_heads": 4, "value_heads": 8, "intermediate": 1008}),  # those sizes, without partitions
        # A decay per channel, as many key heads as value heads, and narrower MLPs: as many parameters as the others.
        "kda": (1, {"rule": "KDA", "key_heads": 16, "intermediate": 352}),
        # Mamba-2: what is written is not compared with what the state holds.
        "nodelta": (1, {"rule": "decay without delta", "intermediate": 528}),
        "tasks25": (1, {"rows": MappingProxyType(TASKS_25)}),
        "tasks63light": (1, {"rows": tasks63}),  # answers weigh as other tokens do
    }
    kinds = (("hybrid", HYBRID, both), ("pure", PURE, both), ("hybrid", HYBRID, hybrids))
    made = {}
    for kind, layer_types, designs in kinds:
        for name, (n_seeds, options) in designs.items():
            for seed in range(n_seeds):
                settings: dict[str, Any] = {"layer_types": layer_types, "seed": seed} | options
                recipe = Recipe(f"{kind}-{name}-{seed}", **settings)
                made[recipe.name] = recipe
    return made


RECIPES = _recipes()
WAVES = {
    1: ("hybrid-text-0", "hybrid-text-1", "hybrid-text-2", "pure-text-0"),
    2: ("pure-text-1", "pure-text-2", "hybrid-tasks63-0", "hybrid-tasks63-1"),
    3: ("pure-tasks63-0", "pure-tasks63-1", "hybrid-tasks10-0", "pure-tasks10-0"),
    4: ("hybrid-long-0", "pure-long-0", "hybrid-tasks25-0", "hybrid-tasks63light-0"),
    5: ("hybrid-narrow-0", "hybrid-narrow-1", "hybrid-default-0", "hybrid-softmaxfirst-0"),
    6: ("hybrid-deltanet-0", "hybrid-sse-0", "hybrid-fewheads-0"),
    7: (
        "hybrid-default-1",
        "hybrid-default-2",
        "hybrid-softmaxfirst-1",
        "hybrid-softmaxfirst-2",
    ),  # the leads of wave 5, on more seeds
    8: ("hybrid-kda-0", "hybrid-nodelta-0"),  # other update rules with decay
}  # the wide pair is of no wave: it is a candidate for embedding, and `--recipes` trains it


def find_recipe(name: str) -> Recipe:
    """A recipe by its name.

    Args:
        name: a key of `RECIPES`.

    Raises:
        ValueError: there is no such recipe.

    Example:
        >>> find_recipe("hybrid-text-0").steps
        4000
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}: choose from {', '.join(RECIPES)}")
    return RECIPES[name]
