"""The direction of imports: no module imports one above it, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ood_scores"

FLOORS = (
    {"errors", "terminal", "version"},
    {"notebook", "user_warnings"},
    {"registry", "atomic", "progress", "runtime", "optional_packages"},
    {"parameters", "toml_tables", "transfers", "device_memory", "user_code"},
    {"features", "data"},
    {"models"},
    {"extraction"},
    {"probes", "scorers"},
    {"evaluation"},
    {"metrics", "plotting"},
    {"detector", "training"},
    {"benchmark", "testing"},
    {"demo", "sklearn", "integrations"},
    {"cli"},
    {"__main__"},
)
"""The rooms of the house from the ground up. A room imports from itself and from the floors below its own."""

FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below ``ood_scores``."""
    paths = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in paths.items() if parts != ("__init__",)}


def imported(module: str, source: str) -> Iterator[str]:
    """The modules of the package that a source imports, inside functions too, but not for type checkers alone."""
    package = module if modules().get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    for node in _executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            names = [f"{base}.{alias.name}" for alias in node.names] + [base]
        else:
            continue
        for name in names:
            inner = name.removeprefix("ood_scores.")
            if name.startswith("ood_scores.") and inner in modules():
                yield inner


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes outside ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _executed(child)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = f"ood_scores.{package}".split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])


def graph() -> dict[str, set[str]]:
    """Which modules each module imports; a package's modules may import the package that holds them."""
    found = {}
    for module, path in modules().items():
        targets = set(imported(module, path.read_text(encoding="utf-8"))) - {module}
        found[module] = {target for target in targets if not module.startswith(f"{target}.")}
    return found


def upward(module: str, targets: set[str]) -> list[str]:
    """The imports of a module that do not lead to a lower floor."""
    room = module.partition(".")[0]
    rooms = {target: target.partition(".")[0] for target in targets}
    return [
        f"{module} imports {target}: {room} is on floor {FLOOR[room]}, {rooms[target]} on floor {FLOOR[rooms[target]]}"
        for target in sorted(targets)
        if rooms[target] != room and FLOOR[rooms[target]] >= FLOOR[room]
    ]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other in a circle (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in edges[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            groups.append(sorted(group))

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 20 * len(edges)))
    try:
        for node in edges:
            if node not in order:
                visit(node)
    finally:
        sys.setrecursionlimit(limit)
    return [group for group in groups if len(group) > 1]


def test_every_room_has_a_floor() -> None:
    rooms = {module.partition(".")[0] for module in modules()}
    assert rooms <= FLOOR.keys(), f"tests/test_architecture.py gives no floor to {sorted(rooms - FLOOR.keys())}"


def test_no_import_leads_upward() -> None:
    broken = [line for module, targets in graph().items() for line in upward(module, targets)]
    assert not broken, "\n".join(broken)


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = circles(graph())
    assert not found, "\n".join(" <-> ".join(group) for group in found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import ood_scores.detector", ["detector"]),
        ("from ood_scores.features import cache_that_is_none, head", ["features.head", "features"]),
        ("def inside():\n    from ood_scores import detector", ["detector"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ood_scores.detector", []),
        ("from . import gmm_that_is_none\nfrom .base import Scorer", ["scorers", "scorers.base"]),
        ("import torch\nfrom numpy import array", []),
    ],
)
def test_an_import_is_seen_wherever_it_stands(source: str, expected: list[str]) -> None:
    assert list(imported("scorers.norms", source)) == expected


def test_an_upward_import_is_named() -> None:
    (line,) = upward("features.block", {"features.head", "errors", "scorers.base"})
    assert line.startswith("features.block imports scorers.base:")


def test_a_circle_is_named() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(edges) == [["a", "b", "c"]]
