from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from agent.intake.waiting import FOREVER_NS, Waiting

EVENTS = st.one_of(
    st.sampled_from(["publish", "publish", "ack", "ack", "mark", "mark", "lose", "connect", "restart"]),
    st.integers(1, 1000),  # time goes by
)


class Broker:
    """A broker with a limit on what is in flight, and the agent's end of the session; no time on the way."""

    def __init__(self, limit):
        self.limit, self.now, self.online = limit, 0, False
        self.queue, self.unacked = deque(), deque()
        self.waiting = Waiting(None)
        self.marks = 0
        self.short = []

    def do(self, event):
        if isinstance(event, int):
            self.now += event
        elif event == "publish":
            self.queue.append((self.now, None))
        elif event == "ack" and self.unacked and self.online:
            if self.unacked.popleft()[1] is None:
                self.waiting.acknowledged()
            else:
                self.waiting.marker_acknowledged(self.now)
        elif event == "mark" and self.online and not self.waiting.marked:
            self.marks += 1
            marker = b"%d" % self.marks
            self.waiting.mark(marker, self.now)
            self.queue.append((self.now, marker))
        elif event == "lose":
            self.online = False
        elif event in {"connect", "restart"} and not self.online:
            self.connect(fresh=event == "restart")
        self.deliver()

    def connect(self, *, fresh):
        if fresh:
            self.waiting = Waiting(self.waiting.kept_ns)
        self.online = True
        self.queue.extendleft(reversed(self.unacked))
        self.unacked.clear()
        self.waiting.begin(self.now, resumed=True)

    def deliver(self):
        while self.online and self.queue and len(self.unacked) < self.limit:
            published, marker = self.queue.popleft()
            self.unacked.append((published, marker))
            if marker is not None:
                self.waiting.returned(marker)
            elif self.waiting.taken(self.now) < self.now - published:
                self.short.append((published, self.now))


@given(st.integers(1, 5), st.lists(EVENTS, max_size=120))
def test_stated_wait_is_never_shorter_than_the_true_one(limit, events):
    broker = Broker(limit)
    for event in events:
        broker.do(event)
    assert broker.short == []


@given(st.integers(1, 5), st.lists(EVENTS, max_size=60))
def test_doubt_ends_once_the_broker_holds_nothing_back(limit, events):
    broker = Broker(limit)
    for event in [*events, "connect"]:
        broker.do(event)
    while broker.queue or broker.unacked:
        broker.do("ack")
    for _ in range(2):
        broker.do("mark")
        broker.do("ack")
    broker.do(10_000)
    assert broker.waiting.flows
    assert broker.waiting.taken(broker.now) == 0


def test_message_that_comes_again_had_been_published_before_the_marker_that_overtook_its_puback():
    waiting = Waiting(None)
    waiting.begin(0, resumed=False)
    waiting.taken(10)
    waiting.mark(b"m", 20)
    waiting.returned(b"m")
    assert (waiting.empty_ns, waiting.kept_ns) == (20, 10)
    waiting.begin(100, resumed=True)
    assert waiting.taken(101) == 91


def test_nothing_known_of_the_time_before_means_any_time():
    waiting = Waiting(None)
    waiting.begin(100, resumed=True)
    assert waiting.taken(200) == FOREVER_NS


def test_new_session_holds_only_what_is_published_from_now_on():
    waiting = Waiting(None)
    waiting.begin(100, resumed=False)
    assert waiting.taken(200) == 0


def test_process_that_stood_still_counts_as_waiting():
    waiting = Waiting(None)
    waiting.begin(0, resumed=False)
    assert waiting.taken(100, unseen_ns=40) == 40
    assert waiting.taken(110) == 50, "others may wait behind what lay in the socket"


def test_marker_of_an_earlier_connection_says_nothing():
    waiting = Waiting(None)
    waiting.begin(0, resumed=True)
    waiting.mark(b"old", 1)
    waiting.begin(10, resumed=True)
    waiting.mark(b"new", 11)
    waiting.returned(b"old")
    assert not waiting.flows
    waiting.returned(b"new")
    assert waiting.flows
