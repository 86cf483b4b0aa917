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
