from __future__ import annotations

import tomllib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.toml_text import TomlError, toml_text

text = st.text(st.characters(codec="utf-8"), max_size=10)
plain = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | text
values = st.recursive(plain, lambda inner: st.lists(plain, max_size=3) | st.dictionaries(text, inner, max_size=3))
tables = st.dictionaries(text, values | st.lists(st.dictionaries(text, values, max_size=3), min_size=1, max_size=3))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(tables)
def test_what_is_written_reads_back_as_the_same_values(table):
    assert tomllib.loads(toml_text(table)) == table


def test_value_without_a_form_in_toml_is_an_error():
    with pytest.raises(TomlError):
        toml_text({"key": None})
