# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,mystnb,-all
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% tags=["remove-cell"]
import importlib.util
import os

from IPython import get_ipython

if importlib.util.find_spec("staterank_utils") is None:
    # On Colab: fetch the repository, with its models, and work in it.
    repository = "https://github.com/staterank/staterank-book"
    print(f"fetching {repository}")
    get_ipython().system(
        f"git clone --depth 1 {repository} book && pip install -q './book[notebooks]'"
    )
    os.chdir("book")

# %% [markdown]
# # Who recalls from context?
#
# **{glue:text}`answer`** {glue:text}`more`
#
# {glue:}`badges`

# %% tags=["parameters", "hide-input"]
model = "hybrid, pure"  # embedded names, folders or hub ids, separated by commas
revision = ""  # commit or tag, for hub ids
device = ""  # "": the GPU if there is one; "cpu", "cuda", or "auto": spread over all GPUs
dtype = ""  # of the weights: "": float32 on a CPU, the checkpoint's own on a GPU; or "float32", "bfloat16"
profile = "quick"  # "quick" or "full"
seed = 0
n_prompts = 0  # prompts on which ranks are taken; 0: what the profile says
n_copies = 0  # passages per text that are read twice, at most 8; 0: what the profile says
results_folder = ""  # where the result is stored; "": nowhere

# %% tags=["hide-input"]
import json

from IPython.display import Markdown
from staterank_utils import claims, markdown, plotting, results, strata
from staterank_utils.memory import can_cap
from staterank_utils.studies import recall as recalls
from staterank_utils.studies.ladder import (
    cap_by_design,
    later_hybrids,
    memory_of_lowest,
    pure_direction,
    recall_over_models,
    recall_without,
    recalling_heads,
    stored_models,
)
from staterank_utils.studies.repeated import repeat_recall, stored_on
from staterank_utils.studies.setup import setup

run = setup(globals(), "05_memory_and_recall", n_prompts=(1, 16), n_copies=(2, 8))
plotting.use_style()
GAP, CAP = recalls.COPY_GAP, claims.SECOND["C6"].numbers["cap"]
loaded = {name: run.load(name) for name in run.models}
decaying = [name for name, (network, _) in loaded.items() if can_cap(network)]
caps = (CAP,) if run.quick else recalls.CAPS
more = {"n_tokens": 1024 if run.quick else 2048, "gaps": (GAP,) if run.quick else recalls.GAPS}
found = {
    name: repeat_recall(name, *of, caps=caps if name in decaying else (), **run.sizes, **more)
    for name, of in loaded.items()
}
shown = {name: of.shown for name, of in found.items()}

# %% mystnb={"figure": {"caption": "Gain: loss on a passage of 512 tokens minus loss on its repetition. Left: against heads removed. Right: against their cost on text read once. Dotted: all heads. Open marks: this run, on fewer passages.", "name": "fig-recall-arms"}, "image": {"alt": "Per model two panels of gains without some heads. In the embedded hybrid, removing the lowest ranks takes nearly all of the gain, removing the highest takes none, at similar cost; in the embedded pure model the gain is about zero throughout."}} tags=["hide-input"]
without = {name: recalls.without_heads(name, of.shown, of.removal) for name, of in found.items()}
_, panels = plotting.panel_grid(len(without), 2, width=10, row_height=2.7, sharey=True)
for (left, right), (name, of) in zip(panels, without.items(), strict=True):
    live = found[name].live.gains
    again = {order: live[f"{order}, 25.0%, layer-matched"] for order in of.gain}
    plotting.plot_recall_without(left, right, of, live={25: again} if found[name].made else None)
    left.set_title(name, fontsize="medium")
plotting.legend_above(left.figure)
run.keep("fig-recall-arms")

# %% [markdown]
# The model reads a passage of {glue:text}`gap` tokens twice in a row. The *gain* is how much better it predicts the second copy: what it recalls
# from context. A gain can also rise because the first reading got worse, so a fall shows that less is recalled, and a gain that stays does not show that all is. Then heads are removed, the same number in every layer, so that the choice of layers explains nothing. The right panel answers the
# first objection, that some heads cost more on any text: compare arms at the same cost on text that is read once.
# How much a model recalls depends on the distance, too. With all heads, by the length of the passage:
#
# ```{glue:md} by_distance
# :format: myst
# ```

# %% [markdown] tags=["of-the-book"]
# In the embedded hybrid, recall needs the heads of *low* rank: without them most of the gain is gone, without the highest ranks it is all there. At the
# same cost on text read once, arms of low rank recall less than random arms. Every arm also takes heads of layer 0. With that layer protected and a
# quarter of all heads removed from the others:
#
# ```{glue:md} recall_protected
# :format: myst
# ```
#
# In hybrid the heads of low rank have short memories ({glue:text}`lowest`), so they cannot hold a passage of 512 tokens themselves. Softmax layers can
# look back to it, but must be told where; heads that tell each token what stood just before it would do that. This account is a guess that nothing
# here tests.
#
# ## Does it hold beyond one model?
#
# Every model of {doc}`the ladder <../book/ladder>` on which these arms were measured, with a quarter of the heads of every layer removed
# (seen first in the earlier hybrids of the ladder, then registered as C11 for those that are measured later):

