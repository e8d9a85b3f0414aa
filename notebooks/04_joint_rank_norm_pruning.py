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
# # Can 38.9 % of the state be removed?
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
n_prompts = 0  # prompts per task; 0: what the profile says
n_draws = 0  # draws of random heads; 0: what the profile says
results_folder = ""  # where the result is stored; "": nowhere

# %% tags=["hide-input"]
import sys
from dataclasses import replace

import numpy as np
from IPython.display import Markdown
from staterank_utils import domain_prompts, lola, markdown, plotting, selection
from staterank_utils.studies import caching, repeated, shrinking
from staterank_utils.studies import removal as removals
from staterank_utils.studies.by_task import measure_by_task, tasks_of
from staterank_utils.studies.setup import setup
from staterank_utils.studies.shrinking import footprint, repeat_shrinking
from staterank_utils.studies.texts import draw_texts, over_texts

run = setup(globals(), "04_joint_rank_norm_pruning", n_prompts=(6, 200), n_draws=(1, 16))
plotting.use_style()
HIGH, JOINT, NORM, RANDOM = removals.HIGH, removals.JOINT, "large norm", removals.RANDOM
ORDERS = (JOINT, HIGH, RANDOM)
SHARE, SCHEMES = selection.PAPER_SHARE, (removals.MODEL, removals.PROTECTED)
sizes = replace(removals.FEW if run.quick else removals.Sizes(), n_draws=run.sizes["n_draws"])
if run.quick:
    orders = (HIGH, JOINT, removals.INVERTED)
    sizes = replace(sizes, orders=orders, shares=(SHARE,), schemes=SCHEMES)
loaded, pruned = {name: run.load(name) for name in run.models}, {}
few = {"n_windows": 1, "n_calibration": 2} if run.quick else {}
texts = {name: draw_texts(words, seed=run.seed, **few) for name, (_, words) in loaded.items()}
for name, (network, _) in loaded.items():
    print(f"{name}: {removals.planned(network, texts[name], sizes)}", file=sys.stderr)
    pruned[name] = repeated.repeat_removal(name, network, texts[name], sizes=sizes, seed=run.seed)
shown = {name: found.shown for name, found in pruned.items()}

# %% mystnb={"figure": {"caption": "Added nats against the share of heads removed; lower is better. Triangles that point up: the joint score. Left: over the model. Right: layer 0 protected. Open marks: this run. Horizontal: a unigram model.", "name": "fig-joint"}, "image": {"alt": "Panels of rising curves, one row per model. In the embedded models the joint score and norm alone rise far above random heads over the model, and rank alone stays under them up to a third of the heads; with layer 0 protected all stay low."}} tags=["hide-input"]
curves = {
    name: {scheme: found.curves(scheme, (HIGH, NORM, JOINT)) for scheme in SCHEMES}
    for name, found in pruned.items()
}
ruins = {name: found.ruin for name, found in shown.items()}
plotting.plot_all_added(curves, ruins=ruins, width=10, row_height=2.5, top=1.75)
run.keep("fig-joint")

# %% [markdown]
# Lower is better: *added nats* are the loss without the heads minus the loss with all, on held-out books and code. Compare the triangles that point up with the grey band. An order is informative
# only if it beats random heads. What the joint score adds to rank
# is the norm, so the difference between the two is what the norm does. Over the model, the norm makes the score take more heads of layer 0 (a table below), and the two
# differ by those. With layer 0 protected the picture is another one: so many random draws cost more than the joint score at the
# paper's share: {glue:text}`dearer` ({doc}`ladder <../book/ladder>`). Added nats at a quarter of the heads and at the paper's share; brackets are 95 % intervals over windows, and for random heads the range of their draws:

# %% tags=["hide-input"]
doses = {"shares": (0.25, SHARE), "schemes": SCHEMES}
Markdown(markdown.markdown_table(*removals.costs_table(shown, orders=ORDERS, **doses)))

