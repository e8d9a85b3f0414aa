"""The command `staterank`: trace, prune or report on a model of one's own.

Nothing heavy is imported before a command runs, so that --help answers at once, and Ctrl-C at any moment.
"""

import logging
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

try:
    import typer  # which hears Ctrl-C once it is there
except KeyboardInterrupt:
    raise SystemExit(130) from None

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # which joins the lines of a paragraph
    pretty_exceptions_enable=False,
    help="Measure the recurrent states of a linear-attention model: their ranks, half-lives, and which heads can go.",
)


class Rule(StrEnum):
    """Which heads go first, by the name of a rule of `staterank_utils.studies.handover.RULES`.

    Example:
        >>> Rule("low-rank") == "low-rank"
        True
    """

    rank = "rank"
    low_rank = "low-rank"
    joint = "joint"
    norm = "norm"
    half_life = "half-life"
    random = "random"


class Profile(StrEnum):
    """How much a report measures.

    Example:
        >>> Profile("quick") == "quick"
        True
    """

    quick = "quick"
    full = "full"


class Dtype(StrEnum):
    """The dtype of weights, by its name in torch.

    Example:
        >>> [dtype.value for dtype in Dtype]
        ['float32', 'bfloat16']
    """

    float32 = "float32"
    bfloat16 = "bfloat16"


