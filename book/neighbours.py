"""What stands beside the paper, measured: a rule made for sparse states, and a cache of pairs in the place of a state."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from book.ladder import DOSE, designs, kept_figure
from staterank_utils import plotting, strata
from staterank_utils.markdown import markdown_table
from staterank_utils.memory import predicted_rank
from staterank_utils.models import EMBEDDED
from staterank_utils.selection import PAPER_SHARE
from staterank_utils.studies import caching, ladder
from staterank_utils.studies.groups import half_lives_from
from staterank_utils.studies.ladder import Measured
from staterank_utils.studies.removal import HIGH, LAYERS, LOW, chosen

SSE, CONTROL = "hybrid-sse", "hybrid-fewheads"
PARTITIONS = "partitions"
STATES = {"shared states": plotting.HIGH, PARTITIONS: plotting.LOW}


@dataclass(frozen=True)
class States:
    """One kind of state of a model, on prose: means over prompts.

    Attributes:
        rank, log_decay: per state.
        d: largest rank.
        waits: tokens per token that such a state takes part in.
    """

    rank: NDArray[np.float64]
    log_decay: NDArray[np.float64]
    d: int
    waits: int = 1

    def by_law(self, *, written: bool) -> NDArray[np.float64]:
        """The rank that decay predicts, with memory counted in all tokens or in those that the state takes part in."""
        decay = torch.from_numpy(self.log_decay.astype(float)) * (self.waits if written else 1)
        return predicted_rank(decay, d=self.d).numpy()

    def r2(self, *, written: bool) -> float:
        """How well that predicts."""
        return strata.explained(self.by_law(written=written), self.rank)


def is_shared(of: Measured) -> NDArray[np.bool_]:
    """Which states of a model with partitions are shared: the first of each layer."""
    return np.array([head < of.training["recipe"]["value_heads"] for _, head in of.groups["end"].heads])


def kinds_of_states() -> dict[str, States]:
    """The states of the model with partitions by kind, and the heads of its control."""
    (of,), (control,) = designs()[SSE], designs()[CONTROL]

    def states(measured: Measured, mask: NDArray[np.bool_], waits: int = 1) -> States:
        groups = measured.groups["end"]
        rank, decay = (table["prose"].mean(0)[mask] for table in (groups.rank, groups.log_decay))
        return States(rank, decay, groups.d, waits)

    shared = is_shared(of)
    n_states = len(shared) // int(shared.sum())
    return {
        "heads of the control": states(control, np.ones(len(control.groups["end"].heads), dtype=bool)),
        "shared states": states(of, shared),
        PARTITIONS: states(of, ~shared, waits=n_states - 1),
    }


def expansion_tables() -> dict[str, str]:
    """The generated parts of the section on sparse state expansion, by name."""
    kinds = kinds_of_states()
    head = (
        "",
        "states",
        "r/d under 0.2",
        "between",
        "over 0.8",
        "median half-life, tokens",
        "R² of the law",
        "the same in written pairs",
    )
    rows = []
    for name, of in kinds.items():
        relative = of.rank / of.d
        low, high = (relative < 0.2).mean(), (relative > 0.8).mean()
        rows.append(
            (
                name, str(relative.size), *(f"{share:.0%}" for share in (low, 1 - low - high, high)),
                f"{np.median(half_lives_from(of.log_decay)):.1f}",
                *(strata.without_minus(f"{of.r2(written=written):.2f}") for written in (False, True)),
            )
        )  # fmt: skip
    return {"sse_kinds": markdown_table(head, rows), "sse_answer": _answer(kinds), "sse_removal": _removal()}


def _answer(kinds: dict[str, States]) -> str:
    (of,), (control,) = designs()[SSE], designs()[CONTROL]
    low = {name: np.mean(kind.rank < 0.2 * kind.d) for name, kind in kinds.items()}
    return (
        f"Of the partitions' states, {low[PARTITIONS]:.0%} have a rank under 0.2 d, of the shared ones {low['shared states']:.0%}, and of the heads of the "
        f"control {low['heads of the control']:.0%}. Held-out text costs {of.training[ladder.HELD_OUT]:.3f} bits per byte with partitions and "
        f"{control.training[ladder.HELD_OUT]:.3f} without."
    )


def _removal() -> str:
    """What removing states by rank costs with partitions and without, in sentences."""
    (of,), (control,) = designs()[SSE], designs()[CONTROL]
    removal = of.removal
    lowest = list(chosen(removal.orders[LOW], removal.heads, LAYERS, DOSE))
    shared = is_shared(of)
    costs = {
        name: ", ".join(f"{measured.removal.cost(LAYERS, order, DOSE):.2f} without the {which}" for order, which in ((LOW, "lowest"), (HIGH, "highest")))
        for name, measured in (("with partitions", of), ("the control", control))
    }  # fmt: skip
    [found] = ladder.recall_without([of])
    at = found.shares.index(DOSE)
    left = [found.gain[order][at] / found.intact for order in (LOW, HIGH)]
    areas = [strata.without_minus(f"{measured.removal.area(LAYERS):.2f}") for measured in (of, control)]
    return (
        f"{np.mean(~shared[lowest]):.0%} of the lowest quarter of every layer are partitions. Nats per token that its removal adds: "
        f"{'; '.join(f'{name} {cost}' for name, cost in costs.items())}. D is {areas[0]} with partitions and {areas[1]} in the control; with partitions it "
        f"is larger, without its sign, than that of {removal.beyond_random():.0%} of random orders within layers. Of the gain on copied text "
        f"{left[0]:.0%} is left without the lowest quarter, and {left[1]:.0%} without the highest."
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
    caches = {name: found[0] for name in EMBEDDED if (found := caching.load_caching(name)) is not None}
    rows = (
        (
            "Sparse State Expansion {cite}`pan2025sse`", "several states per head, of which a token writes some",
            f"trained on the gated delta rule, one seed, and its control: {{doc}}`ladder`. {_answer(kinds_of_states())}",
        ),
        (
            "LoLA {cite}`mcdermott2025lola`", "a cache of pairs beside the state, without training",
            f"on the embedded pair, in place of the states of highest rank ({PAPER_SHARE:.1%} of all) and beside them: "
            f"{{doc}}`../notebooks/04_joint_rank_norm_pruning`. {caching.left_in_words(caches, PAPER_SHARE)}",
        ),
    )  # fmt: skip
    return markdown_table(("system", "what it is", "what was measured"), rows)