# %% [markdown]
# With the sign of the norm turned round, high rank and *small* norm first, 38.9 % over the model costs {glue:text}`inverted` (exploratory).
#
# The paper removes the heads whose states are most saturated, by rank and norm together (Joint Rank-Norm Pruning), without any training
# afterwards: 38.9 % of the recurrent state goes, and accuracy is said to stay.
#
# ```{admonition} Where the numbers come from
# :class: dropdown
# {glue:text}`sources`
# ```
#
# ## Which heads are saturated?
#
# A head is saturated where its state has a high effective rank $\bar r_h$ and a large nuclear norm $\bar n_h$, both means over calibration
# prompts. The score adds the two on a common scale (the paper's Eq. 14, as reported by an independent reader):
#
# $$ s_h = \alpha\, \frac{\bar r_h}{d} + (1 - \alpha)\, \frac{\bar n_h}{\max_j \bar n_j}. $$ (eq-saturation)
#
# The heads with the highest $s_h$ go first. Neither $\alpha$ nor the range of the maximum is published; registered are $\alpha = 0.5$ and
# the whole model. So a verdict here is on one setting of the score.

# %% tags=["hide-input"]
calibration = (
    {"n_prompts": 4, "n_tokens": 512} if run.quick else {"n_prompts": 16, "n_tokens": 2048}
)
calibration["seed"] = run.seed + 1000
smaller, by_task, calibrated = {}, {}, {}
for name, (network, words) in loaded.items():
    calibrated[name] = domain_prompts("code", words, **calibration)
    of_model = (name, network, texts[name], calibrated[name])
    smaller[name] = repeat_shrinking(*of_model, quick=run.quick, seed=run.seed)
    counts = {**run.sizes, "n_draws": max(run.sizes["n_draws"], 8)}
    by_task[name] = measure_by_task(network, words, tasks_of(profile), name=name, **counts)
shrunk = {name: of.shown for name, of in smaller.items()}

# %% mystnb={"figure": {"caption": "Every head by relative effective rank and relative nuclear norm on calibration code. Crosses: the 38.9 % of highest joint score. Circles: those that stay.", "name": "fig-saturation"}, "image": {"alt": "Scatter of rank against norm, one panel per model. In the embedded models the removed heads stand at the right, at full rank and over a wide range of norms."}} tags=["hide-input"]
for name, ax in plotting.model_panels(run.models).items():
    found = shrunk[name]
    removed = np.array([head in set(found.removed) for head in found.heads])
    plotting.plot_selection(ax, found.rank / found.d, found.norm / found.norm.max(), removed)
    ax.legend(fontsize="small", frameon=False, loc="upper left")
run.keep("fig-saturation")

# %% [markdown]
# A part of the answer is which layer the heads are in. Heads of the first linear layer that go, at the measured dose nearest to a quarter:

# %% tags=["hide-input"]
rows = []
for name, found in shown.items():
    first = found.heads[0][0]
    size = sum(layer == first for layer, _ in found.heads)
    for order in (order for order in (JOINT, NORM, HIGH) if found.curve(removals.MODEL, order)):
        taken = found.from_layer(first, removals.MODEL, order, 0.25)
        dose = found.actual(removals.MODEL, found.nearest(removals.MODEL, order, 0.25), order)
        rows.append((name, order, f"{dose:.1%}", f"{taken} of {size}"))
HEAD = ("model", "first to go", "share of all heads", "heads of the first linear layer")
Markdown(markdown.markdown_table(HEAD, rows))

# %% [markdown]
# ## What is freed?
#
# A mask frees nothing: the state is still there. {func}`staterank_utils.pruning.prune_heads` cuts a head out of every weight that has a
# part for it, so the cache has no room for it either. The numbers are bytes of real tensors behind one prompt of 1,024 tokens; keys
# and values at 32,768 tokens follow from two lengths.
#
# The same share can be taken from the other side. A state has $d_k$ rows, one per key channel; channels that the keys leave empty can go,
# and every head stays ({mod}`staterank_utils.channels`, after {cite}`nazari2026key`). "Both" takes the same part from heads and from
# channels.

