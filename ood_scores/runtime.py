"""Which process this is, and which device it computes on: one place decides."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ood_scores.errors import BadInput

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """Which process this is (from 0), of how many, and which one on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """As `torchrun` says in the environment.

        Raises:
            BadInput: the environment names several processes, but not where they meet.
        """
        rank, count, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if count > 1 and "MASTER_ADDR" not in os.environ:
            raise BadInput(
                f"WORLD_SIZE={count} is in the environment, but MASTER_ADDR is not: start the processes with torchrun, "
                "or unset WORLD_SIZE to run alone."
            )
        return cls(rank, max(count, 1), local)

    @property
    def first(self) -> bool:
        return self.rank == 0


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
