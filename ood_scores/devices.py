"""Which device: one place decides."""

from __future__ import annotations

import torch

from ood_scores.errors import BadInput

CPU = torch.device("cpu")


def find_device(device: str | torch.device, own: torch.device = CPU, local_rank: int = 0) -> torch.device:
    """``"auto"``: one's own device if it is not the CPU, else a GPU if there is one, else the CPU.

    Processes beside each other on a machine each take the GPU of their ``local_rank``.

    Raises:
        BadInput: there is no such device here.
    """
    if device == "auto":
        device = f"cuda:{local_rank}" if own.type == "cpu" and torch.cuda.is_available() else own
    if str(device) == "cuda" and local_rank:
        device = f"cuda:{local_rank}"
    try:
        found = torch.zeros(1, device=device)
        found.item()  # the meta device has no values
        return found.device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BadInput(f"there is no device {str(device)!r} here: {str(error).splitlines()[0]}") from error
