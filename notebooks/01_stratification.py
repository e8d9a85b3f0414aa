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
# # Do heads fall into two groups?
#
# *State Rank Stratification, claims C1, C1b and C1c of {doc}`the registered list <../book/claims>`.* The paper reports that the
# heads of a linear-attention model fall into two groups: some keep a state of nearly rank 0, the others climb to an upper bound.
# On this page you see, for models that your own machine has just run:
#
# - the effective rank of every head of every layer, token by token, beside the bound min(*t*, *d*);
# - whether the distribution over heads has two groups, by three registered criteria, and for which thresholds and rank measures;
# - whether the grouping is there before training, and in a model whose weights were shuffled.

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
from pathlib import Path

import numpy as np
from IPython.display import Markdown
from myst_nb import glue
from staterank_utils import (
    Spectrum,
    claims,
    domain_prompts,
    load_model,
    load_tokenizer,
    markdown,
    plotting,
    results,
    singular_values,
    strata,
    trace_states,
)
from staterank_utils.budget import budget
from staterank_utils.strata import bootstrap

plotting.use_style()

# %% tags=["parameters"]
model = "hybrid, pure"  # embedded names, folders or hub ids, separated by commas
revision = ""  # commit or tag, for hub ids
device = ""  # "": the GPU if there is one; "cpu", "cuda", or "auto": spread over all GPUs
profile = "quick"  # "quick" or "full"
seed = 0
n_prompts = 0  # prompts; 0: what the profile says
n_tokens = 2048  # T, tokens a prompt
results_folder = ""  # where the result is stored; "": nowhere

# %%
results.check_parameters(
    globals(),
    texts="model revision device profile results_folder".split(),
    numbers="seed n_prompts n_tokens".split(),
)
MODELS = [name.strip() for name in model.split(",")]
WHERE = {"revision": revision or None, "device": device or None}
N_PROMPTS = n_prompts or {"quick": 6, "full": 16}[profile]
N_SHUFFLES = {"quick": 2, "full": 8}[profile]
POSITIONS = [t for t in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if t < n_tokens] + [
    n_tokens
]
PARAMETERS = {
    "model": model,
    "revision": revision,
    "profile": profile,
    "seed": seed,
    "n_prompts": N_PROMPTS,
    "n_tokens": n_tokens,
}

# %% [markdown]
# ## How many directions does a state use?
#
# Each head $h$ of a linear-attention layer carries a matrix $S_h(t)$ of size $d_k \times d_v$, which it rewrites at every token.
# The paper counts the singular values that are not negligible beside the largest (its Eq. 6, as reported by an independent
# reader):
#
# $$ r_h(t) = \#\{\, i : \sigma_i(S_h(t)) > \varepsilon\, \sigma_1(S_h(t)) \,\}, \qquad \varepsilon = 10^{-4}. $$ (eq-effective-rank)
#
# We read {glue:text}`setting`. Each prompt is read once; at the positions below the state of every head is reduced to its singular
# values, and nothing else is kept.


# %%
def measure(name, positions, weights="trained", shuffle=0):
    """Singular values (layer, prompt, position, head, d) on technical prose."""
    prompts = domain_prompts(
        "prose",
        load_tokenizer(name, revision=WHERE["revision"]),
        n_prompts=N_PROMPTS,
        n_tokens=n_tokens,
        seed=seed,
    )
    network = load_model(name, weights=weights, seed=seed + shuffle, **WHERE)
    if positions is POSITIONS:
        print(f"{name}:\n{budget(network, prompts, positions=positions)}")
    return trace_states(network, prompts, positions=positions, reduce=singular_values)


traces = {name: measure(name, POSITIONS) for name in MODELS}
ranks = {name: Spectrum(trace.values).effective_rank().double() for name, trace in traces.items()}

# %% tags=["hide-input"]
glue(
    "setting",
    f"{N_PROMPTS} prompts of {n_tokens:,} tokens of technical prose (Python's reference manual, which no embedded model was trained on; seed {seed})",
    display=False,
)

# %% [markdown]
# ## Does rank climb to the bound, or stay at the bottom?
#
# After $t$ tokens at most $t$ directions can have been written, so $r_h(t) \le \min(t, d)$: the dotted line. A head that keeps what
# it is told climbs along it; a head that forgets fast stays near the bottom, however long the text. The paper draws this for one
# layer of 32 heads; here are all layers.

