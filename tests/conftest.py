"""What several test files begin with."""

import pytest
from transformers import AutoTokenizer

from tests.test_decoder import GOLDENS, golden_model


@pytest.fixture(scope="module")
def model():
    """The golden LLaMA under our decoder."""
    return golden_model("llama3")


@pytest.fixture(scope="module")
def tokenizer():
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(GOLDENS / "llama3")


def pytest_addoption(parser):
    """``--sparse``: what a second interpreter runs of tests that the first one ran in full."""
    parser.addoption("--sparse", action="store_true", help="one case of every test, and extended ones")


def pytest_collection_modifyitems(config, items):
    """Leave out, with ``--sparse``, all cases of a parametrised test but the first and those marked extended."""
    if not config.getoption("--sparse"):
        return
    seen, kept, left = set(), [], []
    for item in items:
        name = item.nodeid.partition("[")[0]
        keep = name not in seen or item.get_closest_marker("extended")
        seen.add(name)
        (kept if keep else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
