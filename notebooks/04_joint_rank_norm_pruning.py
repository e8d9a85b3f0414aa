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

# %% [markdown]
# # Can 38.9 % of the state be removed?
#
# *Claim C5 of {doc}`the registered list <../book/claims>`.* The paper takes out the heads whose states are most saturated, by rank and
# norm together, without any training afterwards: 38.9 % of the recurrent state goes, and accuracy is said to stay. Here heads are cut
# out of the weights for good. On this page you see, for models that your own machine has just pruned:
#
# - what is freed: bytes of the tensors in the cache, before and after;
# - what is kept, beside every cheaper or cleverer way to the same size: random heads, rank alone, norm alone, the order reversed,
#   decay, heads that do least damage alone, fewer channels of keys, or both, and what some training brings back;
# - how to prune a model of your own in six lines, save it, and load it elsewhere.

# %% tags=["remove-cell"]
import importlib.util
import os

from IPython import get_ipython

if importlib.util.find_spec("staterank_utils") is None:
    # On Colab: fetch the repository, with its models, and work in it.
    get_ipython().system("git clone --depth 1 https://github.com/staterank/staterank-book")
    get_ipython().system("pip install -q ./staterank-book myst-nb")
    os.chdir("staterank-book")

# %%
from itertools import product
from pathlib import Path

import numpy as np
import torch
from IPython.display import Markdown
from myst_nb import glue
from staterank_utils import (
    ablation,
    claims,
    load_model,
    load_tokenizer,
    markdown,
    plotting,
    results,
    saturation_scores,
    select_heads,
)
from staterank_utils.channels import keep_channels, order_channels, why_not
from staterank_utils.evaluation import (
    arithmetic_task,
    copying_task,
    needle_task,
    recall_task,
    score_interval,
    text_nats,
)
from staterank_utils.models import make_cache, read_tokens
from staterank_utils.pruning import cache_bytes, duplicated_bytes, removed_heads
from staterank_utils.strata import Estimate, bootstrap, exactly
from staterank_utils.surgery import ablate_heads
from staterank_utils.tasks import NATURAL_DOMAINS

plotting.use_style()

# %% tags=["parameters"]
model = "hybrid, pure"  # embedded names, folders or hub ids, separated by commas
revision = ""  # commit or tag, for hub ids
device = ""  # "": the GPU if there is one; "cpu", "cuda", or "auto": spread over all GPUs
profile = "quick"  # "quick" or "full"
seed = 0
n_prompts = 0  # prompts a task; 0: what the profile says
n_draws = 0  # draws of random heads; 0: what the profile says
results_folder = ""  # where the result is stored; "": nowhere

# %% tags=["hide-input"]
results.check_parameters(
    globals(),
    texts="model revision device profile results_folder".split(),
    numbers="seed n_prompts n_draws".split(),
)
MODELS = [name.strip() for name in model.split(",")]
WHERE = {"revision": revision or None, "device": device or None}
SHARE = ablation.PAPER_SHARE
QUICK = {"quick": True, "full": False}[profile]
N_PROMPTS = n_prompts or (6 if QUICK else 500)
N_DRAWS = n_draws or (8 if QUICK else 32)
SIZES = {
    "n_prompts": N_PROMPTS,
    "n_graded": 2 if QUICK else 16,
    "batch_size": 16 if QUICK else 250,
    "calibration": (4, 512) if QUICK else (16, 2048),
}
TASKS = {
    "needle": needle_task(3, 192 if QUICK else 1000),
    "arithmetic": arithmetic_task(2, 4 if QUICK else 6),
    "recall": recall_task(),
    "copying": copying_task(24, 48) if QUICK else copying_task(),
}
FULL_SHARES = (0.05, 0.10, 0.125, 0.25, SHARE, 0.5)
SHARES = (0.05, 0.125, SHARE) if QUICK else FULL_SHARES
CURVE_DRAWS = 2 if QUICK else 8
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
N_TEXTS, TEXT_TOKENS = (2, 128) if QUICK else (32, 1024)
PARAMETERS = {
    "model": model,
    "revision": revision,
    "profile": profile,
    "seed": seed,
    "n_prompts": N_PROMPTS,
    "n_draws": N_DRAWS,
}

