import pytest

from tests.qkmodel.world import SmallWorld, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))
