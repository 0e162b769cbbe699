"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ood_scores.cli import completion, parsing
from ood_scores.cli.printing import answering
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.user_code import import_code

Model = Annotated[
    str, typer.Argument(help="Name of a model: timm's, hf-hub:, local-dir:, torchvision:, hf:, or FILE.py:FUNCTION.")
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="File with weights, .safetensors or .pth; defaults to the model's own weights.")
]
NumClasses = Annotated[
    int | None,
    typer.Option(min=1, max=1_000_000, help="Number of classes of the checkpoint, if it cannot be inferred."),
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Argument of the network as KEY=VALUE; may be repeated."),
]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File with the names of the classes: one per line, or JSON."),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT|FILE", help="Text with {} for the name of a class, or a file of such; may be repeated."),
]
Negatives = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with nouns that may be no classes, for neglabel and csp.")
]
Adjectives = Annotated[Path | None, typer.Option(metavar="FILE", help="File with adjectives, for neglabel and csp.")]
Mean = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Normalization mean for pixels in [0, 1]; defaults to the model's."),
]
Std = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B", help="Normalization standard deviation for pixels in [0, 1]; defaults to the model's."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of images per batch.")]
Workers = Annotated[int, typer.Option(min=0, max=1024, help="Number of processes that load images.")]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1, …; auto uses a GPU if there is one.")]


Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE|FILE.py", help="Your own code to import first; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output instead of tables.")]


def takes_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--import``, for code of the user that is imported first, and ``--json``; see ``answer``."""
    signature = inspect.signature(command, eval_str=True)
    options = {"imports": (None, Imports), "as_json": (False, AsJson)}
    parameters = [
        *signature.parameters.values(),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (default, kind) in options.items()
        ),
    ]

    @functools.wraps(command)
    def run(*, imports: list[str] | None, as_json: bool, **given: Any) -> None:
        for name in imports or ():
            import_code(name)
        with answering(as_json):
            command(**given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def takes_extraction_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of ``ExtractionOptions``, in place of its ``**extraction``.

    The command receives those that differ from their defaults.
    """
    own = [
        each for each in inspect.signature(command, eval_str=True).parameters.values() if each.kind != each.VAR_KEYWORD
    ]
    parameters = [*own, *map(_parameter, fields(ExtractionOptions))]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {each.name: _value(each, given.pop(_name(each))) for each in fields(ExtractionOptions)}
        defaults = {each.name: each.default for each in fields(ExtractionOptions)}
        command(**given, **{name: value for name, value in values.items() if value != defaults[name]})

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _parameter(field: Field[Any]) -> inspect.Parameter:
    """Return the command-line option for a field."""
    name, default = _name(field), field.default
    kind: Any = str | None
    if field.metadata["choices"]:
        create: Any = Enum
        choices = create("Choices", {choice: choice for choice in field.metadata["choices"]})
        default, kind = (None, choices | None) if default is None else (choices[default], choices)
    elif field.metadata["flag"]:
        kind = bool if default is False else bool | None
    elif isinstance(default, tuple):
        default, kind = None, list[str] | None
    flag = f"--{name.replace('_', '-')}"
    if kind == bool | None:
        flag += f"/--no{flag[1:]}"
    option = typer.Option(
        flag,
        help=field.metadata["help"],
        metavar=field.metadata["metavar"],
        autocompletion=completion.probes if field.name == "probes" else None,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _name(field: Field[Any]) -> str:
    """Return the name of a field, in the singular if the option may be repeated."""
    return field.name.removesuffix("s") if isinstance(field.default, tuple) else field.name


def _value(field: Field[Any], given: Any) -> Any:
    """Return the value of a field from that of its command-line option."""
    if isinstance(given, Enum):
        return given.value
    if isinstance(field.default, tuple):
        return tuple(given or ())
    return parsing.layers(given) if field.name == "layers" else given