# %% tags=["hide-input"]
rows = []
for name, found in shrunk.items():
    for method, freed in found.footprints.items():
        kib = (freed.recurrent, freed.convolution, freed.softmax, freed.softmax_long)
        mib = (freed.parameters, freed.duplicated)
        share = f"{found.freed(method):.1%}"
        numbers = [*(f"{x / 2**10:,.0f}" for x in kib), *(f"{x / 2**20:.1f}" for x in mib)]
        rows.append((f"{name}: {method}", share, *numbers))
whole = {name: found.footprints["whole"] for name, found in shrunk.items()}
grown = (
    f"{name}: after {x.recurrent * 1024 / x.softmax:,.0f} tokens"
    for name, x in whole.items()
    if x.softmax
)
refused = (
    f"{name} keeps its key channels: {of.refused}." for name, of in shrunk.items() if of.refused
)
same = (
    f"{x.live.difference:.0e} of logits up to {x.live.logit:.0f} ({name})"
    for name, x in smaller.items()
)
said = {
    "outgrown": ", ".join(grown) or "none of these models is one",
    "refused": " ".join(refused) or "Both ways can be applied to these models.",
    "same": ", ".join(same),
}
HEAD = ("model", "state freed", "state, KiB", "convolution, KiB", "softmax at 1k, KiB")
HEAD += ("softmax at 32k, KiB", "parameters, MiB", "of these duplicated, MiB")
Markdown(markdown.markdown_table(HEAD, rows))

# %% [markdown]
# In a hybrid the keys and values of the softmax layers outgrow the states ({glue:text}`outgrown`), so a share of the state is a smaller
# share of the cache, and less the longer the text. Heads that share a key head cannot always leave without a copy of it: the last column.
#
# A removed head computes what an ablated one does: the largest difference of any logit is {glue:text}`same`.

# %% mystnb={"figure": {"caption": "Added nats where the state is made smaller, in four ways; lower is better. Lines: 95 % intervals over windows. Open circles: this run, on fewer windows.", "name": "fig-channels"}, "image": {"alt": "Dots of added nats for the joint score, rank alone, key channels and both, one panel per model. In the embedded models key channels cost least and the joint score most."}} tags=["hide-input"]
costs = {name: of.costs() for name, of in shrunk.items()}
for name, ax in plotting.model_panels(run.models).items():
    plotting.plot_methods(ax, costs[name], again=smaller[name].again())
    ax.set_ylabel("added nats per token")
plotting.legend_above(ax.figure)
run.keep("fig-channels")

# %% [markdown]
# {glue:text}`refused` Heads are ordered here on code alone, for the first figure on prose and code, so the same score may remove other heads. At 38.9 % the joint
# score costs {glue:text}`other_text`. Where the two differ, the choice of the calibration text matters more than the intervals show, and C5a is judged on one choice.
#
# Would another $\alpha$, or another maximum, do better? Added nats at 38.9 % for other settings of {eq}`eq-saturation`, exploratory, beside
# random heads as the first figure has them. Cheaper than all random draws are {glue:text}`cheaper` of these settings.
#
# ```{admonition} Where these numbers come from
# :class: dropdown
# {glue:text}`smaller_sources`
# ```

# %% tags=["hide-input"]
rows, cheaper = {}, []
for name, found in shrunk.items():
    for (maximum, per, alpha), nats in found.readings.items():
        scheme = removals.LAYERS if per == "every layer" else removals.MODEL
        known = bool(shown[name].curve(scheme, RANDOM))
        draws = [shown[name].near(scheme, RANDOM, SHARE)] if known else []
        random = "".join(f"{of:.2f}" for of in draws) or "not measured"
        point = over_texts(nats).point
        # With alpha = 1 the norm, and so its maximum, has no part.
        cheaper += [point < of.low for of in draws if (maximum, alpha) != ("layer", 1)]
        row = rows.setdefault((name, maximum, per, random), {})
        row[f"α = {alpha:g}"] = f"{point:.2f}"
