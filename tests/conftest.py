"""What several test files begin with, and how the suite is kept within its time."""

import os

import jax
import pytest
from transformers import AutoTokenizer

from tests.test_decoder import GOLDENS, golden_model

# Files of whole conversions, of generation and of interpreted kernels: compiling is most of their time, and no result
# depends on how fast code runs.
QUICKLY_COMPILED = {
    "test_cache",
    "test_closed_form",
    "test_compiled",
    "test_convert",
    "test_convert_folding",
    "test_degenerate",
    "test_docs",
    "test_equivalence",
    "test_examples",
    "test_experts",
    "test_export",
    "test_generate",
    "test_gpu_benchmark",
    "test_gpu_kernels",
    "test_gpu_matmul",
    "test_injection",
    "test_lm_eval_adapter",
    "test_mixed",
    "test_portable_kernels",
    "test_resume",
    "test_sensitivity",
    "test_tasks",
    "test_tpu_decoder",
    "test_tpu_kernels",
    "test_tpu_matmul",
    "test_verify",
}
# Minutes each, so they begin first.
LONGEST = {"test_demo", "test_sharding"}
_OPTION = "jax_disable_most_optimizations"
_GIVEN = jax.config.values[_OPTION]


def _name(module):
    return module.__name__.rpartition(".")[2]


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request):
    """Without XLA's costly passes, in this process and in those that a test starts, where that changes nothing.

    What one file compiled serves the next one, unless that is compiled otherwise.
    """
    wanted = _name(request.module) in QUICKLY_COMPILED or _GIVEN
    if wanted != jax.config.values[_OPTION]:
        # What is compiled already would be used on, and a process that a test starts would compute other last bits.
        jax.clear_caches()
        jax.config.update(_OPTION, wanted)
        os.environ[_OPTION.upper()] = str(int(wanted))


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
    """The longest files first, then those compiled quickly, so that what is compiled is seldom thrown away.

    With ``--sparse`` all cases of a parametrised test are left out but the first and those marked extended.
    """
    items.sort(
        key=lambda item: (_name(item.module) not in LONGEST, _name(item.module) not in QUICKLY_COMPILED)
    )
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
