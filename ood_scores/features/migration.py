"""Read descriptions that earlier versions wrote: precision as a sentence, probes as the ``repr`` of objects."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

PRECISION = re.compile(
    r"model (?P<model_dtype>\w+), autocast (?P<amp>\w+)(?P<channels_last>, channels last)?(?P<compiled>, compiled)?, "
    r"stored (?P<dtype>\w+)"
)
HEADS = {"found": None, "none": False}


def migrated(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a provenance, or the ``run`` entry of a detector, in the current form."""
    found = dict(described)
    if "precision" in found:
        found |= _precision(found.pop("precision"))
        found["head"] = HEADS.get(found["head"], found["head"])
    probes = found.get("probes")
    if isinstance(probes, str):
        found["probes"] = json.dumps([_record(probe) for probe in json.loads(probes)])
    elif probes:
        found["probes"] = [_record(probe) for probe in probes]
    return found


def _precision(text: str) -> dict[str, Any]:
    parts = PRECISION.fullmatch(text)
    if parts is None:
        return {"model_dtype": text, "amp": None, "channels_last": False, "compiled": False, "dtype": ""}
    found = parts.groupdict()
    return found | {
        "amp": None if found["amp"] == "off" else found["amp"],
        "channels_last": found["channels_last"] is not None,
        "compiled": found["compiled"] is not None,
    }


def _record(probe: Any) -> Any:
    """Return the record of a probe that may be described by its ``repr``, without evaluating it."""
    if not isinstance(probe, str):
        return probe
    kind, _, arguments = probe.partition("(")
    text = f"f({arguments}"
    try:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        return {"kind": kind, "parameters": {str(each.arg): _value(each.value, text) for each in call.keywords}}
    except (SyntaxError, AssertionError):
        return {"kind": probe, "parameters": {}}


def _value(node: ast.expr, text: str) -> Any:
    """Encode a parameter like ``provenance.to_json``."""
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.Name(id="inf" | "nan" as name):
            return {"float": name}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
            return {"float": "-inf"}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part, text) for part in parts]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {"mapping": [[_value(key, text), _value(part, text)] for key, part in pairs if key]}
        case ast.Call(func=ast.Attribute(value=ast.Name(id="np"), attr=kind), args=[ast.Constant(value=number)]):
            return getattr(np, kind)(number).item() if kind in np.sctypeDict else {"repr": f"np.{kind}({number!r})"}
        case ast.Call(func=ast.Name(id="range"), args=bounds):
            return list(range(*(ast.literal_eval(bound) for bound in bounds)))
    return {"repr": ast.get_source_segment(text, node)}
