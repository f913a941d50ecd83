from agent.histogram import Histogram, within


def test_durations_are_counted_up_to_each_bound_inclusive():
    found = Histogram((0.1, 1.0))
    for seconds in (0.1, 0.5, 1.0, 7.0):
        found.observe(seconds)
    assert found.as_dict() == {"buckets": {"0.1": 1, "1.0": 3, "+Inf": 4}, "sum": 8.6}


def test_clock_that_was_set_back_counts_as_no_time():
    found = Histogram((0.1,))
    found.observe(-5.0)
    assert found.as_dict() == {"buckets": {"0.1": 1, "+Inf": 1}, "sum": 0.0}


def test_nothing_observed_is_nothing_to_tell():
    assert Histogram((0.1,)).as_dict() == {}
    assert within({}, 0.5) == ""


def test_share_of_durations_names_the_bound_that_it_kept_to():
    found = Histogram((0.1, 1.0, 10.0))
    for seconds in [0.05] * 90 + [0.5] * 8 + [20.0] * 2:
        found.observe(seconds)
    assert within(found.as_dict(), 0.9) == "0.1"
    assert within(found.as_dict(), 0.95) == "1"
    assert within(found.as_dict(), 0.99) == ">10"


def test_order_in_which_a_file_keeps_the_bounds_does_not_matter():
    found = {"buckets": {"+Inf": 10, "0.5": 3, "10.0": 10, "2.0": 10}, "sum": 1.0}
    assert within(found, 0.95) == "2"