# %% tags=["hide-input", "of-the-book"]
everyone = [of for of, _ in stored_models().values()]
ladder = recall_without(everyone)
first_pair = json.loads((results.STORED / "first_pair.json").read_text())["rows"]
limit = claims.SECOND["C6"].numbers["hybrid"]
stored = {name: of[0] for name in run.models if (of := stored_on(name))}
said = {
    "first_pair": markdown.by_model(first_pair, "C4"),
    "first_pair_numbers": {
        row["model"]: {
            x["label"].partition(" (")[0]: f"{x['point']:.2f} ({x['label'].partition(' (')[2]}"
            for x in row["criteria"]
            if "random" not in x["label"]
        }
        for row in first_pair
        if row["claim"] == "C4"
    },
    "cap_takes": f"it asks that the cap take under {limit:.0%} of the gain; in hybrids of the ladder it takes {cap_by_design(everyone)} (the one with Sparse State Expansion is left out: it was measured under another cap)",
    "ladder_said": recall_over_models(ladder),
    "losses_pure": pure_direction(everyone),
    "later": later_hybrids(ladder),
    "lowest": "; ".join(
        memory_of_lowest(*pair) for pair in stored.items() if without[pair[0]].recalls
    ),
    "recall_protected": {
        name: recalls.gains_protected(of.recall, of.removal) for name, of in stored.items()
    },
}
run.say(said)

# %% tags=["hide-input", "of-the-book"]
rows = []
for of in ladder:
    at = of.shares.index(0.25)
    draws = (
        f"{of.random[at].mean():z.2f} ({of.random[at].min():z.2f} to {of.random[at].max():z.2f})"
    )
    gains = (of.gain["low rank"][at], of.gain["high rank"][at])
    costs = " / ".join(
        f"{of.added[order][at]:z.2f}" for order in ("low rank", "high rank", "random")
    )
    rows.append((of.name, f"{of.intact:z.2f}", *(f"{x:z.2f}" for x in gains), draws, costs))
HEAD = (
    "model",
    "gain, all heads",
    "without lowest ranks",
    "without highest",
    "without random heads",
    "added nats on text read once: lowest / highest / random",
)
Markdown(markdown.markdown_table(HEAD, rows))

# %% [markdown] tags=["of-the-book"]
# {glue:text}`ladder_said` {glue:text}`later` Pure models trained on text recall next to nothing over this distance. Those trained with 63 % tasks recall a little, and
# their gain grows when the lowest ranks go; from gains under 0.2 nothing follows. A replication on a pure model of 1.3 billion parameters reports
# that the gain vanishes without the high-rank heads ({doc}`limits <../book/limits>`). An earlier pair of 9 million parameters was judged by scores on
# tasks. That removing its low-rank heads hurts more: {glue:text}`first_pair`. Score without the highest minus without the lowest, one seed each, in brackets the heads removed:
#
# ```{glue:md} first_pair_numbers
# :format: myst
# ```
#
# On tasks, hybrids of {doc}`the ladder <../book/ladder>` differ among themselves, too, one seed each. So that a hybrid, which the paper measured, and a pure
# model, which the replication measured, differ in what recalls is a guess. For losses on text this does not reconcile the two: {glue:text}`losses_pure`; the
# replication's model has the opposite at every share.

# %% [markdown]
# ## Same rank, shorter memory
#
# To a first approximation rank is memory length *cut at $d$* ({doc}`00_what_rank_measures`). So memory can be shortened while rank nearly stays: by the law, any half-life over 5
# tokens gives full rank at $d = 64$. No training and no change of weights: the log-decay of every token becomes at most that of the cap,
#
# $$ \log a_t \;\leftarrow\; \min\Bigl(\log a_t,\; -\frac{\ln 2}{H}\Bigr), \qquad H = \text{half-life in tokens}. $$ (eq-cap)
#
# What a token writes stays as it is:

# %%
from staterank_utils.memory import cap_half_life, half_lives
from staterank_utils.tasks import domain_prompts
from staterank_utils.tracing import trace_states

if decaying:
    network, tokenizer = loaded[decaying[0]]
    ids = domain_prompts("prose", tokenizer, n_prompts=1, n_tokens=256, seed=run.seed)
    with cap_half_life(network, CAP):
        longest = half_lives(trace_states(network, ids, positions=[256])).max()
    print(f"longest mean half-life of a head under the cap: {longest:.1f} tokens")

