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
# # Do heads fall into two groups?
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
n_prompts = 0  # prompts; 0: what the profile says
n_tokens = 0  # T, tokens per prompt; 0: what the profile says
results_folder = ""  # where the result is stored; "": nowhere

# %% tags=["hide-input"]
import itertools

import numpy as np
from IPython.display import Markdown
from staterank_utils import claims, markdown, plotting, strata
from staterank_utils.studies.groups import evidence, first_claims
from staterank_utils.studies.repeated import over_seeds, repeat_groups
from staterank_utils.studies.setup import setup

run = setup(globals(), "01_stratification", n_prompts=(2, 16), n_tokens=(1024, 2048))
plotting.use_style()
loaded = {name: run.load(name) for name in run.models}
found = {
    name: repeat_groups(name, *of, domains=["prose"], **run.sizes, **run.where)
    for name, of in loaded.items()
}
shown = {name: groups.shown for name, groups in found.items()}

# %% mystnb={"figure": {"caption": "Left: half-lives of heads; in the grey window the law gives ranks between 0.2 d and 0.8 d. Right: r/d, sorted. Circles beside a stored curve: every sixth head, this run.", "name": "fig-rank-distribution"}, "image": {"alt": "Per model a histogram of half-lives on a logarithmic axis with a grey window, and sorted curves of relative rank."}} tags=["hide-input"]
VARIANTS = {"trained": "end", "before training": "initial", "shuffled": "shuffled"}
_, panels = plotting.panel_grid(len(run.models), 2, width=10, row_height=2.6, sharey=False)
for (left, right), (name, groups) in zip(panels, shown.items(), strict=True):
    d = groups["end"].d
    halves = {label: groups[VARIANTS[label]].half_life() for label in list(VARIANTS)[:2]}
    plotting.plot_half_lives(left, halves, window=groups["end"].around_gap()["window"])
    left.set_title(f"{name}: {len(groups['end'].heads)} heads, d = {d}", fontsize="medium")
    curves = {label: groups[key].relative("prose").mean(0) for label, key in VARIANTS.items()}
    live = found[name].live.relative("prose").mean(0) if found[name].made else None
    plotting.plot_rank_distribution(right, curves, live=live)
run.keep("fig-rank-distribution")

# %% [markdown]
# Read the left panels first. Each head forgets at its own rate. By the law, a rank lies between the groups only if the half-life lies in the grey window. The
# heads below and above it make the heaps at the ends of the right panels. Measured ranks follow the law, but not exactly:
#
# ```{glue:md} around
# :format: myst
# ```
#
# *State Rank Stratification* is the first finding of the paper: some heads keep a state of nearly rank 0, the others climb to an upper
# bound.
#
# ```{admonition} Where the numbers come from
# :class: dropdown
# {glue:text}`sources`
# ```
#
# ## How is rank measured?
#
# Each head $h$ of a linear-attention layer carries a matrix $S_h(t)$ of size $d_k \times d_v$, which it rewrites at every token.
# The paper counts the singular values that are not negligible beside the largest (its Eq. 6, as reported by an independent
# reader):
#
# $$ r_h(t) = \#\{\, i : \sigma_i(S_h(t)) > \varepsilon\, \sigma_1 \,\}, \quad \varepsilon = 10^{-4}. $$ (eq-effective-rank)
#
# Write $d$ for the largest rank a state can have, $\min(d_k, d_v)$. Ranks are taken on technical prose, Python's reference manual. No embedded
# model was trained on such text, and they predict it far worse than code ({doc}`02_input_invariance` has the losses). Why a half-life predicts a rank is the subject of {doc}`00_what_rank_measures`.
#
# ## Are there two groups?
#
# The eye finds groups everywhere, so three numbers were registered before any embedded model was trained, on the distribution of
# $r/d$ over heads at the last token:
#
# - Sarle's coefficient over 5/9, the value of a uniform distribution;
# - Hartigan's dip test with $p < 0.05$ against a single group;
# - at least two thirds of the heads outside (0.2, 0.8).
#
# The first two are weak alone: a skewed single group can pass Sarle's, and many ties help the dip test. So all three must hold, each with
# its whole interval over prompts. That interval does not cover the choice of heads, or another training.
#
# Two controls ask where the groups come from. *Before training*: the weights that the training began with (for a model that is not embedded, fresh
# weights of its class). *Shuffled*: the trained weights in random order inside each tensor, so that their values are kept, those of the gates too, and their places
# are not; one draw. If a control passes as well, the groups need no more than the recurrence and values of its gates. And rows on code and arithmetic, where they were
# measured, ask whether the groups are those of prose alone.