Model = Annotated[str, typer.Argument(help="a folder in Hugging Face format, a hub id, or an embedded name")]
Revision = Annotated[str | None, typer.Option(help="commit or tag, needed for a hub id")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... or auto; by default the GPU if there is one")]
Precision = Annotated[Dtype | None, typer.Option(help="by default float32 on a CPU, and the checkpoint's own on a GPU")]


# What an error of the package says -> what a command says that has these options.
SIZES = {"lower batch_size": "lower --prompts or --tokens", "n_prompts": "--prompts", "n_tokens": "--tokens"}
PRECISIONS = {f"dtype=torch.{dtype}": f"--dtype {dtype}" for dtype in Dtype}
EVERYWHERE = {"revision=...": "--revision", "device='auto'": "--device auto"}
WORDS = {
    "trace": {**EVERYWHERE, **SIZES, **PRECISIONS},
    "prune": {
        **EVERYWHERE,
        "lower batch_size, or ": "",
        "take shorter prompts or a model": "take a model",
        **PRECISIONS,
    },
    "report": {**EVERYWHERE, **SIZES, **PRECISIONS},
}


@contextmanager
def said(command: str) -> Iterator[None]:
    """A block whose errors are told in a line, with exit status 1, and a stop with 130; what is none of ours keeps its traceback.

    Args:
        command: a key of `WORDS`.

    Example:
        >>> with said("trace"):  # doctest: +IGNORE_EXCEPTION_DETAIL
        ...     raise ValueError("a share that there is not")
        Traceback (most recent call last):
            ...
        Exit: 1
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # by which batch systems and `timeout` end a job
    try:
        yield
    except KeyboardInterrupt:
        print(f"staterank: stopped{'; the same command goes on' if command == 'report' else ''}", file=sys.stderr)
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, ModuleNotFoundError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":  # that of torch
            raise
        print(f"staterank: {in_options(str(error), command)}", file=sys.stderr)
        raise typer.Exit(1) from None


def _prepare() -> None:
    """Import what takes long, and keep kernels of a GPU from being tuned anew."""
    from staterank_utils.dispatch import limit_autotuning

    limit_autotuning()


def in_options(message: str, command: str) -> str:
    """An error of the package in the words of a command.

    Args:
        message: of the error.
        command: a key of `WORDS`.

    Example:
        >>> in_options("too few for 4 prompts of 512: lower n_prompts or n_tokens", "trace")
        'too few for 4 prompts of 512: lower --prompts or --tokens'
    """
    for name, option in WORDS[command].items():
        message = message.replace(name, option)
    return message


def _say_version(asked: bool) -> None:
    if asked:
        print(metadata.version("staterank-utils"))
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="say what is chosen: kernels, dtypes, devices")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="print the version, and nothing else"),
    ] = False,
) -> None:
    """Set up the log.

    Example:
        >>> from typer.testing import CliRunner
        >>> "trace" in CliRunner().invoke(app, ["--help"]).stdout
        True
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", message="Triton is not supported")  # by which fla says that there is no GPU


@app.command()
def trace(
    model: Model,
    text: Annotated[
        str, typer.Option(help="what the model reads: a text file, or a built-in domain such as prose or code")
    ] = "prose",
    tokens: Annotated[int, typer.Option(min=1, help="length of a prompt")] = 512,
    prompts: Annotated[int, typer.Option(min=1, help="how many prompts, of which means are printed")] = 4,
    out: Annotated[Path | None, typer.Option(help="write every head's numbers into this new file, as CSV")] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Print ranks, norms and half-lives of every layer, after the last token of some prompts.

    Effective rank is the number of singular values over 1e-4 of the largest; a half-life is the number of tokens after which a state has lost
    half of what it held, by the head's mean decay; the layer's is by the median of its heads. The last column is the share of heads whose rank is not
    between 0.2 and 0.8 of the largest possible one.

    Example: staterank trace ./my-model --text notes.txt --out heads.csv
    \f

    Example:
        >>> from typer.testing import CliRunner
        >>> CliRunner().invoke(app, ['trace', 'nowhere']).exit_code
        1
    """
    with said("trace"):
        if out and out.is_dir():
            raise IsADirectoryError(f"{out} is a folder: give the name of a file in it")
        if out and out.exists():
            raise FileExistsError(f"{out} is there already: choose another name, or remove it")
        if "." in text and not text.startswith("dataset:") and not Path(text).exists():
            raise FileNotFoundError(
                f"there is no file {text}, and no built-in text of that name: give a text file, or a built-in text such as prose or code"
            )
        _prepare()
        from staterank_utils.architectures import linear_layers, state_size
        from staterank_utils.markdown import markdown_table
        from staterank_utils.models import DTYPES, load_model, load_tokenizer, model_outline
        from staterank_utils.results import check_writable, write_table
        from staterank_utils.selection import by_layer, head_metrics
        from staterank_utils.surgery import all_heads
        from staterank_utils.tasks import DOMAINS, domain_prompts
        from staterank_utils.tracing import check_dtype, check_even

        is_file = text not in DOMAINS and Path(text).exists()
        if is_file and Path(text).is_dir():
            raise IsADirectoryError(f"{text} is a folder: give a text file, or a built-in text such as prose or code")
        domain = f"./{text}" if is_file and "/" not in text else text
        if out:
            check_writable(out)
        layers, weights = linear_layers(model_outline(model, revision=revision)), DTYPES[dtype] if dtype else None
        check_even(layers)
        check_dtype(layers, weights)
        tokenizer = load_tokenizer(model, revision=revision)
        ids = domain_prompts(domain, tokenizer, n_prompts=prompts, n_tokens=tokens, seed=0)
        network = load_model(model, revision=revision, device=device, dtype=weights)
        measured, d = head_metrics(network, ids), state_size(network)
        rows = [
            (
                f"{layer.index}", f"{of['effective_rank']:.1f}", f"{rank.min():.1f} to {rank.max():.1f}", f"{of['nuclear_norm']:.3g}",
                f"{of['half_life']:.3g}", f"{of['share_outside']:.0%}",
            )
            for layer, rank, of in zip(linear_layers(network), measured["effective_rank"], by_layer(measured, d), strict=True)
        ]  # fmt: skip
        head = (
            "layer",
            f"rank (of {d})",
            "lowest to highest",
            "nuclear norm",
            "half-life, tokens",
            "outside (0.2, 0.8)",
        )
        print(markdown_table(head, rows))
        if out:
            tables = {**measured, "half_life": math.log(2) / measured["log_decay"].abs()}
            tables.pop("log_decay")
            numbers = {name: table.flatten().tolist() for name, table in tables.items()}
            heads = [
                {"layer": layer, "head": number, **{name: of[place] for name, of in numbers.items()}}
                for place, (layer, number) in enumerate(all_heads(network))
            ]
            out.parent.mkdir(parents=True, exist_ok=True)
            write_table(out, heads)
            print(f"{len(heads)} heads in {out}")


def _check_share(share: float) -> float:
    if not 0 < share < 1:
        raise typer.BadParameter(f"lies between 0 and 1, got {share}")
    return share


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder of the smaller model, which is not there yet")],
    share: Annotated[float, typer.Option(callback=_check_share, help="of all heads, between 0 and 1")] = 0.25,
    rule: Annotated[
        Rule,
        typer.Option(
            help="which heads go first: of the highest rank, the lowest, the highest rank and norm together (the paper's score), "
            "the largest norm, the longest half-life, or at random"
        ),
    ] = Rule.rank,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="the same share of every layer")] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="write a model that loads without this package; needs --per-layer")
    ] = False,
    revision: Revision = None,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Remove heads for good, measure what it costs on text, and write the smaller model with a card that says both.

    Example: staterank prune ./my-model --share 0.25 --rule rank --out ./smaller
    \f

    Example:
        >>> from typer.testing import CliRunner
        >>> CliRunner().invoke(app, ['prune', 'nowhere', '--out', 'smaller']).exit_code
        1
    """
    with said("prune"):
        if out.exists():
            raise FileExistsError(f"{out} is there already: choose another folder, or remove it")
        if plain and not per_layer:
            raise ValueError("--plain needs as many heads in every layer: add --per-layer")
        _prepare()
        from staterank_utils.architectures import linear_layers
        from staterank_utils.models import DTYPES, load_model, load_tokenizer, model_outline, stored_license
        from staterank_utils.studies.handover import check_pruning, check_room, prune_by_rule, write_pruned

        outline = model_outline(model, revision=revision)
        check_pruning(outline, rule=rule, share=share, per_layer=per_layer)
        if plain and not (first := linear_layers(outline)[0]).heads_settings:
            raise ValueError(
                f"a model of {first.name} cannot say in its configuration that it has fewer heads: leave --plain out"
            )
        narrow = DTYPES[dtype] if dtype else None
        check_room(outline, out, share=share, dtype=narrow)
        tokenizer = load_tokenizer(model, revision=revision)
        network = load_model(model, revision=revision, device=device, dtype=narrow)
        pruned, cost = prune_by_rule(network, tokenizer, rule=rule, share=share, per_layer=per_layer)
        if dtype is None:  # exact: each weight was one of the checkpoint's
            pruned = pruned.to(outline.dtype)
        base = Path(model).resolve().name if Path(model).is_dir() else model
        licence = stored_license(model, revision=revision)
        write_pruned(out, pruned, tokenizer, cost, base=base, revision=revision, licence=licence, plain=plain)
        n_removed = sum(map(len, cost.removed.values()))
        print(f"{n_removed} of {cost.n_heads} heads removed; {cost.added()['mean']:.3f} nats per token added on text.")
        print(f"The model and its card are in {out}.")


@app.command()
def report(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder of the report")],
    profile: Annotated[
        Profile, typer.Option(help="how much is measured: minutes on two cores for a small model, or what needs a GPU")
    ] = Profile.quick,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="a chapter: 00_what_rank_measures, 01_stratification, 02_input_invariance, 03_ablation_asymmetry, "
            "04_joint_rank_norm_pruning or 05_memory_and_recall; may be given several times"
        ),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=2, help="prompts per measurement; by default what the profile says")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="length of a prompt; by default what the profile says")
    ] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Run the book's chapters on a model and write them as pages: OUT/index.html. The same command goes on where it was stopped; where a chapter could
    not be run, the others are there, the first page says why, and the exit status is 1.

    Example: staterank report ./my-model --out ./report
    \f

    Example:
        >>> from typer.testing import CliRunner
        >>> CliRunner().invoke(app, ['report', 'nowhere', '--out', 'report']).exit_code
        1
    """
    with said("report"):
        _prepare()
        from staterank_utils.report import write_report

        sizes = {name: size for name, size in (("n_prompts", prompts), ("n_tokens", tokens)) if size is not None}
        missing = write_report(
            model,
            out,
            revision=revision,
            profile=profile,
            device=device,
            dtype=dtype,
            only=only or (),
            parameters=sizes,
            in_words=partial(in_options, command="report"),
        )
        for name, why in missing.items():
            print(f"not run: {name}: {why}", file=sys.stderr)
        print(f"The report is in {out / 'index.html'}.")
        if missing:
            raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="staterank")