# %% [markdown]
# ## Which heads are saturated?
#
# The paper calls a head saturated where its state has a high effective rank $\bar r_h$ and a large nuclear norm $\bar n_h$, both means
# over calibration prompts, and adds the two on a common scale (its Eq. 14):
#
# $$ s_h \;=\; \alpha\, \frac{\bar r_h}{d} \;+\; (1 - \alpha)\, \frac{\bar n_h}{\max_j \bar n_j}. $$ (eq-saturation)
#
# The heads with the highest $s_h$ go. Neither $\alpha$ nor whether the maximum runs over a layer or the model is published;
# registered are $\alpha = 0.5$ and the model, and other values are looked at below. Calibration is held-out code and arithmetic
# stories, which share no text with the prompts that are scored; windows of code on which perplexity is taken may overlap with them.

# %%
studies, saturation, tables = {}, {}, results.Tables()
for name in MODELS:
    pair = load_model(name, **WHERE), load_tokenizer(name, revision=WHERE["revision"])
    study = studies[name] = ablation.Ablation(*pair, TASKS, seed=seed, **SIZES)
    print(f"{name}:\n{study.budget}\nlater up to three pruned copies of these weights at once")
    ranks, norms = study.measures["effective rank"], study.measures["nuclear norm"]
    saturation[name] = saturation_scores(ranks, norms, d=study.d)

# %% tags=["hide-input"]
glue("paper_share", f"{SHARE:.1%}", display=False)
glue("n_prompts", f"{N_PROMPTS}", display=False)
glue("n_draws", f"{N_DRAWS}", display=False)
glue("curve_draws", f"{CURVE_DRAWS}", display=False)


def heads_at(scores, share=SHARE, **options):
    """`select_heads` as pairs (layer, head)."""
    chosen = select_heads(scores, share=share, **options)
    return [(layer, head) for layer, heads in chosen.items() for head in heads]


rows = []
for name, study in studies.items():
    gone = [layer for layer, _ in heads_at(saturation[name])]
    layers = sorted({layer for layer, _ in study.heads})
    rows.append(
        (
            name,
            f"{len(gone)} of {len(study.heads)}",
            ", ".join(f"{gone.count(i)} of layer {i}" for i in layers),
        )
    )
Markdown(tables.keep("Heads removed", ("model", "heads removed", "by layer"), rows))

# %% mystnb={"figure": {"caption": "Every head by its relative effective rank and relative nuclear norm on the calibration prompts, one panel per model. Crosses: the 38.9 % of highest saturation, which are removed; circles: those that stay. If rank and norm told the same, the heads would lie on a line and one of the two would do.", "name": "fig-saturation"}, "image": {"alt": "Scatter of rank against norm, one panel per model, removed heads as crosses at the upper right."}} tags=["hide-input"]
for name, ax in plotting.model_panels(MODELS).items():
    study, gone = studies[name], set(heads_at(saturation[name]))
    norm = study.values("nuclear norm")
    removed = np.array([head in gone for head in study.heads])
    plotting.plot_selection(
        ax, study.values("effective rank") / study.d, norm / norm.max(), removed
    )
    ax.set_title(name, fontsize="small")
    ax.legend(fontsize="small", frameon=False, loc="upper left")

# %% [markdown]
# ## What is freed?
#
# A mask frees nothing: the state is still there, full of numbers that nobody reads. {func}`staterank_utils.pruning.prune_heads` cuts a
# head out of every weight that has a part for it, so the cache has no room for it either, and the layers do less. The numbers are
# bytes of real tensors: one prompt of 1,024 tokens, read through the cache. Keys and values of softmax layers grow by
# the same bytes a token, so those at 32,768 tokens follow from two lengths.


