"""Models that are handed on: chosen by a rule, measured, written with a card, loaded by others."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import tiny_qwen3_next
from transformers import AutoModelForCausalLM

from staterank_utils.architectures import linear_layers
from staterank_utils.dispatch import choose_kernels
from staterank_utils.evaluation import token_nats
from staterank_utils.models import load_model
from staterank_utils.pruned import plain_model
from staterank_utils.pruning import prune_heads
from staterank_utils.selection import measure_heads
from staterank_utils.studies.handover import RULES, Cost, model_card, prune_by_rule, write_pruned
from staterank_utils.studies.texts import draw_texts
from staterank_utils.surgery import ablate_heads

FEW = {"n_windows": 2, "window": 64, "n_calibration": 1}


@pytest.fixture(scope="module")
def made(hybrid, tokenizer):
    return prune_by_rule(hybrid, tokenizer, rule="rank", share=0.25, per_layer=True, **FEW)


def test_the_cost_is_that_of_ablating_the_heads_that_the_rule_names(hybrid, tokenizer, made) -> None:
    _, cost = made
    texts = draw_texts(tokenizer, n_windows=2, window=64, n_copies=0, copy=1, n_calibration=1)
    rank = measure_heads(hybrid, texts.calibration)["effective rank"]
    for layer, heads in cost.removed.items():
        others = [rank[layer, head] for head in range(16) if head not in heads]
        assert len(heads) == 4
        assert min(rank[layer, head] for head in heads) >= max(others)
    with ablate_heads(hybrid, [(layer, head) for layer, heads in cost.removed.items() for head in heads]):
        ablated = token_nats(hybrid, texts.windows).mean(1)
    np.testing.assert_allclose(cost.without, ablated, atol=1e-4)
    assert cost.added()["mean"].point == pytest.approx(
        (ablated - token_nats(hybrid, texts.windows).mean(1)).mean(), abs=1e-4
    )
    assert cost.after.recurrent == 0.75 * cost.before.recurrent


@pytest.mark.parametrize("rule", RULES)
def test_a_card_says_which_heads_were_removed_by_which_rule(rule: str, made) -> None:
    cost = dataclasses.replace(made[1], rule=rule)
    said = {
        "rank": "highest effective rank", "low-rank": "lowest effective rank", "joint": "rank and nuclear norm together",
        "norm": "largest nuclear norm", "half-life": "longest half-life", "random": "at random (seed 0)",
    }  # fmt: skip
    card = model_card("OWNER/NAME", cost)
    assert [name for name, words in said.items() if words in card] == [rule]
    for layer, heads in cost.removed.items():
        assert f"| {layer} | {', '.join(map(str, heads))} |" in card


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_orders_all_heads_and_no_two_are_the_same(rule: str, hybrid, tokenizer) -> None:
    prompts = draw_texts(tokenizer, n_windows=1, window=64, n_copies=0, copy=1, n_calibration=1).calibration
    measures = measure_heads(hybrid, prompts)
    orders = {
        name: sorted(measures["effective rank"], key=lambda head: of(measures, 64)[head]) for name, of in RULES.items()
    }
    assert len(orders[rule]) == 144
    assert all(orders[rule] != order for name, order in orders.items() if name != rule)


def test_the_card_of_a_model_of_fla_says_what_it_needs(made) -> None:
    _, cost = made
    assert "pass `use_cache=False` there" in model_card("OWNER/NAME", cost, of_fla=True)
    assert "flash-linear-attention" not in model_card("OWNER/NAME", cost)


@pytest.mark.parametrize("plain", [False, True])
def test_the_card_says_how_to_load_it_and_that_works_elsewhere(plain: bool, made, tokenizer, tmp_path: Path) -> None:
    pruned, cost = made
    write_pruned(tmp_path / "smaller", pruned, tokenizer, cost, base="OWNER/NAME", plain=plain)
    card = (tmp_path / "smaller" / "README.md").read_text()
    assert "base_model: OWNER/NAME" in card
    assert f"{cost.added()['mean']:.3f}" in card
    assert "| 10 | " in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert ("staterank" in code) != plain
    # On a machine without a GPU transformers takes fla's kernels all the same, which die there; where it is plain, ours are chosen here.
    kernels = "from staterank_utils.dispatch import choose_kernels; choose_kernels(model)\n" if plain else ""
    program = f"{code}{kernels}import torch\nprint(model(torch.arange(9).reshape(1, 9)).logits[0, -1, :5].tolist())"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    with torch.no_grad():
        expected = pruned(torch.arange(9).reshape(1, 9)).logits[0, -1, :5]
    assert json.loads(done.stdout) == pytest.approx(expected.tolist(), abs=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smaller"]


def test_a_plain_model_is_the_same_network_also_after_a_second_removal_and_on_one_head() -> None:
    model = tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"])
    ids = torch.randint(0, 64, (2, 40))
    once = prune_heads(model, {0: [0, 1], 2: [2, 3]})
    twice = prune_heads(once, {0: [3], 2: [1]})
    for pruned, (n_heads, n_keys) in ((once, (2, 1)), (twice, (1, 1))):
        plain = plain_model(pruned)
        assert type(plain) is type(model)
        assert (plain.config.linear_num_value_heads, plain.config.linear_num_key_heads) == (n_heads, n_keys)
        assert not hasattr(plain.config, "removed_heads")
        assert torch.equal(plain(ids).logits, pruned(ids).logits)
    assert model.config.linear_num_value_heads == 4


def test_a_plain_model_where_layers_keep_different_numbers_of_key_heads() -> None:
    model = tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"])
    pruned, ids = prune_heads(model, {0: [0, 1], 2: [0, 2]}), torch.randint(0, 64, (2, 40))
    assert [layer.n_keys for layer in linear_layers(pruned)] == [1, 2]
    plain = plain_model(pruned)
    assert (plain.config.linear_num_value_heads, plain.config.linear_num_key_heads) == (2, 2)
    torch.testing.assert_close(plain(ids).logits, pruned(ids).logits, atol=1e-5, rtol=0)
    assert [layer.n_keys for layer in linear_layers(pruned)] == [1, 2]


def test_duplicates_that_were_trained_apart_are_not_made_one_again() -> None:
    pruned = prune_heads(tiny_qwen3_next(["linear_attention"]), {0: [0]})
    assert linear_layers(pruned)[0].keys == [0, 1, 1]
    prune_heads(pruned, {0: [1]})
    with torch.no_grad():
        linear_layers(pruned)[0].module.in_proj_qkvz.weight.normal_()
    with pytest.raises(ValueError, match="duplicates of key head 1 of layer 0 were trained apart"):
        prune_heads(pruned, {0: [1]})
    prune_heads(pruned, {0: [2]})  # leaves one of them


def test_duplicates_that_were_trained_apart_may_stay_apart() -> None:
    model = tiny_qwen3_next(["linear_attention"], n_v=8)
    pruned, both = prune_heads(model, {0: [0]}), prune_heads(model, {0: [0, 1, 2]})
    with torch.no_grad():
        linear_layers(pruned)[0].module.in_proj_qkvz.weight[-1] += 1  # of the last duplicate
    again = prune_heads(pruned, {0: [1, 2]})
    assert linear_layers(again)[0].keys == linear_layers(both)[0].keys == [0, 1, 1, 1, 1]
    ids = torch.randint(0, 64, (2, 40))
    with ablate_heads(pruned, [(0, 1), (0, 2)]):
        expected = pruned(ids).logits
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen3_5", "olmo_hybrid"])
def test_other_classes_that_can_say_fewer_heads(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].build()
    choose_kernels(model)
    heads = {
        layer: [0, 1]
        for layer in range(8)
        if layer in {index for index, _ in measure_heads(model, torch.ones(1, 8, dtype=torch.long))["effective rank"]}
    }
    pruned = prune_heads(model, heads)
    plain = plain_model(pruned)
    ids = torch.randint(3, 56, (1, 20))
    torch.testing.assert_close(plain(ids).logits, pruned(ids).logits, atol=2e-5, rtol=0)


def test_what_cannot_be_plain_is_refused() -> None:
    model = tiny_qwen3_next(["linear_attention", "linear_attention"])
    with pytest.raises(ValueError, match="was not pruned"):
        plain_model(model)
    with pytest.raises(ValueError, match=r"different numbers of heads \(3 in layer 0, 4 in layer 1\)"):
        plain_model(prune_heads(model, {0: [1]}))
    with pytest.raises(ValueError, match="cannot say in its configuration"):
        plain_model(prune_heads(ARCHITECTURES["mamba2"].build(), {0: [0]}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rule": "best", "share": 0.5}, "there is no rule 'best': choose from rank"),
        ({"rule": "rank", "share": 0.0}, "between 0 and 1, got 0.0"),
        ({"rule": "rank", "share": 1.0}, "between 0 and 1, got 1.0"),
        ({"rule": "rank", "share": 0.001}, "0.001 of 144 heads rounds to not one: ask for a larger share"),
        ({"rule": "rank", "share": 0.999}, "0.999 of 144 heads rounds to all: ask for a smaller share"),
        (
            {"rule": "rank", "share": 0.01, "per_layer": True},
            "0.01 of the 16 heads of a layer rounds to not one: ask for a larger share",
        ),
    ],
)
def test_a_rule_or_share_that_does_not_exist_is_refused(options: dict, reason: str, hybrid, tokenizer) -> None:
    with pytest.raises(ValueError, match=reason):
        prune_by_rule(hybrid, tokenizer, **options, **FEW)


def test_nothing_is_overwritten_and_nothing_is_left_half_written(made, tokenizer, tmp_path: Path, monkeypatch) -> None:
    pruned, cost = made
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        write_pruned(tmp_path / "there", pruned, tokenizer, cost, base="x")
    monkeypatch.setattr(Cost, "added", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_pruned(tmp_path / "new", pruned, tokenizer, cost, base="x")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_pruned_model_is_tuned_with_adapters_and_merged(made, tokenizer, tmp_path: Path) -> None:
    pruned, cost = made
    write_pruned(tmp_path / "smaller", pruned, tokenizer, cost, base="OWNER/NAME")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    ids = torch.arange(40).reshape(2, 20)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj_qkvz", "out_proj"], r=4))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        losses.append(adapted(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"))
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-4, rtol=0)
    assert len(measure_heads(again, ids)["effective rank"]) == 108
