"""Settings that every test and every chapter run by pytest shares."""

import os
from pathlib import Path

# Compiled programs are kept between runs; kernels started by nbmake inherit this.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
