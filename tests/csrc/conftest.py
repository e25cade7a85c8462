"""Fixtures of the native tests."""

from collections.abc import Iterator

import pytest

try:
    from ovfast import _C as native
except ImportError:  # the tests themselves skip with a reason; skipping here would be an error
    ISAS = ["none"]
else:
    ISAS = native.isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU and this build have, in use while the test runs."""
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)
