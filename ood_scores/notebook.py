"""What Jupyter shows of the package's objects: a small table of facts, with names from files escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from ood_scores.terminal import safe


def facts_html(title: str, facts: Mapping[str, object], below: str = "") -> str:
    """Return an HTML table of facts by name; those that are None are left out.

    Args:
        title: the heading.
        facts: texts or numbers by name.
        below: HTML to show below the table.
    """
    rows = "".join(
        f'<tr><th style="text-align:left;font-weight:normal;opacity:.65">{_html(name)}</th>'
        f'<td style="text-align:left">{_html(value)}</td></tr>'
        for name, value in facts.items()
        if value is not None
    )
    return f"<div><strong>{_html(title)}</strong><table>{rows}</table>{below}</div>"


def _html(value: object) -> str:
    return escape(safe(f"{value:,}" if isinstance(value, int) else str(value)))
