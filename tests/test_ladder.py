"""The ladder on a CPU: a small model through the whole road, and the stored results recomputed from their own data."""

import csv
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from book.ladder import designs, ladder_figures, ladder_tables, stored_models
from book.neighbours import expansion_figure, expansion_tables, kinds_of_states, neighbours_table
from staterank_utils import claims, strata
from staterank_utils.dispatch import Kernel
from staterank_utils.evaluation import token_nats
from staterank_utils.memory import predicted_rank
from staterank_utils.models import CHECKPOINTS, EMBEDDED, initial_model, load_model, load_tokenizer
from staterank_utils.strata import Estimate, share_outside
from staterank_utils.studies import recall
from staterank_utils.studies import removal as study
from staterank_utils.studies.by_task import ByTask
from staterank_utils.studies.ladder import (
    LADDER,
    Measured,
    Scale,
    ladder_claims,
    load_measured,
    measure_model,
    store_measured,
)
from staterank_utils.studies.removal import AREA, HIGH, JOINT, LAYERS, LOW, MODEL, PROTECTED, RANDOM, Sizes, chosen
from staterank_utils.studies.repeated import stored_on
from staterank_utils.studies.texts import draw_texts
from staterank_utils.surgery import ablate_heads
from training import ladder
from training import train as training
from training.corpus import write_corpus
from training.measure import measure
from training.recipes import LINEAR, RECIPES, SOFTMAX, WAVES
from training.train import Run, train

