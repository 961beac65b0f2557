"""The committed stores of studies."""

import shutil
import tarfile

import pytest
import rejudge

from calmix.errors import InputError
from calmix.study.store import read_results
from tests.tiny import quick

STORES = [
    path
    for path in sorted(rejudge.RESULTS.glob("*/store.tar.xz"))
    if path.stat().st_size < 2**21  # larger ones are in the golden file
]


@pytest.mark.parametrize("path", quick(STORES[:1], STORES), ids=lambda path: path.parent.name)
def test_committed_store_is_readable(path, tmp_path):
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    store = tmp_path / path.parent.name
    if rejudge.asked_in_part(copied := shutil.copytree(store, tmp_path / "copied")):
        with pytest.raises(InputError, match="that the dense model had right: score"):
            read_results(store)
    results = read_results(copied)
    assert results.trials
    assert results.failed == 0