# %%
def reads(smaller, n_tokens):
    """The cache behind a prompt of so many tokens."""
    ids, cache = torch.ones(1, n_tokens, dtype=torch.long), make_cache(smaller)
    with torch.inference_mode():
        read_tokens(smaller, ids.to(smaller.device), cache=cache)
    return cache


def freed(smaller, whole):
    """Bytes of a cache and of weights; the first number is the share of the recurrent state's bytes that is gone."""
    half, full = (cache_bytes(reads(smaller, n)) for n in (512, 1024))
    at_32k = full["softmax"] + (full["softmax"] - half["softmax"]) * (32768 - 1024) // 512
    kib = [full["recurrent"], full["convolution"], full["softmax"], at_32k]
    weights = sum(p.nbytes for p in smaller.parameters()) / 2**20
    row = [*(f"{x / 1024:,.1f}" for x in kib), f"{weights:.2f}"]
    return (
        1 - full["recurrent"] / whole["recurrent"],
        *row,
        f"{duplicated_bytes(smaller) / 2**20:.2f}",
    )


# %% [markdown]
# The same share can be taken from the other side. A state has $d_k$ rows, one for each channel of the keys; where keys leave directions
# empty, channels can go and every head stays. Which, a rank-revealing QR decomposition of the keys says, after Nazari and Rusch
# ([arXiv:2602.04852](https://arxiv.org/abs/2602.04852)); {mod}`staterank_utils.channels` is our own, made from the method's description. "Both"
# takes the same part from heads and from channels, so that the product of what stays is the same.


# %%
refused = {name: why_not(study.model) for name, study in studies.items()}
channels = {
    name: order_channels(study.model, study.calibration_prompts)
    for name, study in studies.items()
    if refused[name] is None
}
said = "\n".join(f"- *{name}: {why}*" for name, why in refused.items() if why)
Markdown(said) if said else None


# %%
def with_channels(name, share):
    return keep_channels(studies[name].model, channels[name], share=share)


def with_both(name, share):
    half = 1 - (1 - share) ** 0.5
    return keep_channels(
        studies[name].pruned(heads_at(saturation[name], half)), channels[name], share=half
    )


# %% tags=["hide-input"]
rows, freed_share = [], {}
for name, study in studies.items():
    whole = cache_bytes(reads(study.model, 1024))
    variants = {"whole": study.model, "joint": study.pruned(heads_at(saturation[name]))}
    if name in channels:
        variants |= {"key channels": with_channels(name, SHARE), "both": with_both(name, SHARE)}
    for label, smaller in variants.items():
        share, *sizes = freed(smaller, whole)
        freed_share[name, label] = share
        rows.append((f"{name}: {label}", f"{share:.1%}", *sizes))
HEAD = ("model", "state freed", "state, KiB", "convolution, KiB", "softmax at 1k, KiB")
HEAD += ("softmax at 32k, KiB", "parameters, MiB", "of these duplicated, MiB")
Markdown(tables.keep("Bytes", HEAD, rows))

# %% [markdown]
# Two remarks on that table. In a hybrid the softmax layers' keys and values outgrow the states within some hundred tokens, so a share
# of the state is a smaller share of the cache, and less the longer the text. And heads that share a key head cannot always leave
# without a copy of it: that is the last column.
#
# A removed head must compute what an ablated one does. Largest difference of any logit on a prompt of code, in the dtype that the model has
# here:

# %%
rows = []
for name, study in studies.items():
    gone, ids = heads_at(saturation[name]), study.prompts("code", 1, 300).to(study.model.device)
    with torch.inference_mode(), ablate_heads(study.model, gone):
        masked = study.model(ids).logits
    with torch.inference_mode():
        difference = (study.pruned(gone)(ids).logits - masked).abs().max().item()
    dtype = str(masked.dtype).removeprefix("torch.")
    rows.append((name, dtype, f"{difference:.1e}", f"{masked.abs().max().item():.1f}"))
