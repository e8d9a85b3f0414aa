"""What a notebook is asked for by its parameters: models, sizes, where its result goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, Markdown
from myst_nb import glue
from transformers import PreTrainedModel

from staterank_utils import markdown, plotting
from staterank_utils.dispatch import limit_autotuning
from staterank_utils.models import DTYPES, load_model, load_tokenizer
from staterank_utils.results import check_parameters, write_table
from staterank_utils.studies.repeated import RepeatedGroups, RepeatedRecall, RepeatedRemoval, write_chapter

Said = str | Mapping[str, Mapping[str, str]]  # a text; or model -> quantity -> number
TEXTS = ("model", "revision", "device", "dtype", "profile", "results_folder")


@dataclass(frozen=True)
class Run:
    """The parameters of a notebook, checked.

    Attributes:
        models: embedded names, folders or hub ids, in the order given.
        where: "revision" and "device", as `load_model` takes them.
        dtype: of the weights, as `load_model` takes it.
        quick: whether the profile is "quick".
        sizes: name of a size -> its value, and "seed".
        file: where the result is stored; None where it is not.
        parameters: what the result says it was made with.

    Example:
        >>> run = setup({"model": "hybrid, pure", "profile": "quick", "seed": 0}, "page", n_prompts=(2, 16))
        >>> run.models, run.sizes, run.file
        (('hybrid', 'pure'), {'n_prompts': 2, 'seed': 0}, None)
    """

    models: tuple[str, ...]
    where: Mapping[str, str | None]
    dtype: torch.dtype | None
    quick: bool
    sizes: Mapping[str, int]
    file: Path | None
    parameters: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """Of prompts, draws and controls."""
        return self.sizes["seed"]

    def load(self, name: str) -> tuple[PreTrainedModel, Any]:
        """One of the models, and its tokenizer.

        Args:
            name: from `models`.

        Raises:
            ValueError, OSError: as in `load_model` and `load_tokenizer`.
        """
        revision, device = self.where["revision"], self.where["device"]
        tokenizer = load_tokenizer(name, revision=revision)
        return load_model(name, revision=revision, device=device, dtype=self.dtype), tokenizer

    def keep(self, figure: str, rows: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Store the numbers behind a figure as FIGURE.csv beside the result, if that is stored.

        Args:
            figure: its name on the page.
            rows: its numbers; None: those that the current figure of pyplot shows.

        Raises:
            ValueError: nothing was drawn. Where all that was drawn is undefined, there is nothing to store.
            OSError: the file system's own error.
        """
        if self.file is None:
            return
        drawn = rows if rows is not None else [ax for ax in plt.gcf().axes if ax.has_data()]
        if not drawn:
            raise ValueError(f"{figure} shows no numbers: draw it before its numbers are kept")
        if shown := plotting.figure_data(plt.gcf()) if rows is None else rows:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_table(self.file.with_name(f"{figure}.csv"), shown)

    @staticmethod
    def say(said: Mapping[str, Said]) -> None:
        """Put texts and tables where the page names them.

        Args:
            said: name on the page -> text, or for a table model -> quantity -> number.
        """
        for key, of in said.items():
            glue(key, of if isinstance(of, str) else Markdown(markdown.per_model(of)), display=False)

    def conclude(
        self,
        said: Mapping[str, Said],
        rows: Sequence[Mapping[str, Any]],
        found: Mapping[str, RepeatedGroups | RepeatedRemoval | RepeatedRecall],
        *,
        badges: Sequence[str],
    ) -> None:
        """Put texts and badges where the page names them, and store the result if it is to be stored.

        Args:
            said: as in `say`; of "answer" the first sentence is `answer` on the page, the rest `more`.
            rows: verdicts.
            found: name of the model -> what the page shows of it.
            badges: the claims whose verdicts stand under the answer, as `badges` on the page.

        Raises:
            ValueError, OSError: as in `write_chapter`.
        """
        answer = str(said["answer"])
        first, rest = markdown.in_two(answer)
        self.say({**said, "answer": first, "more": rest})
        glue("badges", HTML(markdown.badges(rows, badges)), display=False)
        if self.file:
            write_chapter(self.file, parameters=self.parameters, rows=rows, found=found, answer=answer)


def setup(namespace: dict[str, Any], page: str, **sizes: tuple[int, int]) -> Run:
    """Check the parameters of a notebook, and read them; on a GPU, `limit_autotuning`.

    Args:
        namespace: `globals()` of the notebook, in the cell after its parameters.
        page: name of the notebook; its result is `RESULTS_FOLDER/PAGE.json`.
        sizes: name of a parameter -> its value in the quick and in the full profile; a parameter of 0 takes these.

    Raises:
        ValueError, TypeError: as in `check_parameters`; no model; a dtype that is not of `DTYPES`; or a size under 0.

    Example:
        >>> setup({"model": "pure", "n_prompts": 3, "profile": "full"}, "page", n_prompts=(2, 16)).sizes["n_prompts"]
        3
    """
    check_parameters(namespace, texts=TEXTS, numbers=("seed", *sizes))
    given = {name: namespace.get(name, "") for name in TEXTS}
    models = tuple(name.strip() for name in given["model"].split(",") if name.strip())
    if not models:
        raise ValueError(
            f"parameter 'model' names no model, got {given['model']!r}: give an embedded name, a folder or a hub id"
        )
    if given["dtype"] not in ("", *DTYPES):
        raise ValueError(
            f"parameter 'dtype' takes {' or '.join(DTYPES)}, or nothing for the default of the device, got {given['dtype']!r}"
        )
    quick = given["profile"] == "quick"
    chosen = {name: namespace.get(name, 0) or values[0 if quick else 1] for name, values in sizes.items()}
    if wrong := [name for name, value in chosen.items() if value < 1]:
        raise ValueError(
            f"parameter {wrong[0]!r} must be at least 1, or 0 for what the profile says, got {chosen[wrong[0]]}"
        )
    chosen["seed"] = namespace.get("seed", 0)
    limit_autotuning()
    return Run(
        models,
        {"revision": given["revision"] or None, "device": given["device"] or None},
        DTYPES.get(given["dtype"]),
        quick,
        chosen,
        Path(given["results_folder"], f"{page}.json") if given["results_folder"] else None,
        {**{name: given[name] for name in ("model", "revision", "dtype", "profile")}, **chosen},
    )  # fmt: skip
