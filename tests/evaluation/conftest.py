import pytest
from greedy import make_writer


@pytest.fixture
def model():
    return make_writer()
