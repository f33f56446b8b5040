import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that plain `pytest` finds the project, too


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