HEAD = ("model", "dtype", "largest difference", "largest logit")
Markdown(tables.keep("Removed = ablated", HEAD, rows))

# %% [markdown]
# ## What is kept at the paper's share?
#
# Every order below removes the same number of heads. "Least damage alone" knows more than the others: each head was removed
# alone, once, on other prompts of the tasks themselves, and those that cost least go first. Random draws are what any order must beat to be one:
# {glue:text}`n_draws` of them. Whole heads and whole channels come near the paper's share, not exactly on it; the table of bytes says how near. Registered are joint pruning at this share and, beside it, random draws and arms by decay, norm and write strength. Every
# other method, share and perplexity on this page is exploratory, and so is recovery.


# %%
def reverse(measure):
    return {head: -value for head, value in measure.items()}


def orders(name):
    rank, norm, decay, writes = studies[name].measures.values()
    joint = saturation[name]
    by_state = {"joint": joint, "rank alone": rank, "norm alone": norm}
    reversed_ = {f"{label}, reversed": reverse(order) for label, order in by_state.items()}
    ordered = by_state | reversed_ | {"fastest decay": reverse(decay), "strongest writes": writes}
    if studies[name].mastered:  # else there is no right answer to damage
        alone = studies[name].sweep(seed=1001)
        ordered["least damage alone"] = {
            h: -loss[ablation.MEAN].point for h, loss in alone.items()
        }
    return ordered


order = {name: orders(name) for name in MODELS}
OTHERS = {"key channels": with_channels, "both": with_both}
METHODS = {name: [*order[name], *(OTHERS if name in channels else ())] for name in MODELS}

# %% tags=["hide-input"]
MEASURED = {}


def smaller_model(name, method, share):
    if method in OTHERS:
        return OTHERS[method](name, share)
    if method.startswith("random draw"):
        n = len(heads_at(saturation[name], share))
        return studies[name].pruned(studies[name].drawn(n, int(method.split()[-1])))
    return studies[name].pruned(heads_at(order[name][method], share))


def scores_without(name, method, share=SHARE):
    """Scores on the tasks that count, each measured once."""
    study, key = studies[name], (name, method, share)
    if method not in OTHERS:
        gone = heads_at(order[name][method], share)
        return {task: study.score(task, gone, kind="removed") for task in study.mastered}
    if key not in MEASURED:
        MEASURED[key] = study.scores_of(smaller_model(*key))
    return MEASURED[key]


def kept(name, method, share=SHARE):
    """Score over that of the intact model."""
    return studies[name].over_intact(scores_without(name, method, share))


def at_random(name, share, n_draws):
    """Mean of random draws over the score of the intact model, and each draw's."""
    study, n = studies[name], len(heads_at(saturation[name], share))
    draws = {task: study.draws(task, n, n_draws) for task in study.mastered}
    each = [
        np.mean([x[i].mean() / study.score(t).mean() for t, x in draws.items()])
        for i in range(n_draws)
    ]
    return study.over_intact({task: x.mean(0) for task, x in draws.items()}), each


# %% [markdown]
# Accuracy is that of the four tasks of {doc}`the chapter before <03_ablation_asymmetry>`, {glue:text}`n_prompts` prompts each, answered by
# greedy generation and scored exactly: score over that of the intact model, mean over the tasks that the intact model
# masters, which may be fewer for one model than for the other. Scores of random draws are those of heads silenced and not cut out, which comes to the
# same. The intact models' scores:

# %% tags=["hide-input"]
rows = [
    (name, *(str(score_interval(study.score(task))) for task in TASKS))
    for name, study in studies.items()
]
Markdown(tables.keep("Intact models", ("model", *TASKS), rows))

