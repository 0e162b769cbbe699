"""A small training run that several test files share."""

import pytest
from training_runs import ID, run

from ood_scores.training import Trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("trained")
    return run(out, epochs=6, data={"validation": 0.2, "test": ID}, checkpoint_every=4, optimizer={"lr": 0.1})
