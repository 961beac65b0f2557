"""A sample of the fault matrix; `make test-long` kills and damages each verb fifty times."""

import pytest

from tests.faults.matrix import CACHED, Place, damage, faults, one_cache, verbs
from tests.tiny import quick

SAMPLE = quick(["prune targets"], ["recover distill", "generate"])


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    return verbs(tmp_path_factory.mktemp("faults") / "files")


@pytest.mark.real
@pytest.mark.parametrize("name", SAMPLE)
def test_after_a_fault_there_are_the_same_bytes_or_a_line(name, chosen, tmp_path):
    place = Place(name, chosen[name], tmp_path)
    rows = [faults(place, 1, "kill"), damage(place, 2)]
    if name in CACHED:
        rows.append(one_cache(place, 1))
    for row in rows:
        assert row.tried, row
        assert not row.found, row
