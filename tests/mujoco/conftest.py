"""What the tests of this part share."""

import jax
import pytest


@pytest.fixture(scope="module")
def in_haste():
    """Programs that run once are not worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
