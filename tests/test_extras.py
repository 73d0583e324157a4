"""Packages that only some of the features need."""

import pytest

from hf_structprune.errors import StructPruneError
from hf_structprune.installed import need


def test_what_is_missing_is_named():
    need("json", "email.message", extra="some")
    with pytest.raises(StructPruneError, match=r"^email.nowhere and nowhere.inside is missing: .*\[some"):
        need("json", "email.nowhere", "nowhere.inside", extra="some")