# %% mystnb={"figure": {"caption": "Score over that of the intact model after 38.9 % of the state is gone, mean over the tasks that count, with 95 % intervals over prompts, one row a method and one panel per model. Grey lines: random draws of as many heads, one line per draw. Dotted: nothing lost. The claim holds if the first row lies at 0.95 or more, right of every grey line.", "name": "fig-methods"}, "image": {"alt": "Rows of pruning methods with intervals against grey lines of random draws, one panel per model."}} tags=["hide-input"]
for name, ax in plotting.model_panels(MODELS, height=4).items():
    study = studies[name]
    ax.set_title(name if study.mastered else f"{name}: no task counts", fontsize="small")
    if study.mastered:
        estimates = {method: kept(name, method) for method in METHODS[name]}
        plotting.plot_arms(ax, estimates, draws=at_random(name, SHARE, N_DRAWS)[1], intact=1.0)
    ax.set_xlabel("score / intact score")

# %% [markdown]
# ## How does it fall?
#
# One share is one point. A curve says whether there is a knee, and whether another order would reach 38.9 % at no loss. Its random draws
# are {glue:text}`n_draws` at that share and {glue:text}`curve_draws` at the others, too few to say how far single draws lie apart. "Both" cuts channels of a jointly pruned
# model; channels beside heads of least damage were not tried.

# %%
curves = {}
for name, study in studies.items():
    if study.mastered:
        curves[name] = {
            method: [kept(name, method, share) for share in SHARES] for method in METHODS[name]
        }
        n_draws_at = {share: N_DRAWS if share == SHARE else CURVE_DRAWS for share in SHARES}
        curves[name]["random, mean"] = [at_random(name, *item)[0] for item in n_draws_at.items()]
BY_STATE = [m for m in order[MODELS[0]] if m.startswith(("joint", "rank", "norm"))]
BESIDE = ("joint", "fastest decay", "strongest writes", "least damage alone", *OTHERS)


# %% mystnb={"figure": {"caption": "Score over that of the intact model against the share of the state that is removed, one curve for each way to order heads by their state, one panel per model; the band is the 95 % interval of joint rank-norm pruning over prompts. Thick grey: the mean of random draws. A curve above it knows something of which heads can go; a curve below it chooses worse than chance.", "name": "fig-curve-state"}, "image": {"alt": "Falling curves of relative score against the share removed, one curve for each rule by state and its reverse, beside a thick grey line of random draws."}} tags=["hide-input"]
def draw_curves(curves, shares, methods):
    for name, ax in plotting.model_panels(list(curves) or MODELS).items():
        ax.axhline(1, color="black", linewidth=1, linestyle=":")
        found = curves.get(name, {})
        if found:
            random = [estimate.point for estimate in found["random, mean"]]
            ax.plot(
                [100 * share for share in shares],
                random,
                color="0.7",
                linewidth=4,
                zorder=0,
                label="random, mean",
            )
            plotting.plot_methods(ax, shares, {m: found[m] for m in methods if m in found})
        ax.set(title=name, ylabel="score / intact score", ylim=(-0.05, 1.1))
    plotting.legend_above(ax.figure)


draw_curves(curves, SHARES, BY_STATE)

# %% mystnb={"figure": {"caption": "As the figure before, for what knows more or shrinks the state from the other side. A curve that stays at 1 is free.", "name": "fig-curve"}, "image": {"alt": "Falling curves of relative score against the share removed: joint pruning, decay, write strength, least damage alone, key channels, both, beside a thick grey line of random draws."}} tags=["hide-input"]
draw_curves(curves, SHARES, BESIDE)

# %% tags=["remove-cell"]
# The numbers behind a figure go with the stored result.
rows = [
    (name, method, *map(str, estimates))
    for name, methods in curves.items()
    for method, estimates in methods.items()
]
HEAD = ("model", "method", *(f"{share:.1%} removed" for share in SHARES))
_ = tables.keep("Score over intact, by share removed", HEAD, rows)

# %% [markdown]
# Scores are coarse: a task is right or wrong. Perplexity changes by degrees, and needs no mastery. It is taken over held-out
# prose, code, arithmetic stories and retrieval prompts together, the same number of tokens each. These models read text poorly, so a model
# without some heads can even read it better; a ratio near 1 says that text was not what was lost. The full profile's table has this curve
# for every method.