said["cheaper"] = f"{sum(cheaper)} of {len(cheaper)}"
said["other_text"] = "; ".join(
    f"{costs[name][JOINT][SHARE].point:.2f} by code, {of.near(removals.MODEL, JOINT, SHARE).point:.2f} by prose and code ({name})"
    for name, of in shown.items()
)
HEAD = ("model", "maximum over", "share of", "random heads", *next(iter(rows.values())))
Markdown(markdown.markdown_table(HEAD, [(*key, *row.values()) for key, row in rows.items()]))

# %% [markdown]
# ## Can a small cache replace a state?
#
# The bytes of a state have room for some pairs of a key and a value: for 32 at 64 x 64. LoLA {cite}`mcdermott2025lola` puts a cache of pairs beside
# the state, without training. It holds the last tokens and, of the older ones, those with the largest self-recall error $|S^\top k - v|^2$. Here it is
# tested in two ways. The states of the highest ranks are removed, and a cache in a part of their bytes takes their place; without a state, the error of a pair is the size
# of its value. Or the states stay, and get a cache besides.

# %% mystnb={"figure": {"caption": "Added nats where caches of pairs replace the states of the highest ranks. Bands: 95 % intervals over windows. Horizontal: key channels, which free as much as no cache does. Open circles: this run.", "name": "fig-caches"}, "image": {"alt": "Curves of added nats against the size of the cache, one panel per model and share. In the embedded models they fall from no cache to a half, most at the first eighth."}} tags=["hide-input"]
caches = {}
uncached = {name: reason for name, (of, _) in loaded.items() if (reason := lola.why_not(of))}
for name, (network, words) in loaded.items():
    if name not in uncached:
        of_model = (name, network, words, texts[name], calibrated[name])
        caches[name] = caching.repeat_caching(*of_model, quick=run.quick, seed=run.seed)
pairs = {name: of.shown for name, of in caches.items()}
if pairs:
    shares = sorted(set.intersection(*(set(of.outcomes) for of in pairs.values())))
    size = {"width": 10, "row_height": 3, "sharey": False}
    figure, panels = plotting.panel_grid(len(pairs), len(shares), **size)
    for row, (name, of) in zip(panels, pairs.items(), strict=True):
        for ax, share in zip(row, shares, strict=True):
            found = of.outcomes[share]
            splits = [split for split in caching.SPLITS if len(of.curve(share, split)) > 1]
            curves = {split: of.curve(share, split) for split in splits}
            channels = shrinking.CHANNELS
            lines = {channels: of.added(share, channels).point} if channels in found else {}
            again = caches[name].made and share in caches[name].live.outcomes
            live = caches[name].live.curve(share, caching.RECENT) if again else None
            plotting.plot_caches(ax, curves, other=lines, again=live)
            ax.set_title(f"{name}, {share:.1%} of the states", fontsize="medium")
        row[0].set_ylabel("added nats per token")
    plotting.legend_above(figure)
    run.keep("fig-caches")

# %% [markdown]
# Lower is better. The tables have the controls, as many random heads (one draw) among
# them. *Their mean outputs* stand for heads that remember nothing. *Bytes freed* is a part of all states; key channels free as many as states that are
# removed and get no cache, so compare them with that point of a curve. Then nats per token added at all positions and at those over 512. The gain is the
# loss on a text minus the loss on its repetition, as in {doc}`05_memory_and_recall`, mean over copies of {glue:text}`copies` tokens. It falls
# where less is recalled; it can also rise because the first reading got worse. *1/2*, *1/4* and *1/8* are the cache's part of the bytes of a state; *half of each* holds
# as many last pairs as large values. Last come nats added to the right answers of recall and needle. Where a model does not master a task whole, its column says little, whichever
# way it moves; the gain is then the measure of recall.
#
# {glue:text}`beside` A reading, which nothing here tests: the delta rule overwrites the value of a key that comes again. The overwritten pair then has a
# large error, so LoLA's rule keeps what the delta rule has learned to forget.
#
# Do full states recall worse? The error of a head over the pairs of the last $d$ tokens of code, relative to their values, is 1
# for an empty state and 0 for one that recalls all:
#
# ```{glue:md} self_recall
# :format: myst
# ```

