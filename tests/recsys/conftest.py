"""What tests of the recommender share."""

import pytest

from tests.support import postgres


@pytest.fixture(scope="session")
def server():
    """A PostgreSQL server; whoever kills it starts it again."""
    with postgres.server() as running:
        yield running