# %% mystnb={"figure": {"caption": "Against the longest half-life that is left. Left: gain from a passage of 512 tokens read twice, 95 % intervals over passages. Right: mean r/d. Open marks: this run, on fewer passages.", "name": "fig-caps"}, "image": {"alt": "Left panel: gains as half-lives are capped. Right panel: mean relative rank. The embedded hybrid's gain falls by about half, the pure model's is about zero throughout. For both embedded models rank is nearly flat down to 16 tokens."}} tags=["hide-input"]
capped = {name: shown[name] for name in decaying}
live = {name: found[name].live for name in decaying if found[name].made}
if capped:
    _, panels = plotting.panel_grid(1, 2, width=10, row_height=4, sharey=False)
    plotting.plot_caps(*panels[0], capped, gap=GAP, live=live)
    run.keep("fig-caps")

# %% [markdown]
# With every half-life capped at {glue:text}`cap` tokens, mean $r/d$ goes {glue:text}`rank_change`, and low and high labels agree with those before to
# $\kappa$ = {glue:text}`kappa`. By the law a full head stays full under such a cap, and others change little; how much of the fall
# it predicts was not computed. What the cap takes from the gain while ranks stay, rank does not see.

# %% [markdown] tags=["of-the-book"]
# The hybrid's gain falls: rank hardly sees memory beyond some tens of tokens. The heads of low rank that recall needs have mean half-lives far under the cap, which
# can change them only at single tokens that decay little. Yet the cap takes a large part of the gain, so long memories matter, too. The arm of the highest ranks takes away many of
# the heads with long memories, and costs no gain. So both kinds of memory matter, but not every head of high rank does: some of those that
# stay may be enough, or a cap may disturb what the later layers expect. Nothing here decides between the two.
#
# If attention did all the recalling, a cap would take little of the hybrid's gain and most of the pure model's. That is claim C6. Its half about
# hybrids can be looked at alone: {glue:text}`cap_takes`.

# %% [markdown]
# ```{admonition} Where the numbers come from
# :class: dropdown
# {glue:text}`sources`
# ```

# %% tags=["hide-input"]
rows = []
for name, of in capped.items():
    small = of.gain(gap=GAP).point < claims.SECOND["C6"].numbers["gain"]
    taken = "no gain to take" if small else f"{of.taken():.2f}"
    numbers = (of.gain(gap=GAP), of.gain(f"cap {CAP}", gap=GAP))
    cost = of.cap_nats[f"cap {CAP}"] - of.cap_nats["intact"]
    rows.append((name, *(f"{x:.2f}" for x in numbers), taken, f"{recalls.over_texts(cost):.2f}"))
HEAD = (
    "model",
    "gain",
    f"gain, half-lives at most {CAP}",
    "share taken",
    "added nats on text, first reading",
)
Markdown(markdown.markdown_table(HEAD, rows))

# %% [markdown]
# ## Verdicts
#
# By {doc}`the registered rule <../book/claims>`, for an embedded model on the stored measurement. C6 compares a hybrid with a pure model of the same training data;
# {doc}`the ladder <../book/ladder>` has it over seeds. C11, over later hybrids of the ladder, stands with the models above.

# %% tags=["hide-input"]
verdicts = recalls.pair_claims({name: (of.shown, of.seed) for name, of in found.items()})
Markdown(markdown.verdict_table(verdicts))

# %% tags=["hide-input", "of-the-book"]
verdicts = [*recalling_heads(ladder), *verdicts]

# %% tags=["hide-input"]
label = f"cap {CAP}"
ranks = (
    f"from {of.cap_rank['intact'].mean() / of.d:.2f} to {of.cap_rank[label].mean() / of.d:.2f} ({name})"
    for name, of in capped.items()
)
said = {
    "rank_change": "; ".join(ranks) or "not measured, since no state here decays",
    "kappa": ", ".join(
        f"{strata.exactly(of.kappa()):.2f} ({name})" for name, of in capped.items()
    )
    or "not measured",
    "cap": f"{CAP}",
    "gap": f"{GAP}",
    "sources": " ".join(of.source(name) for name, of in found.items()),
    "answer": " ".join(recalls.recall_in_words(name, of) for name, of in without.items()),
    "by_distance": {name: of.by_distance() for name, of in shown.items()},
}
run.conclude(said, verdicts, found, badges=("C11", "C6"))

# %% [markdown]
# ## What this does not say
#
# Recall is measured in one way, a passage read twice. Behind each range of random heads are four draws.

# %% [markdown] tags=["of-the-book"]
# The embedded models are some thousands of times smaller than Qwen3-Next and read 262 million tokens. What the first half of this page says of the embedded pair was not registered before it
# was seen. On another pair:
#
# ```bash
# papermill notebooks/05_memory_and_recall.ipynb mine.ipynb -p profile full \
#     -p model "FOLDER/OF/HYBRID, FOLDER/OF/PURE"
# ```