# %% tags=["hide-input"]
numbers = {
    (name, label): evidence(shown[name][key])
    for name in run.models
    for label, key in VARIANTS.items()
}
numbers |= {
    (name, f"trained, on {kind}"): evidence(shown[name]["end"], kind)
    for name in run.models
    for kind in ("code", "arithmetic")
    if kind in shown[name]["end"].rank
}
rows, passing, untrained = [], [], []
for (name, label), of in numbers.items():
    rule = {"verdict": "registered on prose"}
    if label in VARIANTS:
        [rule] = first_claims(name, shown[name][VARIANTS[label]], initial=None, keys=["C1"])
    rows.append(
        (name, label, *itertools.starmap(markdown.three_digits, of.items()), rule["verdict"])
    )
    untrained.append({"claim": label, "model": name, "verdict": rule["verdict"]})
    if label != "trained" and rule["verdict"] == claims.HOLDS:
        passing.append(f"{label} ({name})")
HEAD = ("model", "weights", *next(iter(numbers.values())), "C1's rule")
Markdown(markdown.markdown_table(HEAD, rows))

# %% [markdown]
# *Share outside* counts the heads outside (0.2, 0.8); a single group of full rank scores 1 in it. The *two-group share* is the smaller of the
# shares below 0.2 and above 0.8, so it needs both. *By law* says what decays alone give.
#
# Controls that pass C1 as well: {glue:text}`controls_pass`. Where one does, or where only its interval misses, the rule hardly tells a trained model
# from an untrained one. The two-group share needs both heaps; training took it {glue:text}`two_group_change`.
#
# Whether training decided *who is in which group* is claim C1c. Its measure is the Spearman correlation between the ranks of the same heads
# before and after training, on the same prompts: {glue:text}`rho_initial`. The higher it is, the more of the order was there before
# training.

# %% mystnb={"figure": {"caption": "r/d of each head before training (horizontal) and after (vertical), same prompts. Dots end high, squares low. On the dotted diagonal training changed nothing.", "name": "fig-init"}, "image": {"alt": "Scatter of relative rank before against after training with a dotted diagonal, one panel per model."}} tags=["hide-input"]
known = [name for name in run.models if found[name].known_start]
for name, ax in (plotting.model_panels(known, height=4.2) if known else {}).items():
    before, after = (shown[name][key].relative("prose").mean(0) for key in ("initial", "end"))
    ax.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    high = after >= strata.LOW_UNDER
    names = {"xlabel": "r / d before training", "ylabel": "r / d after"}
    plotting.plot_head_pairs(ax, before, after, high, **names)
if known:
    run.keep("fig-init")

# %% [markdown]
# ## How do ranks grow?
#
# After $t$ tokens at most $t$ directions can have been written, so $r_h(t) \le \min(t, d)$: the dotted line below. The paper draws this
# for one layer of 32 heads; here are all layers, read by this run, {glue:text}`setting`. Each prompt is read once. At the positions below the
# state of every head is reduced to its singular values, and nothing else is kept:

# %%
from staterank_utils import Spectrum, domain_prompts, singular_values, trace_states

T = run.sizes["n_tokens"]
positions = [2**i for i in range(11) if 2**i < T] + [T]
traces, prompts = {}, {}
for name, (network, tokenizer) in loaded.items():
    prompts[name] = domain_prompts("prose", tokenizer, **run.sizes)
    traces[name] = trace_states(
        network, prompts[name], positions=positions, reduce=singular_values
    )