# %%
def times_intact(smaller, name):
    """Perplexity over that of the intact model, on the same texts; each choice of heads measured once."""
    gone = str(removed_heads(smaller.config))
    key = name, gone, sum(p.numel() for p in smaller.parameters())
    if key not in ADDED:
        ADDED[key] = text_nats(smaller, texts[name]) - intact[name]
    return bootstrap(ablation.perplexity, ADDED[key])


DRAWS = [f"random draw {i}" for i in range(CURVE_DRAWS)]
PLOTTED = ("joint", "norm alone", "fastest decay", "least damage alone", "key channels")
perplexities, texts, intact, ADDED = {}, {}, {}, {}
for name, study in studies.items():
    parts = [study.prompts(domain, N_TEXTS, TEXT_TOKENS, seed=2) for domain in NATURAL_DOMAINS]
    texts[name] = torch.cat(parts)
    intact[name] = text_nats(study.model, texts[name])
    methods = [method for method in METHODS[name] if method in PLOTTED or not QUICK]
    perplexities[name] = {
        method: [times_intact(smaller_model(name, method, share), name) for share in SHARES]
        for method in (*methods, *DRAWS)
    }

# %% tags=["hide-input"]
ratios = ", ".join(f"{ablation.perplexity(nats):.1f} ({name})" for name, nats in intact.items())
glue("intact", ratios, display=False)

# %% mystnb={"figure": {"caption": "Perplexity of held-out text over that of the intact model against the share of the state that is removed, logarithmic, one curve a method, one panel per model; the band is the 95 % interval of joint rank-norm pruning over prompts. Dotted: nothing lost; lower is better.", "name": "fig-perplexity"}, "image": {"alt": "Rising curves of perplexity against the share removed, one curve a method."}} tags=["hide-input"]
for name, ax in plotting.model_panels(MODELS).items():
    ax.axhline(1, color="black", linewidth=1, linestyle=":")
    of_draws = zip(*(perplexities[name][draw] for draw in DRAWS), strict=True)
    random = [exactly(np.exp(np.mean([np.log(e.point) for e in each]))) for each in of_draws]
    drawn = {method: perplexities[name][method] for method in PLOTTED if method in METHODS[name]}
    plotting.plot_methods(ax, SHARES, drawn | {"random, mean": random})
    ax.set(title=name, ylabel="perplexity / intact perplexity", yscale="log")
plotting.legend_above(ax.figure)

# %% tags=["remove-cell"]
rows = [
    (name, method, *(f"{estimate:.3g}" for estimate in estimates))
    for name, methods in perplexities.items()
    for method, estimates in methods.items()
]
_ = tables.keep("Perplexity over intact, by share removed", HEAD, rows)

# %% [markdown]
# What the paper's share costs, method by method: "freed" is read off the cache; scores are of each task, not over the intact ones, then comes their mean over
# the intact scores, and perplexity:


# %% tags=["hide-input"]
whole = {name: cache_bytes(reads(studies[name].model, 64))["recurrent"] for name in MODELS}


def cost(name, method):
    smaller = smaller_model(name, method, SHARE)
    left = cache_bytes(reads(smaller, 64))["recurrent"]
    scored = studies[name].mastered and method not in DRAWS
    scores = scores_without(name, method) if scored else {}
    found = [f"{score_interval(scores[task])}" if task in scores else "" for task in TASKS]
    mean = str(kept(name, method)) if scored else ""
    return f"{1 - left / whole[name]:.1%}", *found, mean, f"{times_intact(smaller, name):.3g}"


rows = [
    (name, method, *cost(name, method)) for name in MODELS for method in (*METHODS[name], *DRAWS)
]
HEAD = ("model", "method", "freed", *TASKS, "score / intact", "perplexity / intact")
Markdown(tables.keep("What 38.9 % costs", HEAD, rows))

