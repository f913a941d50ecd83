from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.mqtt.backoff import FIRST_SECONDS, LONGEST_SECONDS, STABLE_SECONDS, Retries, delays


@given(st.floats(0, 1), st.floats(0.01, 10), st.floats(10, 100))
def test_delays_double_up_to_the_longest_and_jitter_only_shortens_them_by_half(drawn, first, longest):
    for number, delay in enumerate(islice(delays(lambda: drawn, first=first, longest=longest), 20)):
        whole = min(first * 2**number, longest)
        assert delay == pytest.approx(whole * (1 - drawn / 2))


def test_connections_that_are_lost_soon_are_tried_ever_later():
    retries = Retries(lambda: 0.0)
    waits = [retries.after(STABLE_SECONDS) for _ in range(10)]
    assert waits == [min(FIRST_SECONDS * 2**number, LONGEST_SECONDS) for number in range(10)]


def test_after_a_stable_connection_the_next_is_tried_with_the_shortest_delay():
    retries = Retries(lambda: 0.0)
    before = [retries.after(0.0) for _ in range(5)]
    assert retries.after(STABLE_SECONDS + 1) == FIRST_SECONDS
    assert [retries.after(0.0) for _ in range(4)] == before[1:]