# %% mystnb={"figure": {"caption": "Effective rank of every head against tokens read, one panel per layer, mean over prompts, this run. Solid with dots: heads that end high. Dashed with squares: low. Dotted: min(t, d).", "name": "fig-ranks-over-time"}, "image": {"alt": "Panels of lines rising from rank 1 at one token, some along the bound min(t, d), others levelling off below it."}} tags=["hide-input"]
spectra = {name: Spectrum(trace.values) for name, trace in traces.items()}
ranks = {name: spectrum.effective_rank().double().mean(1) for name, spectrum in spectra.items()}
plotting.plot_all_ranks(traces, {name: table.numpy() for name, table in ranks.items()})
run.keep("fig-ranks-over-time")

# %% [markdown]
# The bound (claim C1b, the paper's Theorem 3.1) is a fact of linear algebra: a sum of $t$ matrices of rank 1. What can break
# it is arithmetic, since rounding writes in directions that no token chose, and it can show only while $t < d$. So this run looks at every head
# after every token until then: {glue:text}`bound_violations` violations.
#
# ## Does it depend on the threshold?
#
# $\varepsilon = 10^{-4}$ is a choice. Singular values fall off smoothly, so a head of full rank at one threshold may be nearly empty at
# another. In float32 a state carries noise of about $10^{-7}\sigma_1$, so $10^{-6}$ is as low as a threshold can go.

# %% mystnb={"figure": {"caption": "Sorted r/d over heads at the last token for five thresholds, this run. The thick line is the registered threshold. If a bundle sinks, its rank was in small singular values.", "name": "fig-eps"}, "image": {"alt": "Five sorted curves of relative rank, one for each threshold from 1e-2 to 1e-6."}} tags=["hide-input"]
SHARES = {"share outside": strata.share_outside, "two-group share": strata.two_group_share}
at_end = {name: Spectrum(trace.values[:, :, -1]) for name, trace in traces.items()}
by_eps, violations = {}, []
for name, ax in plotting.model_panels(run.models).items():
    d, curves = traces[name].d, {}
    for eps in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        table = at_end[name].effective_rank(rel_tol=eps).double()
        curves[eps] = (table.mean(1) / d).flatten().numpy()
    plotting.plot_thresholds(ax, curves, registered=1e-4)
    by_eps[name] = {
        f"{label}, threshold {eps:g}": f"{share(curve):.2f}"
        for label, share in SHARES.items()
        for eps, curve in curves.items()
    }
    every = range(1, min(d, T) + 1)
    texts = prompts[name][:, : every[-1]]
    early = trace_states(loaded[name][0], texts, positions=every, reduce=singular_values).values
    early = Spectrum(early).effective_rank().numpy()
    broken = (early > np.array(every)[:, None]).sum()
    violations.append(f"{broken} in {early.size:,} states ({name})")
run.keep("fig-eps")

# %% [markdown]
# Shares of this run, {glue:text}`setting`. C1 asks for two thirds outside, at $10^{-4}$ alone, and depends on that choice: groups that are clear at one threshold need not be
# at another. Two measures need no threshold. The *stable rank*
# $\|S\|_F^2/\sigma_1^2$ weighs a direction by its energy, the *entropy rank* $\exp H(\sigma/\sum\sigma)$ by its share of the nuclear
# norm. The last two rows have their Spearman with the effective rank (exploratory):
#
# ```{glue:md} by_eps
# :format: myst
# ```
#
# ## Verdicts
#
# By {doc}`the registered rules <../book/claims>`, on the measurement that the first figure shows: for an embedded model the stored one
# ({doc}`ladder <../book/ladder>`).

# %% tags=["hide-input"]
verdicts = []
for name, groups in found.items():
    end, initial = groups.shown["end"], groups.initial
    c1, c1c = first_claims(name, end, initial=initial, keys=("C1", "C1c"))
    verdicts += [c1, groups.turning.claims(name)[0], c1c]
Markdown(markdown.verdict_table(verdicts))

