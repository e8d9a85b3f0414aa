"""Measure the rank of linear-attention states: load a model, trace its states, reduce them to spectra, group its heads.

    from staterank_utils import domain_prompts, effective_rank, load_model, load_tokenizer, trace_states

    model, tokenizer = load_model("hybrid"), load_tokenizer("hybrid")
    prompts = domain_prompts("prose", tokenizer, n_prompts=4, n_tokens=512, seed=0)
    trace = trace_states(model, prompts, positions=[32, 128, 512], reduce=effective_rank)
    trace.values  # (layer, batch, position, head)

Axes are always in the order (layer, batch, position, head, d_k, d_v). A head is named (layer, head), both from zero.
"""

from staterank_utils import sse as sse  # registers its model type
from staterank_utils.memory import cap_half_life, half_lives, predicted_rank, rank_bound, scale_decay
from staterank_utils.models import load_model, load_tokenizer
from staterank_utils.pruning import prune_heads
from staterank_utils.selection import saturation_scores, select_heads
from staterank_utils.spectra import (
    Spectrum,
    effective_rank,
    effective_rank_bounds,
    entropy_rank,
    nuclear_norm,
    rank_and_norm,
    singular_values,
    stable_rank,
)
from staterank_utils.tasks import domain_prompts
from staterank_utils.tracing import StateTrace, trace_states

__all__ = [
    "Spectrum",
    "StateTrace",
    "cap_half_life",
    "domain_prompts",
    "effective_rank",
    "effective_rank_bounds",
    "entropy_rank",
    "half_lives",
    "load_model",
    "load_tokenizer",
    "nuclear_norm",
    "predicted_rank",
    "prune_heads",
    "rank_and_norm",
    "rank_bound",
    "saturation_scores",
    "scale_decay",
    "select_heads",
    "singular_values",
    "stable_rank",
    "trace_states",
]
__version__ = "0.1.0"
