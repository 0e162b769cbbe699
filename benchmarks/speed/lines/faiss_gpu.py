"""``python -m benchmarks.speed.lines.faiss_gpu SCALE``: exact neighbors on a GPU against faiss's GPU index.

Prints the line as JSON; nothing if faiss is not installed, or has no GPU index.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial

from benchmarks.speed.lines.gpu import K, search
from benchmarks.speed.measure import paired


def main(scale: float) -> None:
    try:
        import faiss
    except ImportError:
        return
    if not hasattr(faiss, "GpuIndexFlatL2"):
        return
    name, ours, bank, rows = search(scale)
    index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), bank.shape[1])
    index.add(bank.numpy())
    run = partial(index.search, rows.cpu().numpy(), K)
    line = paired(name, ours, "faiss's GpuIndexFlatL2", run, better="lower", asked=1.1, pairs=3)
    print(json.dumps(asdict(line)))


if __name__ == "__main__":
    main(float(sys.argv[1]))