# %% mystnb={"figure": {"caption": "Effective rank of every head against the number of tokens read, one panel per layer, mean over prompts of technical prose. Solid blue lines with dots are heads that end at or over d/2, dashed orange lines with squares heads that end under it; the dotted black line is the bound min(t, d). Two bundles that part early are what the claim predicts; lines spread evenly over the height would speak against it.", "name": "fig-ranks-over-time"}, "image": {"alt": "Panels of lines rising from rank 1 at one token, some along the bound min(t, d), others levelling off below it."}} tags=["hide-input"]
plotting.plot_all_ranks(traces, {name: table.mean(1).numpy() for name, table in ranks.items()})

# %% [markdown]
# On this run, of the heads at the end: {glue:text}`groups_at_end`.
#
# The bound itself (claim C1b, the paper's Theorem 3.1) is a fact of linear algebra: a sum of $t$ matrices of rank 1. What can break
# it is arithmetic, since rounding writes in directions that no token chose, and it can show only while $t < d$; from $t = d$ on the bound
# is the size of the matrix. So the same prompts are read once more, and every head is looked at after every token until then:
# {glue:text}`bound_violations` violations.


# %%
def before_the_bound(name):
    """Ranks (layer, prompt, position, head) at every position t < d, and t for each."""
    positions = range(1, min(traces[name].d, n_tokens + 1))
    early = Spectrum(measure(name, positions).values).effective_rank().numpy()
    return early, np.array(positions)[:, None]


early = {name: before_the_bound(name) for name in MODELS}
violations = {name: int(np.greater(*early[name]).sum()) for name in MODELS}

# %% tags=["hide-input"]
counted = (f"{violations[name]} in {early[name][0].size:,} ({name})" for name in MODELS)
glue("bound_violations", "; ".join(counted), display=False)


def at_end_text(name):
    last = ranks[name][:, :, -1].mean(1).flatten().numpy() / traces[name].d
    low, high = (last < strata.GAP[0]).sum(), (last > strata.GAP[1]).sum()
    return f"{low} under 0.2 d, {high} over 0.8 d, {last.size - low - high} between ({name})"


glue("groups_at_end", "; ".join(at_end_text(name) for name in MODELS), display=False)

# %% [markdown]
# ## Are there two groups?
#
# The eye finds groups everywhere, so three numbers were registered before any embedded model was trained, on the distribution of
# $r/d$ over heads at the last token: Sarle's coefficient over 5/9 (the value of a uniform distribution), Hartigan's dip test with
# $p < 0.05$ against a single group, and at least two thirds of the heads outside (0.2, 0.8). The first two are weak alone (a skewed
# single group can pass Sarle's; many ties help the dip test), so all three must hold, each with its whole interval.


# %%
def heads_at_end(name, table):
    """r/d at the last position: (prompt, head), all layers together."""
    return table[:, :, -1].movedim(1, 0).flatten(1).numpy() / traces[name].d


relative = {name: heads_at_end(name, table) for name, table in ranks.items()}
evidence = {name: strata.two_groups(values) for name, values in relative.items()}

# %% [markdown]
# ## Is it training that makes the groups?
#
# Two controls could kill the claim. The *initial* model has the weights it had before its first step (for a
# model that is not embedded: fresh weights of its class, so that only their distribution can be compared). The *shuffled* one has the
# trained weights in random order inside each tensor: the same distribution of weights, nothing learned. If they stratify as well,
# stratification is a property of the recurrence and its gates, not of what pre-training wrote into them.

# %%
CONTROLS = {"initial": ("initial", 0)}
CONTROLS |= {f"shuffled {i + 1}": ("shuffled", i) for i in range(N_SHUFFLES)}


def control(name, weights, shuffle):
    trace = measure(name, [n_tokens], weights, shuffle)
    return heads_at_end(name, Spectrum(trace.values).effective_rank().double())


control_relative = {
    name: {kind: control(name, *how) for kind, how in CONTROLS.items()} for name in MODELS
}

