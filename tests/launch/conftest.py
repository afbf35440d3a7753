"""What files of tests still ask for, and all tests now have."""

import pytest


@pytest.fixture(scope='module')
def cheap_compilation():
  """See tests/conftest.py."""
