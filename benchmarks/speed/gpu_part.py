"""``python -m benchmarks.speed.gpu_part NAME SCALE FOLDER``: one part of ``benchmarks.speed.gpu_day``.

Prints each line as JSON once it is measured; the profile is printed as a table, and its trace written to the folder.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.speed.lines.gpu import SECTIONS, profile


def main(name: str, scale: float, folder: Path) -> None:
    if name == "profile":
        print(profile(scale, folder))
        return
    for each in SECTIONS[name](scale):
        print(json.dumps(asdict(each)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