# %% tags=["hide-input"]
none = f"No cache was tried: {'; '.join(f'{why} ({name})' for name, why in uncached.items())}."
said |= {
    "beside": caching.beside_in_words(pairs, 0.25),
    "copies": " and ".join(map(str, next((of.gaps for of in pairs.values() if of.gaps), ["no"]))),
    "self_recall": {name: caching.recall_by_rank(of) for name, of in pairs.items()},
    "cache_sources": " ".join(found.source(name) for name, found in caches.items()),
}
tables = []
for name, of in pairs.items():
    for share in shares:
        table = markdown.markdown_table(*caching.caching_table(of, share))
        what = f"<summary>{name}, {share:.1%} of the states</summary>"
        tables.append(f"<details{' open' * (not tables)}>{what}\n\n{table}\n\n</details>")
Markdown("\n\n".join(tables) or none)

# %% [markdown]
# ```{admonition} How the caches were measured, and what differs from LoLA
# :class: dropdown
# All of this is exploratory: no rule was registered. Heads are ordered on code, and one seed of each model was measured. LoLA reads pairs by a
# softmax with the normaliser of linear attention, which a delta rule does not have. {func}`staterank_utils.lola.read_cached` adds a ridge
# regression on the cached pairs instead, so that one pair is read as one write. Cached pairs do not decay. The original form serves fla's linear
# attention with that normaliser ({func}`staterank_utils.lola.read_normalised`), and was tried on no trained model. Pairs are counted in the precision of the state,
# per value head; a write strength per pair is not counted. {glue:text}`cache_sources`
# ```

# %% [markdown] tags=["of-the-book"]
# ## Prune your own
#
# Six lines below the imports, on any model whose heads can be removed ({doc}`the list <../book/limits>`): put a folder or, with its `revision`, a hub
# id in the place of the name. `generate`, `save_pretrained` and everything else work on the pruned model, and heads keep their numbers.

# %% tags=["of-the-book"]
import tempfile

import staterank_utils as sr
from staterank_utils.selection import measure_saturation

mine, words = sr.load_model("hybrid"), sr.load_tokenizer("hybrid")
prompts = sr.domain_prompts("code", words, n_prompts=4, n_tokens=512, seed=0)
scores = measure_saturation(mine, prompts)
small = sr.prune_heads(mine, sr.select_heads(scores, share=0.389, model=mine))
folder = tempfile.mkdtemp()
_ = small.save_pretrained(folder), words.save_pretrained(folder)

# %% [markdown] tags=["of-the-book"]
# Elsewhere, `import staterank_utils` registers the class of pruned models, and `from_pretrained` does the rest, without remote code. The last line
# compares bytes of recurrent state in the two caches, and what the two lose on other code, in nats per token. By this score, over the whole model, that is
# a lot; the cheaper ways above are a layer 0 that keeps its heads, and key channels ({mod}`staterank_utils.channels`).

# %% tags=["of-the-book"]
from staterank_utils.evaluation import token_nats
from transformers import AutoModelForCausalLM

again = AutoModelForCausalLM.from_pretrained(folder)
both = {"before": mine, "after": again}
text = sr.domain_prompts("code", words, n_prompts=2, n_tokens=512, seed=1)
losses = {when: token_nats(it, text).mean() for when, it in both.items()}
{when: (footprint(it).recurrent, f"{losses[when]:.2f}") for when, it in both.items()}

# %% [markdown] tags=["of-the-book"]
# What it gives in speed is on {doc}`the page of benchmarks <../book/benchmarks>`.

