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
# # Which heads are needed?
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
from itertools import product

from IPython.display import HTML, Markdown
from staterank_utils import claims, interactive, markdown, plotting, selection, strata
from staterank_utils.evaluation import score_interval
from staterank_utils.studies import removal as removals
from staterank_utils.studies import repeated
from staterank_utils.studies.by_task import mastered, measure_by_task, tasks_of
from staterank_utils.studies.setup import setup
from staterank_utils.studies.texts import draw_texts

run = setup(globals(), "03_ablation_asymmetry", n_prompts=(6, 200), n_draws=(1, 16))
plotting.use_style()
LOW, HIGH, RANDOM, MODEL = removals.LOW, removals.HIGH, removals.RANDOM, removals.MODEL
sizes = (
    replace(removals.FEW, orders=(LOW, HIGH), shares=(0.25,)) if run.quick else removals.Sizes()
)
sizes = replace(sizes, n_draws=run.sizes["n_draws"])
removed, by_task = {}, {}
for name in run.models:
    network, tokenizer = run.load(name)
    few = {"n_windows": 1, "n_calibration": 2} if run.quick else {}
    texts = draw_texts(tokenizer, seed=run.seed, **few)
    print(f"{name}: {removals.planned(network, texts, sizes)}", file=sys.stderr)
    removed[name] = repeated.repeat_removal(name, network, texts, sizes=sizes, seed=run.seed)
    counts = {**run.sizes, "n_draws": max(run.sizes["n_draws"], 8)}
    by_task[name] = measure_by_task(network, tokenizer, tasks_of(profile), name=name, **counts)
shown = {name: found.shown for name, found in removed.items()}

# %% mystnb={"figure": {"caption": "Added nats against the share of heads removed; lower is better, cut at the top. Squares: lowest rank first. Dots: highest first. Grey: random. Open marks: this run, on fewer windows. Horizontal: a unigram model.", "name": "fig-removal"}, "image": {"alt": "Panels of rising curves, one row per model. In the embedded models the curve of the highest ranks starts far below that of the lowest and crosses it beyond a third of the heads; with layer 0 protected it stays below; layer-matched, the two lie close together."}} tags=["hide-input"]
curves = {
    name: {scheme: found.curves(scheme, (LOW, HIGH)) for scheme in removals.SCHEMES}
    for name, found in removed.items()
}
ruins = {name: found.ruin for name, found in shown.items()}
plotting.plot_all_added(curves, ruins=ruins, width=11, row_height=2.5)
run.keep("fig-removal")

# %% [markdown]
# Read the left column first. Where the dots lie under the squares, the lowest ranks cost more: that is the paper's direction. Where they lie
# under the grey band, heads of high rank can be spared better than any random draw. Beyond the horizontal line a model reads no better than token
# frequencies, and an arm there tells nothing.
#
# The other columns take a rival explanation away. An order over the whole model also chooses layers. *Layer-matched* removes the same number of
# heads from every layer; *layer 0 protected* leaves the first layer whole. A quarter of the
# heads, and as far as measured the paper's share for pruning, in added nats; open marks average one window per text, so they can lie outside the bands of the figure; brackets are 95 % intervals over windows of text, and for random heads the range of their
# draws:

# %% tags=["hide-input"]
doses = {"shares": (0.25, selection.PAPER_SHARE), "schemes": removals.SCHEMES}
Markdown(
    markdown.markdown_table(*removals.costs_table(shown, orders=(LOW, HIGH, RANDOM), **doses))
)

# %% [markdown]
# So many layer-matched random draws cost more than a quarter of lowest rank: {glue:text}`dearer`. The registered test of C4b, below, asks for more:
# that the gap between the lowest and the highest ranks is larger than such gaps between random heads.
#
# The paper reports that low-rank heads are indispensable for reasoning and high-rank heads redundant, by scores on tasks. A small model masters
# few of them, so this page takes losses on text. Recall from context is another measure, with another answer:
# {doc}`05_memory_and_recall`.
#
# ```{admonition} Where the numbers come from
# :class: dropdown
# {glue:text}`sources`
# ```
#
# ## What does it mean to remove a head?
#
# Its output, after the gated norm, is set to zero. No weight changes, and afterwards the model is as it was, bit for bit. Zero is one choice: a head's
# mean output in place of its own was tried for the highest ranks alone, and costs more ({doc}`04_joint_rank_norm_pruning`). *Added nats* are the
# loss without the heads minus the loss with all of them, in nats per token, on held-out books and held-out code. With all heads the loss is
# {glue:text}`intact`.

# %%
from staterank_utils.evaluation import token_nats
from staterank_utils.surgery import ablate_heads

