"""Digests that name files after everything that determines their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def digest(*facts: Any) -> str:
    """Return the SHA-256 of dataclasses and plain data as hexadecimal text.

    All fields of a dataclass are included, except those that its class lists in ``NOT_IN_DIGEST``: fields that only
    affect the presentation, and fields that are included in another form. Fields that it lists in ``IN_DIGEST_IF_SET``,
    which an earlier version did not have, are left out while they are None, so that its files keep their names. For the
    same reason, a field of ``NONE_IN_DIGEST`` is included with the value there while it is None: its earlier default.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        left_out = {*getattr(value, "NOT_IN_DIGEST", ())}
        left_out |= {name for name in getattr(value, "IN_DIGEST_IF_SET", ()) if getattr(value, name) is None}
        counted = {each.name: getattr(value, each.name) for each in fields(value) if each.name not in left_out}
        earlier = getattr(value, "NONE_IN_DIGEST", {})
        return [type(value).__name__, counted | {name: earlier[name] for name in earlier if counted[name] is None}]
    return dict(value) if isinstance(value, Mapping) else repr(value)
