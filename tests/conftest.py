import os
import sys
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # many comparisons are exact, as only a CPU is

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that plain `pytest` finds the project, too


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the slow tests, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts processes, compiles, or trains many models; with --all")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
