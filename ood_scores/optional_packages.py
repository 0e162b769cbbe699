"""Packages that only some uses need: whether they are installed, and the error that says how to install them."""

from __future__ import annotations

from importlib import import_module

from ood_scores.errors import MissingPackage


def installed(*modules: str) -> bool:
    """Return whether all of some modules can be imported."""
    return not any(map(_is_missing, modules))


def require(use: str, extra: str, *modules: str) -> None:
    """Raise MissingPackage, with the command that installs them, unless all of some modules can be imported.

    Args:
        use: who needs them, with a verb: "figures need".
        extra: the extra of ``setup.cfg`` that installs them.
        *modules: the modules.
    """
    for module in filter(_is_missing, modules):
        raise MissingPackage(f"{use} {module}, which is not installed: {install(extra)}.")


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f'pip install "ood_scores[{extra}]"'


def _is_missing(module: str) -> bool:
    try:
        import_module(module)
    except ModuleNotFoundError:
        return True
    return False
