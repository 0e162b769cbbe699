"""Detectors on the Hugging Face hub: their files, and a card that is written from them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from ood_scores.detector.bundle import save_parts
from ood_scores.detector.folder import DESCRIPTION
from ood_scores.detector.parts import DetectorParts
from ood_scores.models.hub import hub_folder, push_folder
from ood_scores.terminal import safe

CARD = """---
library_name: ood_scores
pipeline_tag: {task}
tags:
- out-of-distribution-detection
---

# {title}

This classifier also tells whether {an_input} is out of distribution (OoD): not like the {inputs} on which it was
calibrated.

| | |
|---|---|
{facts}

```python
import ood_scores

detector = ood_scores.Detector.from_pretrained("{repository}"{passed})
found = detector.predict({example}
found.label, found.is_ood, found.p_value
```

The guarantee holds for new {inputs} that are like those of the calibration. It says nothing about the share of OoD
{inputs} that are found, which depends on how they differ: measure it on OoD {inputs} of your own.
"""

KINDS = {
    "input_ids": ("text", "a text", "texts"),
    "input_values": ("audio", "a recording", "recordings"),
    "input_features": ("audio", "a recording", "recordings"),
}
"""The task, and the words for inputs, of models of transformers that are not of images, by their main input."""


def push(detector: DetectorParts, facts: Mapping[str, object], repository: str, private: bool | None) -> str:
    """Upload a detector and its card; see ``Detector.push_to_hub``."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "detector"
        save_parts(detector, saved, with_model=True)
        (saved / "README.md").write_text(card(detector, facts, repository, saved), encoding="utf-8")
        message = f"Upload a detector with {detector.scorer.name}"
        return push_folder(saved, repository, mark=DESCRIPTION, private=private, message=message)


def fetched(repository: str) -> Path:
    """Return the folder of a detector of the hub; other files of its repository are not downloaded."""
    return hub_folder(repository, (DESCRIPTION, "*.safetensors"))


def card(detector: DetectorParts, facts: Mapping[str, object], repository: str, saved: Path) -> str:
    """Return the text of a detector's card.

    Args:
        detector: the detector.
        facts: what the card says of it, by name; entries that are None are left out.
        repository: ``OWNER/NAME``.
        saved: the folder to which it was saved.
    """
    rows = {name: _cell(value) for name, value in facts.items() if value is not None}
    passed = [] if any(saved.glob("model*.safetensors")) else ["model"]
    if detector.transform is not None and detector.stored_preprocessing is None:
        passed.append("preprocessing=preprocessing")
    main_input = getattr(detector.model, "main_input_name", "pixel_values")
    kind, an_input, inputs = KINDS.get(main_input, ("image", "an image", "images"))
    return CARD.format(
        task=f"{kind}-classification",
        an_input=an_input,
        inputs=inputs,
        example="batch)  # an input of the model" if detector.transform is None else '["photo.jpg"])',
        title=f"{rows['scorer']} on {rows['model']}",
        facts="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        repository=repository,
        passed="".join(f", {each}" for each in passed),
    )


def _cell(value: object) -> str:
    """Return a text without what ends a cell or starts markup."""
    return safe(str(value)).replace("|", "\\|").replace("<", "&lt;")