# %% mystnb={"figure": {"caption": "Relative effective rank r/d of all heads at the last token, sorted, mean over prompts of technical prose: trained weights (solid), the same model before training (dashed) and with weights shuffled once (dotted). Two groups look like a step with little in the grey gap (0.2, 0.8); a straight diagonal is no grouping at all.", "name": "fig-rank-distribution"}, "image": {"alt": "Sorted curves of relative rank for trained, initial and shuffled weights, with the gap between 0.2 and 0.8 shaded."}} tags=["hide-input"]
for name, ax in plotting.model_panels(MODELS).items():
    curves = {"trained": relative[name], **control_relative[name]}
    shown = {label: curves[label].mean(0) for label in ("trained", "initial", "shuffled 1")}
    plotting.plot_rank_distribution(ax, shown)


# %% tags=["hide-input"]
def evidence_row(name, label, values):
    found = strata.two_groups(values)
    numbers = [f"{estimate.point:.3f}" for estimate in found.values()]
    ends = [f"{(values.mean(0) < 0.2).sum()}", f"{(values.mean(0) > 0.8).sum()}"]
    return (name, label, *numbers, *ends, claims.judge("C1", name, found)["verdict"])


table = [
    evidence_row(name, *item)
    for name in MODELS
    for item in [("trained", relative[name]), *control_relative[name].items()]
]
HEAD = (
    "model",
    "weights",
    "Sarle",
    "dip p",
    "share outside",
    "under 0.2 d",
    "over 0.8 d",
    "C1's rule",
)
Markdown(markdown.markdown_table(HEAD, table))

# %% [markdown]
# Read the table by its rows; the last column applies the registered rule to each. A control that passes takes the claim's news away:
# that there are groups is then not what training decided; *who is in which* may be. A trained model that fails where a control passes
# has lost groups in training. That is claim C1c, and its measure is the Spearman correlation between the ranks
# of the same heads before and after training, on the same prompts ({numref}`fig-init`): {glue:text}`rho_initial`.


# %%
def before_and_after(name):
    """(prompt, 2, head)"""
    return np.stack([control_relative[name]["initial"], relative[name]], 1)


rho_initial = {
    name: bootstrap(lambda x: strata.spearman(*x.mean(0)), before_and_after(name))
    for name in MODELS
}
glue(
    "rho_initial",
    "; ".join(f"{estimate} ({name})" for name, estimate in rho_initial.items()),
    display=False,
)

# %% mystnb={"figure": {"caption": "Relative effective rank of each head before training (horizontal) and after it (vertical), at the last token, mean over the same prompts. Dots are heads that end high, squares heads that end low. On the dotted diagonal training changed nothing; a cloud without direction is a grouping that training made.", "name": "fig-init"}, "image": {"alt": "Scatter of relative rank before against after training with a dotted diagonal."}} tags=["hide-input"]
for name, ax in plotting.model_panels(MODELS, height=4.2).items():
    before, after = before_and_after(name).mean(0)
    ax.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    plotting.plot_head_pairs(
        ax,
        before,
        after,
        after >= strata.LOW_UNDER,
        xlabel="r / d before training",
        ylabel="r / d after",
    )

# %% [markdown]
# ## Does it depend on the threshold?
#
# $\varepsilon = 10^{-4}$ is a choice. A head of full rank at one threshold may be nearly empty at another, because singular values
# fall off smoothly rather than to zero. {numref}`fig-eps` moves $\varepsilon$ over four decades. In float32 a state carries noise of
# about $10^{-7}\sigma_1$, so $10^{-6}$ is as low as a threshold can go and still mean the state. Heads that end at or over $d/2$, from
# the largest threshold to the smallest: {glue:text}`high_by_eps`.

# %% mystnb={"figure": {"caption": "The sorted distribution of r/d over heads (trained weights, last token, mean over prompts) for five thresholds. The registered threshold 1e-4 is the thick line. If the two ends stay where they are, the groups do not hang on the threshold; if a whole bundle sinks, its rank was in small singular values.", "name": "fig-eps"}, "image": {"alt": "Five sorted curves of relative rank, one for each threshold from 1e-2 to 1e-6."}} tags=["hide-input"]
THRESHOLDS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
spectra = {name: Spectrum(trace.values) for name, trace in traces.items()}
high_by_eps = {}
for name, ax in plotting.model_panels(MODELS).items():
    tables = {eps: spectra[name].effective_rank(rel_tol=eps).double() for eps in THRESHOLDS}
    curves = {eps: heads_at_end(name, table).mean(0) for eps, table in tables.items()}
    plotting.plot_thresholds(ax, curves, registered=1e-4)
    high_by_eps[name] = ", ".join(
        f"{(curve >= strata.LOW_UNDER).sum()}" for curve in curves.values()
    )