# %% tags=["hide-input"]
outside, spearmans, changes, around = [], [], [], {}
for name, groups in shown.items():
    before, after = numbers[name, "before training"], numbers[name, "trained"]
    both = [groups[key].rank["prose"].mean(0) for key in ("initial", "end")]
    outside.append(f"{after['share outside']:.0%} ({name})")
    pair = [f"{of['two-group share']:.2f}" for of in (before, after)]
    if found[name].known_start:
        spearmans.append(f"{strata.exactly(strata.spearman(*both)):.2f} ({name})")
        changes.append(f"from {pair[0]} to {pair[1]} ({name})")
    else:
        changes.append(f"to {pair[1]}, and fresh weights of its class have {pair[0]} ({name})")
    rows = {"spread": "half-lives of nine heads in ten, tokens", "window": "grey window, tokens"}
    rows |= {"sides": "heads below and above the window"}
    around[name] = {}
    for key, (low, high) in groups["end"].around_gap().items():
        form, word = (".0%", "and") if key == "sides" else (".3g", "to")
        words = f"{low:{form}} {word} {high:{form}}" if high < np.inf else "without end"
        around[name][rows[key]] = words
    n_between, n_window = groups["end"].between()
    of_these = f"{n_window} of {n_between}"
    around[name]["heads with a rank between the groups that lie in the window"] = of_these
    for key in ("entropy_rank", "stable_rank"):
        tables = (getattr(at_end[name], key)(), at_end[name].effective_rank())
        rho = strata.spearman(*(x.double().mean(1).flatten() for x in tables))
        by_eps[name][f"Spearman of the {key.replace('_', ' ')}"] = f"{strata.exactly(rho):.2f}"

# %% tags=["hide-input"]
trainings = over_seeds(run.models, "C1")
beyond = (
    f" So the rule alone does not show that training made the groups: these meet it too: {', '.join(passing)}."
    if passing
    else ""
)
start = "before training" if spearmans else "with fresh weights of the class"
said = {
    "around": around,
    "by_eps": by_eps,
    "answer": f"Two groups, by the registered rule: {markdown.yes_or_no(verdicts, 'C1')}.{trainings} Heads with a rank under 0.2 d or over 0.8 d: {', '.join(outside)}. The same rule {start}: {markdown.yes_or_no(untrained, 'before training')}; with shuffled weights: {markdown.yes_or_no(untrained, 'shuffled')}.{beyond} The smaller group's share went in training {'; '.join(changes)}.",
    "sources": " ".join(groups.source(name) for name, groups in found.items()),
    "controls_pass": ", ".join(passing) or "none",
    "two_group_change": "; ".join(changes),
    "rho_initial": "; ".join(spearmans) or "not measured, those weights are not known",
    "bound_violations": "; ".join(violations),
    "setting": "{n_prompts} prompts of {n_tokens:,} tokens (seed {seed})".format(**run.sizes),
}
run.conclude(said, verdicts, found, badges=("C1", "C1b", "C1c"))

# %% [markdown]
# ## What this does not say
#
# The paper shows one layer of Qwen3-Next-80B-A3B, as an independent reader reports. Here are all layers of the models above, on one domain. The controls are our additions.

# %% [markdown] tags=["of-the-book"]
# The embedded models are some thousands of times smaller, and nothing follows for the large one until this page is run on it. Their gates began spread
# over many half-lives, as in Mamba-2, and not as the class of Qwen3-Next sets them. That puts a part of the order there before training; models whose
# gates begin otherwise are on {doc}`the ladder <../book/ladder>`. How Qwen3-Next was begun is not known. And one training is one draw: the embedded
# `hybrid`, trained again from the same seed on another GPU, got a weaker verdict here.
#
# The pair was also chosen for holding C1 and C3 ({doc}`models <../book/models>`), so its verdicts are no unbiased sample. To run it on several GPUs:
#
# ```bash
# papermill notebooks/01_stratification.ipynb mine.ipynb -p profile full \
#     -p model Qwen/Qwen3-Next-80B-A3B-Instruct -p revision COMMIT -p device auto
# ```