# %% [markdown]
# ## Would another $\alpha$ do better?
#
# The paper's $\alpha$ is not known, nor the range of the maximum in {eq}`eq-saturation`. So here is every reading at the paper's share, exploratory: the best
# of these was chosen after looking, and says nothing about a new model. $\alpha = 1$ is rank alone, whatever the maximum. Numbers are
# perplexities over that of the intact model on the same texts as in {numref}`fig-perplexity`, since scores may lie on the floor; the intact models'
# are {glue:text}`intact`.

# %%
rows = []
for name, study in studies.items():
    ranks, norms = study.measures["effective rank"], study.measures["nuclear norm"]
    for maximum, per_layer in product(("model", "layer"), (False, True)):
        numbers = []
        for alpha in ALPHAS:
            scores = saturation_scores(ranks, norms, d=study.d, alpha=alpha, maximum=maximum)
            gone = heads_at(scores, per_layer=per_layer)
            numbers.append(f"{times_intact(study.pruned(gone), name):.3g}")
        rows.append((name, maximum, "a layer" if per_layer else "the model", *numbers))
HEAD = ("model", "maximum over", "share of", *(f"α = {alpha:g}" for alpha in ALPHAS))
Markdown(tables.keep("Perplexity over intact, every reading of Eq. 14", HEAD, rows))

# %% [markdown]
# ## Is it knowledge that went, or balance?
#
# If a few hundred steps of training bring the scores back, the heads that went took no knowledge with them that the rest does not have
# or cannot quickly learn again; what was lost was mostly the balance between those that stayed. `training/recover.py` trains pruned models
# on a GPU, each with the same new batches, and the whole model beside them: only what comes on top of what that one gains is
# recovery. These rows are stored, not measured by this run; one training each, one random draw, one learning rate, none of them tuned, so a
# method that recovers has shown something, and one that does not has shown little. Where at least half of the loss came back, beyond what the whole model gained, we call
# it balance, for the most part (a border set after the first look, and exploratory). Score over intact of the jointly pruned models:
# {glue:text}`recovered`.

# %% tags=["hide-input"]
rows = [row for name in MODELS for row in results.stored_recovery(name)]
points = {row[:2]: [Estimate.parse(score).point for score in row[3:5]] for row in rows}
said = []
for name in (name for name, arm in points if arm == "joint"):
    (before, after), (whole, trained) = points[name, "joint"], points[name, "whole"]
    came_back = (after - before - (trained - whole)) / (whole - before)
    meaning = "balance, for the most part" if came_back >= 0.5 else "not balance alone"
    said.append(f"{name} from {before:.3f} to {after:.3f}: {meaning}")
glue("recovered", "; ".join(said) or "no recovery of these models is stored", display=False)
HEAD = (
    "model",
    "removed by",
    "heads",
    "score / intact, before",
    "after",
    "bits a byte, before",
    "after",
)
Markdown(
    markdown.markdown_table(HEAD, rows) if rows else "*No recovery of these models is stored.*"
)

# %% [markdown]
# ## Verdict
#
# Registered: the score over that of the intact model is at least 0.95 with its whole interval, and above every random draw; in part if
# it is at least 0.80 and above the mean of the draws. The lead over the draws has an interval too, over prompts and draws.

# %%
verdicts = []
for name, study in studies.items():
    gone = heads_at(saturation[name])
    if len(study.mastered) < 2:
        why = f"the intact model masters {len(study.mastered)} of {len(TASKS)} tasks"
        verdicts.append(claims.not_testable("C5", name, why=why))
    else:
        measured = study.against_draws(gone, N_DRAWS, kind="removed")
        note = f" ({freed_share[name, 'joint']:.1%} of the state's bytes freed)"
        verdicts.append(claims.judge("C5", name, measured, note=note))
Markdown(markdown.verdict_table(verdicts))

# %% tags=["hide-input"]
checkpoints = results.embedded_folders(MODELS)
if results_folder:
    made = results.provenance(parameters=PARAMETERS, checkpoints=checkpoints)
    results.write_json(
        Path(results_folder, "04_joint_rank_norm_pruning.json"),
        {"provenance": made, "rows": verdicts, "tables": tables},
    )
