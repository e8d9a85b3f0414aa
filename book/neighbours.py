"""What stands beside the paper, measured: a rule made for sparse states, and a cache of pairs in the place of a state."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from book.ladder import DOSE, designs, kept_figure, over_models
from staterank_utils import plotting, strata
from staterank_utils.markdown import markdown_table
from staterank_utils.memory import predicted_rank
from staterank_utils.models import EMBEDDED
from staterank_utils.selection import PAPER_SHARE
from staterank_utils.strata import GAP
from staterank_utils.studies import caching, ladder
from staterank_utils.studies.groups import half_lives_from, shares
from staterank_utils.studies.ladder import Measured
from staterank_utils.studies.removal import HIGH, LAYERS, LOW, PROTECTED, RANDOM, chosen
from training.recipes import PARTITIONS as EXPANSION

SSE, CONTROL = "hybrid-sse", "hybrid-fewheads"
SHARED, PARTITIONS = "shared states", "partitions"
STATES = {SHARED: plotting.HIGH_LOOK, PARTITIONS: plotting.LOW_LOOK}


@dataclass(frozen=True)
class States:
    """One kind of state of a model, on prose: means over prompts.

    Attributes:
        layers: of each state.
        rank, log_decay: of each, at the end.
        initial: its rank before training.
        d: largest rank.
        waits: tokens per token that such a state takes part in, if each partition takes as many as the others.
    """

    layers: NDArray[np.int64]
    rank: NDArray[np.float64]
    log_decay: NDArray[np.float64]
    initial: NDArray[np.float64]
    d: int
    waits: int = 1

    def by_law(self, *, written: bool) -> NDArray[np.float64]:
        """The rank that decay predicts, with memory counted in all tokens or in those that the state takes part in."""
        decay = torch.from_numpy(self.log_decay.astype(float)) * (self.waits if written else 1)
        return predicted_rank(decay, d=self.d).numpy()

    def r2(self, *, written: bool) -> float:
        """How well that predicts."""
        return strata.explained(self.by_law(written=written), self.rank)

    def low(self) -> float:
        """Share of states with a rank under 0.2 d."""
        return float((self.rank < GAP[0] * self.d).mean())


def pair() -> tuple[Measured, Measured]:
    """The model with partitions, and its control."""
    (of,), (control,) = designs()[SSE], designs()[CONTROL]
    return of, control


def is_shared(of: Measured) -> NDArray[np.bool_]:
    """Which states of a model with partitions are shared: the first of each layer."""
    return np.array([head < of.training["recipe"]["value_heads"] for _, head in of.groups["end"].heads])


@cache
def kinds_of_states() -> dict[str, States]:
    """The states of the model with partitions by kind, and the heads of its control."""
    of, control = pair()

    def states(measured: Measured, mask: NDArray[np.bool_], waits: int = 1) -> States:
        end, initial = (measured.groups[variant] for variant in ("end", "initial"))
        layers = np.array([layer for layer, _ in end.heads])
        rank, decay, before = (table["prose"].mean(0)[mask] for table in (end.rank, end.log_decay, initial.rank))
        return States(layers[mask], rank, decay, before, end.d, waits)

    shared = is_shared(of)
    return {
        "heads of the control": states(control, np.ones(len(control.groups["end"].heads), dtype=bool)),
        SHARED: states(of, shared),
        PARTITIONS: states(of, ~shared, waits=int(EXPANSION["n_partitions"] / EXPANSION["n_active"])),
    }


def expansion_tables() -> dict[str, str]:
    """The generated parts of the section on sparse state expansion, by name."""
    kinds = kinds_of_states()

    def share(of: NDArray[np.bool_]) -> str:
        return f"{of.mean():.0%}"

    ranks = [
        (
            name, str(of.rank.size), *(share(rank < GAP[0] * of.d) for rank in (of.initial, of.rank)), *(share(rank > GAP[1] * of.d) for rank in (of.initial, of.rank)),
            f"{strata.two_group_share(of.rank / of.d):.2f}",
        )
        for name, of in kinds.items()
    ]  # fmt: skip
    laws = [
        (
            name,
            f"{np.median(half_lives_from(of.log_decay)):.1f}",
            *(strata.without_minus(f"{of.r2(written=written):.2f}") for written in (False, True)),
        )
        for name, of in kinds.items()
    ]
    head = ("", "states", "under 0.2 d before training", "after", "over 0.8 d before", "after", "two-group share")
    return {
        "sse_answer": _answer(),
        "sse_recipe": _recipe(),
        "sse_ranks": markdown_table(head, ranks),
        "sse_depth": _depth(kinds[PARTITIONS]),
        "sse_laws": markdown_table(
            ("", "median half-life, tokens", "R², memory in tokens", "R², memory in written pairs"), laws
        ),
        "sse_costs": _costs(),
        "sse_removal": _removal(),
    }


def _answer() -> str:
    of, control = pair()
    kinds = kinds_of_states()
    return (
        f"{kinds[PARTITIONS].low():.0%} of its partitions have a rank under {GAP[0]} d, {kinds[SHARED].low():.0%} of its shared states, and {kinds['heads of the control'].low():.0%} of the "
        f"heads of a model without partitions. Held-out text costs {of.training[ladder.HELD_OUT]:.3f} bits per byte with partitions and "
        f"{control.training[ladder.HELD_OUT]:.3f} without."
    )


def _recipe() -> str:
    of, control = pair()
    n_of, n_control = (len(measured.groups["end"].heads) for measured in (of, control))
    recipe = of.training["recipe"]
    return (
        f"`sse` has {EXPANSION['n_partitions']} partitions, of which {EXPANSION['n_active']} is active, on the gated delta rule, with one router per layer. "
        f"`fewheads` is its control: the same {recipe['value_heads']} heads per layer and the same MLPs with the ordinary rule, so {n_control} states in place "
        f"of {n_of}. Texts of {recipe['n_tokens']:,} tokens beside softmax layers ask for little more memory, so equal losses here say nothing of long texts."
    )


def _depth(of: States) -> str:
    first = of.layers == of.layers.min()
    means = [of.rank[mask].mean() / of.d for mask in (first, ~first)]
    return f"Depth counts too: the partitions of layer 0 have a mean rank of {means[0]:.2f} d, those of the other layers {means[1]:.2f} d."


def _costs() -> str:
    orders = {"lowest rank": LOW, "highest rank": HIGH, "smallest norm": "small norm", "random": RANDOM}
    rows = [
        (
            name,
            *(f"{of.removal.cost(scheme, order, DOSE):.3f}" for of in pair() for scheme in (LAYERS, PROTECTED)),
        )
        for name, order in orders.items()
    ]
    head = ("removed", *(f"{name}, {scheme}" for name in ("partitions", "control") for scheme in (LAYERS, PROTECTED)))
    return markdown_table(head, rows)


def _removal() -> str:
    """What removing states by rank says with partitions and without, in sentences."""
    of, _ = pair()
    removal, shared = of.removal, is_shared(of)
    taken = {order: shared[list(chosen(removal.orders[order], removal.heads, LAYERS, DOSE))] for order in (LOW, HIGH)}
    [verdict] = [row for row in over_models() if (row["claim"], row["model"]) == ("C4b", SSE)]
    left = []
    for found in ladder.recall_without(pair()):
        at = found.shares.index(DOSE)
        without = [found.gain[order][at] / found.intact for order in (LOW, HIGH)]
        left.append([f"{share:.0%}" for share in without])
    return (
        f"Layer by layer, the states removed as lowest are partitions but for {taken[LOW].sum()} of {taken[LOW].size}, and of those removed as highest "
        f"{taken[HIGH].sum()} are shared. So the two rows compare kinds of states, not ranks within a kind. The registered test of rank within layers (C4b): "
        f"**{verdict['verdict']}**. Of the gain on copied text, {left[0][0]} is left without the lowest quarter and {left[0][1]} without the highest; in the "
        f"control {' and '.join(left[1])}."
    )


def expansion_figure(pictures: Path, numbers: Path) -> None:
    """Draw rank against the law, with memory counted in tokens and in written pairs.

    Args:
        pictures, numbers: folders that exist.
    """
    kinds = kinds_of_states()
    with kept_figure(pictures, numbers, "ladder-sse", 1, 2, height=3.4) as axes:
        for ax, (written, title) in zip(axes.flat, {False: "in tokens", True: "in written pairs"}.items(), strict=True):
            for name, looks in STATES.items():
                of = kinds[name]
                ax.plot(
                    of.by_law(written=written), of.rank, linestyle="", marker=looks["marker"], color=looks["color"], markersize=4, alpha=0.7, label=name,
                )  # fmt: skip
            d = kinds[PARTITIONS].d
            ax.plot([0, d], [0, d], color="0.6", linestyle=":")
            ax.set(title=f"memory {title}", xlabel="rank by the law", xlim=(0, d + 2), ylim=(0, d + 2))
        axes[0, 0].set_ylabel("effective rank")


def neighbours_table() -> str:
    """What was measured of the systems that stand beside the paper, as Markdown."""
    kinds = kinds_of_states()
    caches = {name: found[0] for name in EMBEDDED if (found := caching.load_caching(name)) is not None}
    (channels,) = designs()["hybrid-kda"]
    low = np.mean(channels.groups["end"].relative("prose").mean(0) < GAP[0])
    (added,) = designs()["hybrid-nodelta"]
    rows = (
        (
            "Sparse State Expansion {cite}`pan2025sse`", "several states per head, of which a token writes some",
            f"{{ref}}`one small model <sparse-states>` on the gated delta rule, and its control: {kinds[PARTITIONS].low():.0%} of the partitions have "
            f"a rank under {GAP[0]} d, and {kinds[SHARED].low():.0%} of the shared states",
        ),
        (
            "Kimi Delta Attention {cite}`kimi2025linear`", "a decay per key channel",
            f"{{ref}}`one small model <decay-per-channel>`: {low:.0%} of its heads have a rank under {GAP[0]} d",
        ),
        (
            "Mamba-2 {cite}`dao2024mamba2`", "a decay per head, and nothing is erased",
            f"{{ref}}`one small model <without-delta>`: its two-group share is {shares(added.groups['end'])['two groups']:.2f}",
        ),
        (
            "LoLA {cite}`mcdermott2025lola`", "a cache of pairs beside the state, without training",
            f"on the embedded pair ({{doc}}`../notebooks/04_joint_rank_norm_pruning`). {caching.beside_in_words(caches, 0.25)} With a window of the last "
            f"pairs in the place of {PAPER_SHARE:.1%} of the states, those of highest rank: {caching.left_in_words(caches, PAPER_SHARE)}",
        ),
    )  # fmt: skip
    return markdown_table(("system", "what it is", "what was measured"), rows)
