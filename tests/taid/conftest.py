"""What the tests of both teacher caches run: a model and blocks of tokens."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="module")
def token_blocks() -> np.ndarray:
    """``[10, 8]``."""
    return np.random.default_rng(0).integers(3, 2000, (10, 8), dtype=np.int32)