FULL = {**PARAMETERS, "profile": "full", "n_prompts": 500, "n_draws": 32}
Markdown(
    results.stored_beside("04_joint_rank_norm_pruning", parameters=FULL, checkpoints=checkpoints)
)

# %% mystnb={"figure": {"caption": "As the second curves above, from the stored run of the full profile: score over that of the intact model against the share of the state that is removed; thick grey, the mean of random draws. A curve at 1 is free; one under the thick grey line chooses worse than chance.", "name": "fig-curve-full"}, "image": {"alt": "Falling curves of relative score of the stored run, one a method, beside a thick grey line of random draws."}} tags=["hide-input"]
full = results.stored_run("04_joint_rank_norm_pruning", parameters=FULL, checkpoints=checkpoints)
stored = {}
for name, method, *scores in markdown.table_rows(
    full["tables"]["Score over intact, by share removed"]
):
    stored.setdefault(name, {})[method] = [*map(Estimate.parse, scores)]
if stored:
    draw_curves(stored, FULL_SHARES, BESIDE)  # else the lines above say why that run is not shown

# %% [markdown]
# ## Prune your own
#
# Six lines below the imports, on any model whose heads can be removed ({doc}`the list <../book/limits>`): put a folder or, with its `revision`, a hub
# id in the place of the name. A model that was pruned is of the same class as before; `generate`, `save_pretrained` and everything else work on it, and heads
# keep the numbers that they had.

# %%
import tempfile

import staterank_utils as sr
from staterank_utils.selection import measure_saturation

mine, words = sr.load_model("hybrid"), sr.load_tokenizer("hybrid")
prompts = sr.domain_prompts("code", words, n_prompts=4, n_tokens=512, seed=0)
scores = measure_saturation(mine, prompts)
small = sr.prune_heads(mine, sr.select_heads(scores, share=0.389, model=mine))
folder = tempfile.mkdtemp()
_ = small.save_pretrained(folder), words.save_pretrained(folder)

# %% [markdown]
# Elsewhere, `import staterank_utils` teaches the layers to read what was removed, and `from_pretrained` does the rest, without remote code:

# %%
import staterank_utils
from transformers import AutoModelForCausalLM

again = AutoModelForCausalLM.from_pretrained(folder)
staterank_utils.pruning.removed_heads(again.config)  # layer: heads

# %% [markdown]
# What the two hold in their caches, in bytes of recurrent state:

# %%
caches = {"before": reads(mine, 64), "after": reads(again.to(mine.device), 64)}
{when: cache_bytes(cache)["recurrent"] for when, cache in caches.items()}

# %% [markdown]
# In answer to the three points at the top:
#
# - **Freed**: {glue:text}`freed` of the recurrent state's bytes in a real cache, the share of heads that went.
# - **Kept**: {glue:text}`answer C5`; {numref}`fig-methods` says beside what, {numref}`fig-curve-state` and {numref}`fig-curve` at which shares.
#   Trained on for some hundred steps: {glue:text}`recovered`.
# - **Your own**: the six lines above; what it gives in speed is on {doc}`the page of benchmarks <../book/benchmarks>`.
#
# An interval of no width means that all prompts of a small run agree, not that nothing is uncertain.
#
# ```{admonition} Differs from the paper
# How the paper removes heads, its $\alpha$, its maximum and its prompts are not known. Its 38.9 % are 448 of 1,152 heads of a model of 80
# billion parameters, judged on GSM8K; a model of some million parameters has few heads and little slack. Baselines, controls and the
# reduction of channels are ours.
# ```

# %% tags=["hide-input"]
glue("answer C5", markdown.beside_stored(verdicts, full["rows"], "C5"), display=False)
shares = ", ".join(f"{freed_share[name, 'joint']:.1%} ({name})" for name in MODELS)
glue("freed", shares, display=False)