SMALL = replace(
    RECIPES["hybrid-tasks63-0"], name="hybrid-small-0", layer_types=(LINEAR, SOFTMAX, LINEAR), steps=20, batch_rows=1, n_tokens=64,
    hidden=64, intermediate=512, key_heads=8, value_heads=16, head_size=16,
)  # fmt: skip
QUICK = Scale(
    n_prompts=2, n_tokens=160, n_checkpoint_prompts=1, n_law_prompts=1, law_tokens=96, n_windows=1, window=64, n_copies=1, n_calibration=1,
    gaps=(16, 512), n_scores=1, n_graded=1, tasks=("recall",), removal=Sizes(n_draws=2, n_chance=3, n_within=1, within_windows=1, n_groups=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> tuple[Path, Measured]:
    """A model of a million weights trained for 20 steps, measured and stored."""
    folder = tmp_path_factory.mktemp("ladder")
    ids = np.random.default_rng(0).integers(2, len(tokenizer), 20_000).astype(np.uint16)
    write_corpus(folder / "corpus", dict.fromkeys(("books", "code", "held_out_books"), ids), tokenizer)
    model = initial_model(SMALL.configuration(tokenizer))
    assert 0.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.1e6
    kernel = Kernel(torch_chunk_gated_delta_rule, plain=True)

    def recurrence(q, k, v, log_decay, beta):
        return kernel(q, k, v, g=log_decay, beta=beta)[0]

    run = folder / SMALL.name
    with pytest.MonkeyPatch.context() as patch:
        for module in (study, recall):
            patch.setattr(module, "POSITION_DOSES", (study.Fraction(1, 4),))
        for name, value in {"RECORD_AT": (0, 5), "RECORD_PROMPTS": 1, "KEEP_AT": (5,), "HELD_OUT_WINDOWS": 2}.items():
            patch.setattr(training, name, value)
        train(
            Run(SMALL, folder / "corpus", str(CHECKPOINTS / "hybrid"), run, workers=0),
            recurrence,
            device="cpu",
            compiled=False,
        )
        (run / "step-5").rename(run / "step-500")
        measure(run, folder / "out", scale=QUICK, device="cpu")
    return folder, load_measured(SMALL.name, folder / "out")[0]


def test_a_small_model_goes_the_whole_road(stored) -> None:
    folder, measured = stored
    data = json.loads((folder / "out" / f"{SMALL.name}.json").read_text())
    assert data["training"]["steps"] == 20
    assert data["training"]["recipe"]["name"] == SMALL.name
    assert list(measured.groups) == ["end", "initial", "shuffled", "step-500"]
    assert [row["claim"] for row in data["rows"]] == [
        *("C1", "C1b", "C1c", "C2", "C2n", "C2b", "C3", "C3a", "C4", "C4a", "C5"),
        *("C0", "C0a", "C0c", "C7", "C5a"),
    ]
    assert {variant: law.bound_violations for variant, law in measured.laws.items()} == {"end": 0, "step-500": 0}
    assert list(data["controls"]) == ["initial", "shuffled", "step-500"]
    assert measured.removal.secondary["intact"].shape == (4, 1)
    assert data["provenance"]["checkpoints"].keys() == {"model"}
    assert all((folder / "out" / f"{SMALL.name}.{end}").stat().st_size < 300_000 for end in ("json", "npz.xz"))


def test_what_is_stored_gives_the_same_claims_and_numbers_again(stored) -> None:
    folder, measured = stored
    data = json.loads((folder / "out" / f"{SMALL.name}.json").read_text())
    assert [(row["claim"], row["verdict"]) for row in measured.claims()] == [
        (row["claim"], row["verdict"]) for row in data["rows"]
    ]
    for row in data["arms"]:
        if row["order"] != RANDOM:
            added = measured.removal.added(row["scheme"], row["order"], row["share"])
            assert added.mean() == pytest.approx(row["added"][0], abs=2e-4)
    assert study.summary(measured.removal)[0].keys() == data["arms"][0].keys()


def test_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finished run: expected the folder"):
        measure_model(tmp_path, name="x", training={})


# ---------------------------------------------------------------- rules, on made-up losses


@pytest.fixture
def made(stored) -> study.Removal:
    """A model's arms with losses that are known: the share of removed heads, twice that without the highest ranks."""
    removal = stored[1].removal
    n_heads, n_windows = len(removal.heads), len(removal.intact)
    cost = {LOW: 1.0, HIGH: 2.0, JOINT: 3.0, RANDOM: 4.0}
    nats = [np.full(n_windows, 5.0 + cost.get(arm.order, 1.0) * len(arm.heads) / n_heads) for arm in removal.arms]
    return replace(removal, intact=np.full(n_windows, 5.0), nats=np.array(nats), unigram={"books": 6.0, "code": 6.0})


def test_the_area_is_that_of_the_registration(made) -> None:
    shares = [1 / 16, 2 / 16, 4 / 16, 5 / 16]
    expected = sum((b - a) * (a + b) / 2 for a, b in itertools.pairwise(shares))
    for scheme in (MODEL, LAYERS, PROTECTED):
        assert made.area(scheme) == pytest.approx(expected)
    assert made.area_interval(MODEL).low == pytest.approx(expected)


def test_a_dose_counts_while_both_arms_are_better_than_unigrams(made) -> None:
    assert [made.counts(MODEL, share) for share in (0.25, 7 / 16, 0.5)] == [True, True, False]


def test_the_joint_score_is_held_against_every_random_draw(made) -> None:
    """Joint costs three, random draws four times the share of the heads; ruin is 1 nat."""
    assert made.spare_share() == 2 / 48
    leads = made.leads_over_chance()
    assert list(leads) == ["4.2%, where rank alone is spare"]  # at 38.9 % both are ruined
    assert leads["4.2%, where rank alone is spare"] < 0
    rich = replace(made, unigram={"books": 9.0, "code": 9.0})
    assert [lead < 0 for lead in rich.leads_over_chance().values()] == [True, True]
    worse = replace(rich, nats=np.where([[arm.order == JOINT] for arm in made.arms], 8.9, made.nats))
    assert [lead < 0 for lead in worse.leads_over_chance().values()] == [False, False]
    assert made.alpha_gap().point == pytest.approx(0.25)


def test_the_area_is_over_the_doses_that_count(made) -> None:
    """With ruin at half a nat, the highest ranks count up to a quarter of the heads and less."""
    poor = replace(made, unigram={"books": 5.5, "code": 5.5})
    assert poor.counted(LAYERS) == [1 / 16, 2 / 16]
    assert poor.area(LAYERS) == pytest.approx((1 / 16 + 2 / 16) / 2 / 16)
    ruined = replace(made, unigram={"books": 5.0, "code": 5.0})
    assert np.isnan(ruined.area(MODEL))
    assert np.isnan(ruined.area_interval(MODEL).point)
    assert ruined.spare_share() is None
    assert [row["verdict"] for row in ruined.claims("m") if row["claim"] == "C5a"] == [claims.NOT_TESTABLE]


def test_the_arms_cross_where_the_highest_begin_to_cost_more(made) -> None:
    assert made.crossing(MODEL) == 1 / 32  # from the first dose on they cost more
    cheap = np.where([[arm.order == HIGH] for arm in made.arms], 5.0, made.nats)
    assert replace(made, nats=cheap).crossing(MODEL) is None
    gap = {LOW: 0.2, HIGH: 0.0}
    shifted = [
        np.full(
            len(made.intact),
            5.0 + gap.get(arm.order, 0.0) + (len(arm.heads) / len(made.heads) if arm.order == HIGH else 0.0),
        )
        for arm in made.arms
    ]
    assert replace(made, nats=np.array(shifted)).crossing(LAYERS) == pytest.approx(0.2)


def test_random_orders_within_layers_are_taken_with_both_signs(made) -> None:
    within = np.zeros((3, 2, len(AREA), 2))
    within[:, 0] = np.array([0.1, 0.2, 9.0])[:, None, None]
    again = replace(made, within=within)
    assert sorted(again.random_areas()) == pytest.approx([-9 / 4, -0.05, -0.025, 0.025, 0.05, 9 / 4])
    assert again.beyond_random() == pytest.approx(1 / 3)  # D of rank is 0.047


def test_the_share_that_restores_a_group_is_the_smallest_that_undoes_enough(made) -> None:
    table = np.array([[1.0, 1.0], [0.9, 0.9], [0.3, 0.1], [0.1, 0.1], [0.0, 0.0], [0.0, 0.0]])
    groups = {"high": table, RANDOM: np.full((6, 2), 1.0)}
    again = replace(made, groups=groups)
    assert (again.restoring_share("high"), again.restoring_share(RANDOM)) == (study.Fraction(1, 8), 1)
    assert [row["verdict"] for row in again.claims("m") if row["claim"] == "C7"] == [claims.HOLDS]


def test_schemes_take_what_they_say() -> None:
    heads = [(layer, head) for layer in (0, 1, 2) for head in range(16)]
    order = list(range(48))
    assert chosen(order, heads, MODEL, 0.25) == tuple(range(12))
    assert chosen(order, heads, LAYERS, 0.125) == (0, 1, 16, 17, 32, 33)
    assert chosen(order, heads, LAYERS, 0.1) == (0, 1, 16, 17, 32, 33), "1.6 heads are 2"
    assert chosen(order, heads, PROTECTED, 0.25) == tuple(range(16, 28))
    for options, words in (
        ((order, heads, "none", 0.25), "unknown scheme 'none'"),
        ((order, heads[:20], PROTECTED, 0.5), "10 heads cannot be taken of 4"),
    ):
        with pytest.raises(ValueError, match=words):
            chosen(options[0][: len(options[1])], *options[1:])


def test_ties_in_rank_are_broken_by_the_stable_rank() -> None:
    values = np.array([[[3.0, 3.0, 1.0]]])
    stable, norm, ones = np.array([[[2.0, 1.5, 1.0]]]), np.array([[[1.0, 2.0, 3.0]]]), np.ones((1, 3))
    trace = study.HeadTrace(values, norm, stable, -ones, ones)
    made = study.orders(trace, d=4)
    assert made[LOW].tolist() == [2, 1, 0]
    assert made[HIGH].tolist() == [0, 1, 2]


# ---------------------------------------------------------------- claims over models


def test_claims_of_several_models_are_told_by_kind_data_and_seed(stored) -> None:
    measured = replace(stored[1], removal=replace(stored[1].removal, unigram={"books": 99.0, "code": 99.0}))
    models = {
        name: replace(measured, name=name)
        for name in ("hybrid-text-0", "hybrid-text-2", "pure-text-0", "hybrid-tasks63-0", "pure-tasks63-0")
    }
    rows = ladder_claims(models)
    assert [(row["claim"], row["model"]) for row in rows if row["claim"] in ("C0b", "C1e", "C6")] == [
        ("C0b", "the ladder"), ("C1e", "hybrid"), ("C1e", "pure"), ("C6", "text"), ("C6", "tasks63"),
    ]  # fmt: skip
    assert [row["note"] for row in rows if (row["claim"], row["model"]) == ("C5b", "hybrid-text")] == ["; 2 seeds"]


def test_a_spare_share_is_one_of_the_doses_again_when_it_is_read(stored, tmp_path: Path) -> None:
    """1/48 is no decimal of six digits."""
    _, measured = stored
    heads, by_name = measured.removal.heads, measured.removal.orders
    arms = study.all_arms(heads, by_name, name=measured.name, n_draws=2)
    arms += study.chance_arms(heads, name=measured.name, spare=1 / 48, first=2, n_draws=3)
    dear = np.array([9.9 if arm.order == HIGH and arm.share > 1 / 48 else 0.0 for arm in arms])
    removal = replace(
        measured.removal, arms=arms, nats=measured.removal.intact + dear[:, None], unigram={"books": 99.0, "code": 99.0}
    )
    assert removal.spare_share() == 1 / 48
    store_measured(replace(measured, removal=removal), tmp_path, made={})
    again, _ = load_measured(measured.name, tmp_path)
    assert again.removal.arms == arms
    assert len(again.removal.draws(MODEL, 1 / 48)) == 3


# ---------------------------------------------------------------- jobs


def arguments(tmp_path: Path):
    return ladder.argparse.Namespace(
        corpus=tmp_path / "corpus", tokenizer="tokenizer", runs=tmp_path / "runs", out=tmp_path / "out", workers=0, per_gpu=1,
    )  # fmt: skip


def test_a_job_that_fails_leaves_the_others_alone_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = subprocess.Popen

    commands: list[list[str]] = []

    def started(command: list[str], **options: object):
        commands.append(command)
        name = command[command.index("--job") + 1]
        return original([sys.executable, "-c", f"raise SystemExit({int(name == 'hybrid-text-1')})"])

    monkeypatch.setattr(ladder.subprocess, "Popen", started)
    assert ladder.run_wave(WAVES[1], arguments(tmp_path), 2) == ["hybrid-text-1"]
    assert all(command[command.index("--gpus") + 1] == "2" for command in commands)


def test_what_a_job_has_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(tmp_path)
    assert list(ladder.commands("hybrid-text-0", given)) == ["training", "measuring"]
    (given.runs / "hybrid-text-0").mkdir(parents=True)
    (given.runs / "hybrid-text-0" / "training.json").touch()
    [(step, command)] = ladder.commands("hybrid-text-0", given).items()
    assert (step, command[1:3]) == ("measuring", ["-m", "training.measure"])
    monkeypatch.setattr(ladder.subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 3))
    with pytest.raises(
        SystemExit, match=r"measuring of hybrid-text-0 failed with exit status 3: see .*hybrid-text-0\.log"
    ):
        ladder.run_job("hybrid-text-0", given, 1)


def test_jobs_take_different_gpus_and_wait_where_none_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        raise TimeoutError

    monkeypatch.setattr(ladder.time, "sleep", wait)
    with ladder.free_gpu(tmp_path, 2) as first, ladder.free_gpu(tmp_path, 2) as second:
        assert (first, second) == (0, 1)
        with pytest.raises(TimeoutError), ladder.free_gpu(tmp_path, 2):
            pass
    with ladder.free_gpu(tmp_path, 2) as again:
        assert again == 0
    assert waits == [ladder.POLL]
    with (
        ladder.free_gpu(tmp_path, 2, 2) as first,
        ladder.free_gpu(tmp_path, 2, 2) as second,
        ladder.free_gpu(tmp_path, 2, 2) as third,
    ):
        assert (first, second, third) == (0, 1, 0)


@pytest.mark.parametrize(("visible", "expected"), [(None, "0"), ("4,5", "4")])
def test_a_job_takes_one_of_the_gpus_that_it_may_use(
    visible: str | None, expected: str, tmp_path: Path, monkeypatch
) -> None:
    given, seen = arguments(tmp_path), []
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def run(command: list[str], *, env: dict[str, str], **options: object):
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ladder.subprocess, "run", run)
    ladder.run_job("hybrid-text-0", given, 2)
    assert seen == [expected] * 2


