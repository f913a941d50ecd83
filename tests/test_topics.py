from functools import cache
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from agent import topics

LEVELS = st.sampled_from(["a", "b", "c", ""])
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(bool)
FILTERS = st.builds(
    lambda levels, tail: "/".join([*levels, *tail]),
    st.lists(st.sampled_from(["a", "b", "+", ""]), min_size=1, max_size=3),
    st.sampled_from([[], ["#"]]),
).filter(bool)


@cache
def every_topic():
    rows = (levels for depth in range(1, 5) for levels in product(["a", "b", "c", ""], repeat=depth))
    return [name for name in map("/".join, rows) if name]


def test_wildcards_match_as_the_standard_says():
    assert topics.matches("sport/tennis/+", "sport/tennis/player1")
    assert not topics.matches("sport/tennis/+", "sport/tennis/player1/ranking")
    assert topics.matches("sport/#", "sport")
    assert topics.matches("+/+", "/finance")
    assert not topics.matches("+", "/finance")


def test_wildcards_at_the_start_do_not_match_dollar_topics():
    assert not topics.matches("#", "$SYS/broker")
    assert not topics.matches("+/broker", "$SYS/broker")
    assert topics.matches("$SYS/#", "$SYS/broker")


def test_malformed_filters_are_named():
    for text in ("", "a/#/b", "a#", "a+/b", "a/b#", "a\0", "$share/group/a", "$queue/a"):
        assert topics.filter_mistake(text)
    for text in ("#", "+", "a/+/b", "a/#", "/", "$SYS/#", "a/$share"):
        assert topics.filter_mistake(text) is None


@given(FILTERS, FILTERS, TOPICS)
def test_a_covering_filter_matches_all_that_the_covered_one_matches(wide, narrow, topic):
    if topics.covers(wide, narrow) and topics.matches(narrow, topic):
        assert topics.matches(wide, topic)


@given(FILTERS, FILTERS, TOPICS)
def test_filters_that_share_a_topic_overlap(one, other, topic):
    if topics.matches(one, topic) and topics.matches(other, topic):
        assert topics.overlap(one, other)


@given(FILTERS, FILTERS)
def test_filters_that_overlap_share_a_topic(one, other):
    if topics.overlap(one, other):
        assert any(topics.matches(one, topic) and topics.matches(other, topic) for topic in every_topic())