n = max(len(shown[name].heads) // 16, 1)
highest = [shown[name].heads[index] for index in shown[name].orders[HIGH][:n]]
with ablate_heads(network, highest):
    without = token_nats(network, texts.windows).mean()
f"{name}, {n} fewer heads: {without - token_nats(network, texts.windows).mean():+.3f} nats per token"

# %% [markdown]
# Heads are ordered by effective rank on other text. Try it: colour the heads by a measure, choose an order, and move the sliders. *Nats added
# without it* is the cost of a head that is removed alone.

# %% mystnb={"figure": {"caption": "All heads of each model, layer by layer. Crosses: removed, in the chosen order. Below: added nats per token of each order; the line marks the slider's dose.", "name": "fig-explorer"}} tags=["hide-input"]
ALT = "Grid of the heads of {}, coloured by relative rank, with curves of added nats by number of heads removed."
explorers, rows, alone = [], [], []
source_of_alone = []
for name, found in shown.items():
    measures = {"r / d": found.rank / found.d, **repeated.measures_of(name)}
    if repeated.DAMAGE in measures:
        by_rank = removals.damage_by_rank(found.heads, found.rank, measures[repeated.DAMAGE])
        words = "{1:.2f} over the heads of all layers but the first; {0:.2f} in the first, with {2:.0%} of the summed cost"
        alone.append(f"{words.format(*by_rank)} ({name})")
        source_of_alone = [repeated.damage_source()]
    orders = [order for order in (HIGH, LOW, removals.JOINT) if order in found.orders]
    places = {order: found.places(order) for order in orders}
    costs = found.costs(MODEL, (*places, RANDOM))
    chart = interactive.heads_chart(found.heads, measures, places, costs).properties(title=name)
    rows += [{"model": name, **row} for row in interactive.rows_of(chart)]
    label = f"heads {len(explorers)}"
    explorers.append(interactive.embed(chart, name=label, alt_text=ALT.format(name)))
run.keep("fig-explorer", rows)
HTML("".join(explorers))

# %% [markdown]
# Choose *low rank* and a quarter of the heads: do the crosses gather in a few layers? Choose *joint*, the paper's score: does it take heads of the
# first layer early? And do heads of low rank cost more one by one? Spearman of rank and of what each head costs alone (exploratory, one training
# seed per model): {glue:text}`alone`. A negative number means that heads of lower rank tend to cost more. A group need not cost what its heads cost alone.
#
# ## Or is it the layer?
#
# $D$ sums up a scheme: the area between the two curves from 1/16 to 5/16 of the heads, as far as measured, in nats per token times share of
# heads. Divided by that width, a quarter, it is the mean gap. A negative $D$ means that low-rank heads cost more.

# %% tags=["hide-input"]
rows = []
for (name, found), scheme in product(shown.items(), removals.SCHEMES):
    if not found.shares(scheme):  # the first layer holds too many heads
        continue
    crossing = found.crossing(scheme)
    limit = f"not up to {found.actual(scheme, found.shares(scheme)[-1]):.0%}"
    crosses = limit if crossing is None else f"{crossing:.0%}"
    first = found.heads[0][0]
    taken = [
        f"{found.from_layer(first, scheme, order, selection.PAPER_SHARE)}"
        for order in (LOW, HIGH)
    ]
    rows.append((name, scheme, f"{found.area_interval(scheme):.2f}", crosses, *taken))
HEAD = ("model", "scheme", "D", "curves cross at, by their points")
HEAD += ("first linear layer: heads of the low arm, at 38.9 %", "of the high arm, at 38.9 %")
Markdown(markdown.markdown_table(HEAD, rows))

# %% [markdown]
# The last two columns say what the arms take from the first linear layer. Where the curves cross over the model, and no longer do when that
# layer is protected, the damage of the high arm beyond the crossing comes with heads of that layer. That is claim C4c: {glue:text}`answer C4c`. Its registered
# name, "the asymmetry is a matter of layer 0", says more than its rule, which asks about the crossing alone. Where $D$ stays negative with layer 0
# protected, the asymmetry is there without that layer: {glue:text}`without_first`. Near a crossing the intervals of the two arms overlap, so its place is rough.
#
# Layer-matched, no arm chooses layers. Is the difference that is left there more than chance? Claim C4b asks random orders: draw an order of
# the heads *within* each layer, remove its first and its last heads at the same doses, and compute $D$. If the $D$ of rank lies inside that
# distribution, the registered verdict is "explained by layers". The test is weak, with 60 orders per model: it says that an effect of rank is
# not shown, not that there is none. And every arm takes heads of the first layer as well. Its loss is large and depends on which of them go, which can hide
# an effect of rank in the other layers. The same test on the layers behind it, by the same rule, all windows (exploratory, one training per model): {glue:text}`behind`.
# Over the models of {doc}`the ladder <../book/ladder>` the signs of $D$ are counted.

# %% mystnb={"figure": {"caption": "D of random orders within layers, both signs. Dashed: D of rank, on the same few windows, so not quite the table's. It must lie outside 97.5 % of the random orders to count.", "name": "fig-within"}, "image": {"alt": "A histogram per model with a dashed vertical line. In the embedded models it is inside the left half."}} tags=["hide-input"]
if drawn := [name for name in run.models if len(shown[name].within)]:
    for name, ax in plotting.model_panels(drawn).items():
        removal = shown[name]
        own = removal.area(removals.LAYERS, removal.few_windows())
        plotting.plot_within(ax, removal.random_areas(), own)
        ax.set_title(f"{name}: beyond {removal.beyond_random():.0%}", fontsize="small")
    run.keep("fig-within")

# %% [markdown]
# Rank travels with decay and with norm. Where the orders take other heads, of layer 0 above all, they cost something else. Added nats at a quarter of the heads, for
# every order that was measured:

# %% tags=["hide-input"]
rows = [
    (name, order, *(f"{found.near(scheme, order, 0.25):.2f}" for scheme in removals.SCHEMES))
    for name, found in shown.items()
    for order in (*removals.ORDERS, RANDOM)
    if found.curve(MODEL, order)
]
Markdown(markdown.markdown_table(("model", "first to go", *removals.SCHEMES), rows))

# %% [markdown]
# ## Are high-rank heads redundant with each other?
#
# If high-rank heads all did the same, a few of them would be enough. Of the heads with $r \ge 0.9\,d$, all are removed, and then a part of
# them is kept (claim C7). Beside it stand groups of as many heads at random:
#
# ```{glue:md} redundant
# :format: myst
# ```
#
# This is a narrower question than the paper's, and ours: can a quarter of these heads stand in for all? It does not ask whether they can be
# spared; they may be cheap to lose and still not replace each other. Where the random group recovers as little, the test does not tell the two apart. Damage beyond the horizontal line of the first figure tells little, and the registered
# rule exempts C7 from it. Both groups hold heads of layer 0, which this does not take apart.

# %% mystnb={"figure": {"caption": "Share of the damage that keeping a part undoes, mean and range over draws. Dots: heads of full rank. Grey: random groups of that size. The claim asks for 0.8 at 25 %.", "name": "fig-undone"}, "image": {"alt": "Curves that rise with the share of the group kept. In the embedded models both need more than a quarter."}} tags=["hide-input"]
keeps = [0, *map(float, claims.SECOND["C7"].numbers["keeps"])]
if grouped := [of for of in run.models if shown[of].groups and shown[of].groups["high"].size]:
    for name, ax in plotting.model_panels(grouped).items():
        groups = {
            "high-rank heads": shown[name].groups["high"],
            "random heads": shown[name].groups[RANDOM],
        }
        plotting.plot_undone(ax, keeps, groups, enough=claims.SECOND["C7"].numbers["undone"])
    plotting.legend_above(ax.figure)
    run.keep("fig-undone")

# %% [markdown]
# ## And the tasks?
#
# The first registration judges by tasks, of which a model must master at least half: damage to what it cannot do cannot be seen. Share
# of answers that are right, with all heads. This run asks fewer prompts, in the quick profile of shorter tasks:

# %% tags=["hide-input"]
intact = {(name, "this run"): found.intact for name, found in by_task.items()}
intact |= {(name, "stored"): of for name in run.models if (of := repeated.task_scores(name))}
rows = [
    (
        *which,
        f"{len(next(iter(scores.values())))}",
        *(str(score_interval(of)) for of in scores.values()),
    )
    for which, scores in sorted(intact.items())
]
Markdown(markdown.markdown_table(("model", "run", "prompts per task", *tasks_of(profile)), rows))

# %% [markdown]
# {glue:text}`tasks_that_count` For a model that masters two or more, this page compares the low and the high arm at the registered dose,
# beside random draws, and judges C4 and C4a.

# %% tags=["hide-input"]
rows = []
for name, found in by_task.items():
    for task, n in found.heads.items():
        arms = (found.low[task], found.high[task], found.draws[task].mean(0))
        rows.append((name, task, f"{n}", *(str(score_interval(scores)) for scores in arms)))
HEAD = ("model", "task", "heads removed", "lowest rank", "highest rank", "random, mean")
Markdown(markdown.markdown_table(HEAD, rows)) if rows else None

# %% [markdown]
# ## Verdicts
#
# By {doc}`the registered rules <../book/claims>`. They are judged on the measurement that the figures show, for an embedded model
# the stored one, and C4 and C4a on its scores. C4b and C4c are judged here for one training seed; {doc}`the ladder <../book/ladder>` has them over
# seeds. C4b gives the share of random orders whose $D$ is smaller in size than that of rank; C4c by how much the crossing moves, as a share of heads,
# where 1 means that it is gone; C7 the smallest share kept that undoes 80 % of the damage, where 1 means that none did.

# %% tags=["hide-input"]
verdicts = []
for name in run.models:
    verdicts += [row for row in repeated.task_claims(name, by_task[name]) if row["claim"] != "C5"]
    of_seed = {"seed": removed[name].seed}
    verdicts += removals.one_model_claims(shown[name], name, ("C4b", "C4c", "C7"), **of_seed)
Markdown(markdown.verdict_table(verdicts))

# %% tags=["hide-input"]
counting = (
    (name, ", ".join(mastered(repeated.task_scores(name) or found.intact)) or "none")
    for name, found in by_task.items()
)
answer = []
for name, found in shown.items():
    points = [found.near(MODEL, order, 0.25).point for order in (LOW, HIGH, RANDOM)]
    low, high, random = (strata.without_minus(f"{point:.2f}") for point in points)
    spread = found.near(MODEL, RANDOM, 0.25)
    random += f" [{spread.low:z.2f} to {spread.high:z.2f}]"
    answer.append(f"lowest rank {low}, highest {high}, random {random} ({name})")

behind = {name: of for name in shown if (of := repeated.beyond_first(name))}
passes = claims.SECOND["C4b"].numbers["beyond"]
found = [
    {"claim": "behind", "model": m, "verdict": "yes" if of[1] >= passes else "no"}
    for m, of in behind.items()
]
without = markdown.by_model(found, "behind")
without = (
    f"; among the heads behind layer 0, exploratory, one training each: {without}"
    if without
    else ""
)

# %% tags=["hide-input"]
said = {
    "answer C4c": markdown.by_model(verdicts, "C4c"),
    "intact": "; ".join(f"{of.intact_in_words()} ({name})" for name, of in shown.items()),
    "without_first": "; ".join(
        f"{of.area_interval(removals.PROTECTED):.2f} ({name})"
        for name, of in shown.items()
        if of.shares(removals.PROTECTED)
    ),
    "answer": f"An effect of rank on the loss beyond the choice of layers: {markdown.yes_or_no(verdicts, 'C4b')}{without}. Nats per token that the removal of a quarter of the heads adds: {'; '.join(answer)}.",
    "alone": "; ".join(alone) or "not measured",
    "behind": "; ".join(
        f"D is {of[0]:.3f}, larger in size than {of[1]:.0%} of the random orders ({name})"
        for name, of in behind.items()
    )
    or "not measured",
    "dearer": "; ".join(
        f"{of.dearer_draws(removals.LAYERS, LOW, 0.25)} ({name})" for name, of in shown.items()
    ),
    "sources": " ".join(
        [*(found.source(name) for name, found in removed.items()), *source_of_alone]
    ),
    "redundant": {name: shown[name].redundancy(0.25) for name in grouped},
    "tasks_that_count": " ".join(f"{name} masters {tasks}." for name, tasks in counting),
}
run.conclude(said, verdicts, removed, badges=("C4b", "C7", "C4"))

# %% [markdown]
# ## What this does not say
#
# The number of heads the paper removed, its rule for low and high, its kind of removal and its prompts are not known. It scores tasks, without
# random heads beside them, and its two models differ ({doc}`limits <../book/limits>`); this page takes losses on text. The schemes and the random orders are ours. A replication on one pure model of 1.3 billion parameters takes perplexity, a loss as
# well, and found the opposite of the paper from 10 to 50 % of the heads. Its high-rank heads recall from context; what
# recalls in these models is on {doc}`05_memory_and_recall`.

# %% [markdown] tags=["of-the-book"]
# The embedded models are some thousands of times smaller than Qwen3-Next, and both begin with a linear layer. Of the designs of
# {doc}`the ladder <../book/ladder>` with three seeds, one shows the paper's asymmetry beyond random orders within layers: the one with a softmax layer in
# front. One shows the reverse: the one with the gates that the paper's model class begins with. On another model:
#
# ```bash
# papermill notebooks/03_ablation_asymmetry.ipynb mine.ipynb -p model OWNER/NAME -p revision COMMIT
# ```