# %% [markdown]
# ## Verdicts
#
# C5a asks that the joint score cost less than the best of all random draws, at 38.9 % and at the largest share that rank alone removes for at most 0.1
# nats per token; its number is what the score costs beyond that draw. Where a model without 38.9 % reads worse than token frequencies, the smaller
# share alone decides. C5 is judged by tasks, of which a model must master at least two. C5b is what the joint score costs beyond rank alone at 25 % of
# the heads over the model, where the two take different numbers of heads of layer 0. C5a and C5b are judged on text, on the measurement that the first figure shows, at doses at which the model still reads
# better than a unigram model. Added nats at which it does not: {glue:text}`ruin`.

# %% tags=["hide-input"]
verdicts = []
for name in run.models:
    verdicts += [row for row in repeated.task_claims(name, by_task[name]) if row["claim"] == "C5"]
    seed_of = {"seed": pruned[name].seed}
    verdicts += removals.one_model_claims(shown[name], name, ("C5a", "C5b"), **seed_of)
Markdown(markdown.verdict_table(verdicts))

# %% tags=["hide-input", "of-the-book"]
from staterank_utils.studies.ladder import at_its_own_share, scores_after_pruning, stored_rows

run.say({"after_pruning": f"{at_its_own_share(stored_rows())} {scores_after_pruning()}"})

# %% [markdown] tags=["of-the-book"]
# {glue:text}`after_pruning`

# %% tags=["hide-input"]
inverted, cheap, kept, large, channels = ([] for _ in range(5))
for name, found in shown.items():
    both, spare = (JOINT, RANDOM), found.spare_share()
    at = f"{found.points_in_words(removals.MODEL, both, spare)} at {spare:.1%}" if spare else ""
    ordered = bool(found.shares(removals.MODEL, removals.LOW))  # by which a share counts
    cheap.append(f"{at or ('there is no such share' if ordered else 'not measured')} ({name})")
    kept.append(f"{found.points_in_words(removals.PROTECTED, both, SHARE)} ({name})")
    cost = caching.channels_in_words(pairs.get(name), shrunk[name], SHARE)
    channels.append(f"{cost} ({name})")
    words = found.ruin_in_words(removals.MODEL, JOINT, SHARE)
    large.append({"claim": "unprotected", "model": name, "verdict": words})
    inverted.append(f"{found.near(removals.MODEL, removals.INVERTED, SHARE):.2f} ({name})")
said |= {
    "answer": f"Without {SHARE:.1%} of the heads, chosen over the model by the paper's score, a model predicts text {markdown.by_model(large, 'unprotected')}. Cheaper than all random draws at shares that count: {markdown.yes_or_no(verdicts, 'C5a')}. Nats added by the score and by random heads, where rank alone adds at most 0.1: {'; '.join(cheap)}; with layer 0 protected, at {SHARE:.1%}: {'; '.join(kept)}. As much of the key channels instead: {'; '.join(channels)}.",
    "inverted": "; ".join(inverted),
    "dearer": "; ".join(
        f"{found.dearer_draws(removals.PROTECTED, JOINT, SHARE)} ({name})"
        for name, found in shown.items()
    ),
    "sources": " ".join(found.source(name) for name, found in pruned.items()),
    "smaller_sources": " ".join(found.source(name) for name, found in smaller.items()),
    "ruin": ", ".join(f"{found.ruin:.2f} ({name})" for name, found in shown.items()),
}
run.conclude(said, verdicts, pruned, badges=("C5a", "C5"))

# %% [markdown]
# ## What this does not say
#
# How the paper removes heads, its $\alpha$, its maximum and its prompts are not known. Its 38.9 % are 448 of 1,152 heads of a model of 80
# billion parameters, judged on GSM8K. The baselines, the schemes and the reduction of channels are ours.

# %% [markdown] tags=["of-the-book"]
# The embedded models are small and read text only. Their first layer, which costs so much, has a larger part of all heads than that of the paper's model,
# 32 of 1,152. On another model:
#
# ```bash
# papermill notebooks/04_joint_rank_norm_pruning.ipynb mine.ipynb -p model OWNER/NAME -p revision COMMIT
# ```
