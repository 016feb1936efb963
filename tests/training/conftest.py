"""What the tests of several chapters need."""

import pytest
from carts import train

from som.training.film import choose_renderer


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """A finished run that nothing disturbed."""
    return train(tmp_path_factory.mktemp("runs") / "straight")


@pytest.fixture
def renderer():
    """Something here can draw, or the test is skipped."""
    try:
        choose_renderer()
    except ValueError as error:
        pytest.skip(str(error))
