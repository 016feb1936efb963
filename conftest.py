"""Settings that every test and every chapter run by pytest shares."""

import os
import sys
from pathlib import Path

import pytest

# Compiled programs are kept between runs; kernels started by nbmake inherit this.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most tests and chapters compile for longer than they compute. At LLVM's first level,
# and without the emitters of fused loops, they compile in half the time what then runs
# a little slower. At level 0 XLA's code without these emitters gives wrong numbers.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false",
)


def pytest_configure(config):
    """Keep the chapters that nbmake runs: the book need not run them again."""
    if not config.getoption("nbmake", False):
        return
    import executed
    from nbmake import pytest_items

    class KeptRun(pytest_items.NotebookRun):
        def execute(self):
            result = super().execute()
            if result.error is None:
                executed.keep(self.filename, result.nb)
            return result

    pytest_items.NotebookRun = KeptRun


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Programs of one file are no use to the next, and each one holds on to memory
    maps, of which a process may have 65 530."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
