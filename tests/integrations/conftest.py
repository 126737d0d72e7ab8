"""The tiny model that the tests of all adapters rank with."""

import pytest

from mixencoder import MixEncoder


@pytest.fixture(scope="module")
def model(checkpoint):
    return MixEncoder.from_pretrained(checkpoint)
