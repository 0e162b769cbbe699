"""Models of Hugging Face's transformers: ``hf:OWNER/NAME`` on the hub, or a folder that ``save_pretrained`` wrote.

The class is the one that saved the model, one of transformers itself: code in a repository is never run.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ood_scores.errors import BadInput, CheckpointError, UnknownName
from ood_scores.models.checkpoints import first_sentence
from ood_scores.models.hub import hub_file, unreachable
from ood_scores.models.kinds.base import MODEL_KINDS, ModelKind
from ood_scores.models.origin import network_of
from ood_scores.models.processors import ProcessorTransform
from ood_scores.models.zero_shot.build import tokenizer_of_transformers
from ood_scores.optional_packages import require
from ood_scores.user_warnings import warn_user

CLASSES = ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification", "Model", "WithProjection")
"""Endings of the names of classes that are opened."""

DESCRIPTION = "config.json"
PROCESSOR = "preprocessor_config.json"


class TransformersModel(ModelKind):
    """A repository of the hub, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``, or a folder."""

    form = "hf:OWNER/NAME"
    offline = False

    def check(self, target: str, arguments: Mapping[str, Any]) -> None:
        if not target:
            raise BadInput(f"the name of the model is missing: write {self.form}, or hf:FOLDER.")
        others = sorted(arguments.keys() - {"num_classes"})
        if others:
            raise BadInput(f"a model of transformers has no argument {others[0]!r}: its config.json has all of them.")

    def create(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        return _created(self._class_name(target), self._config(target), **arguments)

    def open(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        cls = _model_class(self._class_name(target))
        model, found = _loaded(cls, target)
        if found["missing_keys"] and all(map(_is_of_pooler, found["missing_keys"])) and _has_optional_pooler(cls):
            model, found = _loaded(cls, target, add_pooling_layer=False)
        lacking = [*found["missing_keys"], *found["mismatched_keys"]]
        if lacking:
            raise CheckpointError(f"{target} has no weights for {lacking[0]} of {cls.__name__}: save the model again.")
        if found["unexpected_keys"]:
            warn_user(
                f"{target} has weights that {cls.__name__} does not use, such as {min(found['unexpected_keys'])}."
            )
        for parameter in model.parameters():  # mapped from the file, whose alignment changes how sums are rounded
            parameter.data = parameter.data.clone()
        return model

    def sizes(self, target: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return super().sizes(target, state, arguments) | _without_pooler(self.create(target, arguments), state)

    def renamed(self, model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return _renamed(model, state)

    def transform(self, model: nn.Module, target: str) -> ProcessorTransform | None:
        try:
            self._file(target, PROCESSOR)
        except CheckpointError:
            return None
        if "pixel_values" not in inspect.signature(model.forward).parameters:
            return None
        where, options = _place(target)
        try:
            return ProcessorTransform(_library().AutoImageProcessor.from_pretrained(where, **options))
        except Exception as error:  # of a file with any content, and of packages that are not installed
            raise CheckpointError(
                f"transformers cannot open the image processor of {target} ({first_sentence(error)}): save it again, "
                f"or remove {PROCESSOR} and pass a preprocessing of your own."
            ) from error

    def tokenizer(self, target: str) -> Any:
        where, options = _place(target)
        return tokenizer_of_transformers(where, **options)

    def again(self, model: nn.Module, target: str, arguments: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        return network_of(model)

    def _class_name(self, target: str) -> str:
        names = self._config(target).get("architectures") or [None]
        return str(names[0])

    def _config(self, target: str) -> dict[str, Any]:
        path = self._file(target, DESCRIPTION)
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is not a description of a model ({error}): save the model again.") from error

    def _file(self, target: str, name: str) -> Path:
        where, _ = _place(target)
        if not Path(where).is_dir():
            return hub_file(target, (name,))
        if not (Path(where) / name).is_file():
            raise CheckpointError(f"there is no {name} in {where}: pass a folder that save_pretrained wrote.")
        return Path(where) / name


class TransformersClass(ModelKind):
    """A class of transformers, whose configuration is the argument ``config``. Detectors store this kind."""

    form = "transformers:CLASS"

    def check(self, target: str, arguments: Mapping[str, Any]) -> None:
        others = sorted(arguments.keys() - {"config", "num_classes"})
        if others:
            raise BadInput(f"a model of transformers has no argument {others[0]!r}: remove it.")
        _model_class(target)

    def create(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        if not isinstance(arguments.get("config"), Mapping):
            raise BadInput(
                f"{self.form} is for detectors, which store a configuration: write hf:OWNER/NAME or hf:FOLDER."
            )
        return _created(target, **arguments)

    def open(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        raise BadInput(f"{self.form} has no weights of its own: write hf:OWNER/NAME or hf:FOLDER.")

    def sizes(self, target: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return super().sizes(target, state, arguments) | _without_pooler(self.create(target, arguments), state)

    def again(self, model: nn.Module, target: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return f"transformers:{target}", dict(arguments)


def _library() -> Any:
    require("models of Hugging Face need", "hub", "transformers")
    import transformers

    return transformers


def _place(target: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or repository that a name stands for, and the arguments of ``from_pretrained``."""
    folder = Path(target).expanduser()
    if folder.is_dir():
        return str(folder), {"local_files_only": True}
    name, _, revision = target.partition("@")
    return name, {"revision": revision} if revision else {}