def test_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    given = ["ladder", "--wave", "1", "--corpus", "c", "--tokenizer", "t", "--runs", "r", "--gpus", "4"]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit, match="asked for 4 GPUs, and torch sees 1 on this host: lower --gpus"):
        ladder.main()
    monkeypatch.setattr("sys.argv", [*given[:-2], "--per-gpu", "0"])
    with pytest.raises(SystemExit, match="--per-gpu is 0: expected at least 1 job per GPU"):
        ladder.main()


# ---------------------------------------------------------------- what is stored

STORED = sorted(file.stem for file in LADDER.glob("*.json"))


@pytest.mark.parametrize(
    "file",
    [LADDER / f"{name}.json" for name in STORED] + sorted(LADDER.glob("repeats/*.json")),
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
def test_a_stored_model_s_numbers_follow_from_its_data(file: Path) -> None:
    measured, data = load_measured(file.stem, file.parent)
    ranks = measured.groups["end"].rank["prose"]
    shares = data["numbers"]["shares"]["end"]
    assert share_outside(ranks.mean(0) / measured.removal.d) == pytest.approx(shares["outside"], abs=1e-5)
    decay = torch.from_numpy(measured.groups["end"].log_decay["prose"].mean(0))
    by_law = predicted_rank(decay, d=measured.removal.d).numpy() / measured.removal.d
    assert share_outside(by_law) == pytest.approx(shares["outside by law"], abs=1e-5)
    index = next(
        i for i, arm in enumerate(measured.removal.arms) if (arm.scheme, arm.order, arm.share) == (LAYERS, HIGH, 0.25)
    )
    row = next(row for row in data["arms"] if (row["scheme"], row["order"], row["share"]) == (LAYERS, HIGH, 0.25))
    added = (measured.removal.nats[index] - measured.removal.intact).mean()
    assert added == pytest.approx(row["added"][0], abs=2e-4)
    assert [row["verdict"] for row in measured.claims()] == [row["verdict"] for row in data["rows"]]
    assert file.stat().st_size < 300_000
    assert file.with_suffix(".npz.xz").stat().st_size < 100_000 + 1_600 * len(measured.removal.heads)


def test_scores_on_tasks_are_stored_and_judged(tmp_path: Path) -> None:
    measured, _ = load_measured("hybrid-tasks63-0")
    right, wrong = np.ones(4), np.array([1.0, 0.0, 0.0, 0.0])
    tasks = ("recall", "needle")
    of_tasks = {"low": wrong, "high": right, "draws": np.stack([right, right])}
    by_task = ByTask(
        measured.name, {**dict.fromkeys(tasks, right), "copying": wrong}, dict.fromkeys(tasks, 36), **{kind: dict.fromkeys(tasks, x) for kind, x in of_tasks.items()},
        redundancy=Estimate(1.0, 0.98, 1.0), joint={"score": Estimate(0.5, 0.4, 0.6), "best": Estimate(-0.1, -0.2, 0.0), "mean": Estimate(0.0, -0.1, 0.1)},
    )  # fmt: skip
    store_measured(replace(measured, by_task=by_task), tmp_path, made={})
    again, content = load_measured(measured.name, tmp_path)
    verdicts = {row["claim"]: row["verdict"] for row in content["rows"]}
    assert [verdicts[key] for key in ("C4", "C4a", "C5")] == ["holds", "holds", "does not hold"]
    assert [row for row in again.claims() if row["claim"] in ("C4", "C4a", "C5")] == by_task.claims()
    assert {row["claim"]: row["verdict"] for row in measured.claims()}["C4"] == claims.NOT_MEASURED


def test_every_recipe_is_stored_and_nothing_else() -> None:
    assert set(STORED) == set(RECIPES)


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_weights_that_are_embedded_are_those_that_were_measured(name: str) -> None:
    """And a CPU measures on them what a GPU did."""
    found = stored_on(name)
    assert found is not None
    measured, _ = found
    assert measured.name == f"{name}-text-0"
    model, tokenizer = load_model(name), load_tokenizer(name)
    books = draw_texts(tokenizer).windows[:2]
    assert token_nats(model, books).mean(1) == pytest.approx(measured.removal.intact[:2], abs=1e-4)
    arm = next(arm for arm in measured.removal.arms if (arm.scheme, arm.order, arm.share) == (PROTECTED, HIGH, 0.25))
    with ablate_heads(model, [measured.removal.heads[index] for index in arm.heads]):
        without = token_nats(model, books).mean(1)
    assert without - measured.removal.intact[:2] == pytest.approx(
        measured.removal.added(PROTECTED, HIGH, 0.25)[:2], abs=1e-4
    )


# ---------------------------------------------------------------- the page


def test_the_figures_of_the_ladder_show_what_is_stored(tmp_path: Path) -> None:
    ladder_figures(tmp_path, tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".csv"}
    with (tmp_path / "ladder-layers.csv").open() as stream:
        drawn = {(row["panel"], row["series"], float(row["x"])): float(row["y"]) for row in csv.DictReader(stream)}
    measured, _ = stored_models()["hybrid-softmaxfirst-0"]
    expected = measured.removal.added(LAYERS, HIGH, 0.25).mean()
    assert drawn["hybrid-softmaxfirst", "highest ranks", 25.0] == pytest.approx(expected)
    assert len({panel for panel, *_ in drawn}) == len(designs())


def test_the_section_on_sparse_states_says_what_is_stored(tmp_path: Path) -> None:
    measured, content = stored_models()["hybrid-sse-0"]
    groups = measured.groups["end"]
    ranks = groups.rank["prose"].mean(0).reshape(9, 5, 8)  # layer, state, value head
    kinds = kinds_of_states()
    assert np.array_equal(kinds["shared states"].rank, ranks[:, 0].ravel())
    assert np.array_equal(kinds["partitions"].rank, ranks[:, 1:].ravel())
    decay = groups.log_decay["prose"].mean(0).reshape(9, 5, 8)[:, 1:].ravel()
    for written, factor in ((False, 1), (True, 4)):
        expected = np.minimum(64, 1 + math.log(1e4) / np.abs(decay * factor))
        np.testing.assert_allclose(kinds["partitions"].by_law(written=written), expected, rtol=1e-5)
        assert f"{strata.explained(expected, ranks[:, 1:].ravel()):.2f}" in expansion_tables()["sse_laws"]
    assert (
        f"{content['training']['bits_per_byte_held_out_books']:.3f} bits per byte" in expansion_tables()["sse_answer"]
    )
    # what the page says without numbers
    assert kinds["partitions"].low() > 0.5 > 0.2 > kinds["shared states"].low()
    assert all((kinds[kind].initial > 0.8 * 64).mean() > 0.5 for kind in ("partitions", "shared states"))
    two_groups = [strata.two_group_share(of.rank / of.d) for of in kinds.values()]
    assert max(two_groups[1:]) < two_groups[0]
    assert f"{kinds['partitions'].low():.0%} of the partitions" in neighbours_table()
    by_norm, by_rank = (measured.removal.cost(LAYERS, order, 0.25) for order in ("small norm", LOW))
    assert by_norm < 0.01 < 0.5 < by_rank
    expansion_figure(tmp_path, tmp_path)
    with (tmp_path / "ladder-sse.csv").open() as stream:
        drawn = [float(row["y"]) for row in csv.DictReader(stream) if row["series"] == "partitions"]
    assert drawn == pytest.approx([*ranks[:, 1:].ravel()] * 2)


def test_a_repeated_training_is_the_same_recipe_with_other_weights() -> None:
    shown = stored_models()
    repeats = {name: load_measured(name, LADDER / "repeats")[1] for name in ("hybrid-text-0", "hybrid-text-1")}
    for name, other in repeats.items():
        content = shown[name][1]
        assert other["training"]["recipe"] == content["training"]["recipe"]
        assert other["provenance"]["checkpoints"] != content["provenance"]["checkpoints"]
    said = ladder_tables()["ladder_repeats"]
    assert [name in said for name in repeats] == [True, True]
    changed = [
        row["claim"]
        for row, again in zip(shown["hybrid-text-0"][1]["rows"], repeats["hybrid-text-0"]["rows"], strict=True)
        if row["verdict"] != again["verdict"]
    ]
    assert f"{len(changed)} of 16 verdicts differ" in said
    assert all(f"| `hybrid-text-0` | {claim} |" in said for claim in changed)
