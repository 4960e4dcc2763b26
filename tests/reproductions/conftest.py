import pytest

from reproductions import _images


@pytest.fixture(autouse=True, scope="session")
def networks_are_kept_apart(tmp_path_factory):
    """Networks that tests train are neither taken from nor left beside those of kept results."""
    kept, _images.KEPT = _images.KEPT, tmp_path_factory.mktemp("networks")
    yield
    _images.KEPT = kept