# %% tags=["hide-input"]
glue(
    "high_by_eps",
    "; ".join(f"{counts} ({name})" for name, counts in high_by_eps.items()),
    display=False,
)

# %% [markdown]
# Two measures need no threshold. The *stable rank* $\|S\|_F^2/\sigma_1^2$ weighs a direction by its energy; the *entropy rank*
# $\exp H(\sigma/\sum\sigma)$ by its share of the nuclear norm. Both are far smaller numbers than a count. What matters is whether they
# order the heads the same way; the table gives the Spearman correlation with the registered measure (exploratory).


# %%
def order_row(name, label, values):
    x = heads_at_end(name, values.double()).mean(0) * traces[name].d
    rho, sarle = strata.spearman(x, relative[name].mean(0)), strata.sarle_coefficient(x)
    return name, label, f"{rho:.3f}", f"{x.min():.1f} to {x.max():.1f}", f"{sarle:.3f}"


def measures_of(spectrum):
    yield from (
        (f"effective rank, ε = {eps:.0e}", spectrum.effective_rank(rel_tol=eps))
        for eps in THRESHOLDS
    )
    yield from (
        ("entropy rank", spectrum.entropy_rank()),
        ("stable rank", spectrum.stable_rank()),
    )


table = [order_row(name, *measure) for name in MODELS for measure in measures_of(spectra[name])]
Markdown(
    markdown.markdown_table(
        ("model", "measure", "Spearman with r", "range over heads", "Sarle"), table
    )
)

# %% [markdown]
# ## Verdicts
#
# Claim, registered measure and threshold, the paper's figure, what was measured here with its 95 % interval, and the verdict that
# follows by the rule printed on {doc}`the claims page <../book/claims>`.


# %%
def acquired(name):
    """C1c needs the weights that this very model started from."""
    if hasattr(load_model(name, **WHERE).config, "initialization"):
        return claims.judge("C1c", name, {"rho": rho_initial[name]})
    return claims.not_testable("C1c", name, why="its weights before training are not known")


verdicts = []
for name in MODELS:
    verdicts.append(claims.judge("C1", name, evidence[name]))
    verdicts.append(claims.judge("C1b", name, {"violations": strata.exactly(violations[name])}))
    verdicts.append(acquired(name))
Markdown(markdown.verdict_table(verdicts))

# %% tags=["hide-input"]
checkpoints = results.embedded_folders(MODELS)
if results_folder:
    made = results.provenance(parameters=PARAMETERS, checkpoints=checkpoints)
    results.write_json(
        Path(results_folder, "01_stratification.json"), {"provenance": made, "rows": verdicts}
    )
FULL = {**PARAMETERS, "profile": "full", "n_prompts": 16}
Markdown(results.stored_beside("01_stratification", parameters=FULL, checkpoints=checkpoints))

# %% [markdown]
# In answer to the three points at the top:
#
# - **Every head of every layer** stays within min(*t*, *d*): {glue:text}`bound_violations`.
# - **Two groups**: {glue:text}`answer_groups`.
# - **Before training**: the order of heads at initialisation correlates with the final one at {glue:text}`rho_initial`, so the verdict
#   on "acquired in training" is: {glue:text}`answer_acquired`.
#
# ```{admonition} Differs from the paper
# The paper shows one layer of Qwen3-Next-80B-A3B; here are all layers of models some thousands of times smaller, of one training seed
# each, on one domain. Nothing follows for the large model until this page is run on it:
# `papermill notebooks/01_stratification.ipynb out.ipynb -p model Qwen/Qwen3-Next-80B-A3B-Instruct -p revision main -p profile full`.
# That the initial and the shuffled model must be shown beside the trained one is our addition.
# ```

# %% tags=["hide-input"]
glue("answer_groups", markdown.by_model(verdicts, "C1"), display=False)
glue("answer_acquired", markdown.by_model(verdicts, "C1c"), display=False)
