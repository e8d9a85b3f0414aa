import pytest
from architectures import delta
from transformers import AutoConfig

from benchmarks import large


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_the_whole_path_runs_on_a_tiny_model_of_the_class(name: str) -> None:
    config = delta.MODELS[name]().config
    row = large.whole_path(config, "cpu", n_tokens=32, positions=(16, 32))
    assert row["layers"] == "2 linear of 3"
    assert row["state freed"] == "37.5%"  # 3 of 8 heads


def test_what_fits_is_computed_from_the_configuration() -> None:
    config = AutoConfig.for_model("qwen3_next")
    assert large.cut_to(config, 8).layer_types == config.layer_types[:8]
    assert large.layers_that_fit(config, 80e9) == 8
    assert large.layers_that_fit(config, 1e9) == 4
    assert large.layers_that_fit(config, 1e12) == 48
    row = large.needs(config)
    assert row["states of one prompt, MB"] == "75.5"  # 36 layers x 32 heads x 128 x 128 x 4 bytes
    assert (row["one GPU, 80 GB"], row["eight GPUs, 640 GB"]) == ("no", "yes")