def _model_class(name: str) -> Any:
    transformers = _library()
    cls = getattr(transformers, name, None) if name.endswith(CLASSES) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel) or name.startswith("Timm"):
        raise UnknownName(
            f"transformers {transformers.__version__} has no classifier or encoder {name!r}: write hf-hub:OWNER/NAME "
            "for a model of timm, and FILE.py:FUNCTION for a class of your own."
        )
    return cls


def _loaded(cls: Any, target: str, **pooler: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with its own weights, and the names of those that it lacks or that are not its own."""
    where, options = _place(target)
    try:
        with _quiet():
            return cls.from_pretrained(where, output_loading_info=True, **options, **pooler)
    except (OSError, ValueError, RuntimeError) as error:
        if Path(where).is_dir():
            raise CheckpointError(
                f"transformers cannot open the weights in {where} ({first_sentence(error)}): save the model again."
            ) from error
        raise unreachable(target, error) from error


def _without_pooler(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, bool]:
    """Return the argument of a network for weights without those of its pooling layer, as of DINO."""
    needs = _has_optional_pooler(type(model)) and any(map(_is_of_pooler, model.state_dict()))
    lacks = needs and not any(map(_is_of_pooler, state))
    return {"add_pooling_layer": False} if lacks else {}


def _has_optional_pooler(cls: Any) -> bool:
    return "add_pooling_layer" in inspect.signature(cls.__init__).parameters


def _is_of_pooler(name: str) -> bool:
    return "pooler" in name.split(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the bar and the table of weights that transformers prints: what is wrong with them is an error here."""
    logger = _library().utils.logging
    verbosity, has_bar = logger.get_verbosity(), logger.is_progress_bar_enabled()
    try:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
        yield
    finally:
        logger.set_verbosity(verbosity)
        if has_bar:
            logger.enable_progress_bar()


def _renamed(model: Any, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights under the names of a model: ``save_pretrained`` of transformers 5 writes some under older ones."""
    if state.keys() == model.state_dict().keys():
        return state
    options: dict[str, Any] = {"config": model.config, "state_dict": dict(state), "output_loading_info": True}
    pooler = {} if getattr(model, "pooler", True) is not None else {"add_pooling_layer": False}
    try:
        with _quiet():
            loaded, found = type(model).from_pretrained(None, **options, **pooler)
    except Exception:  # of weights of any kind, whose names are then reported
        return state
    return state if any(found.values()) else loaded.state_dict()


def _created(class_name: str, config: Mapping[str, Any], num_classes: int | None = None, **pooler: bool) -> nn.Module:
    """Create a model with random weights; ``pooler`` is ``add_pooling_layer=False``, or nothing."""
    cls = _model_class(class_name)
    try:
        described = cls.config_class.from_dict({**config, "use_pretrained_backbone": False})
        if num_classes is not None:
            described.num_labels = num_classes
        model = cls(described, **pooler)
    except Exception as error:  # of a configuration with any content
        raise BadInput(f"{class_name} cannot be created ({first_sentence(error)}): check its configuration.") from error
    return model.to(described.dtype or next(model.parameters()).dtype)


MODEL_KINDS["hf"] = TransformersModel()
MODEL_KINDS["transformers"] = TransformersClass()
