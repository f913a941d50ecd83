from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import msgspec
import pytest
from chromium import needs_chromium, opened, press
from PIL import Image

from tools.__main__ import main
from tools.drawing import Projection, histogram_svg, places_of, timeline_svg
from tools.judge import Delivery, Redacted, Sent, Verdict
from tools.report import page
from tools.run_file import FORMAT, PICTURES, Event, RunFile, load, save
from tools.run_file import _events as events_of
from tools.run_file import _pictures as pictures_of
from tools.spool import Spool
from tools.witness import Seen

SPOOL = Spool(io.BytesIO())
BINARY = (("specversion", "1.0"),)
SECOND = 1_000_000_000
STATES = {"delivered": 3, "pending": 0, "held": 1, "refused": 1, "expired": 0, "evicted": 0}
HOSTILE = 'vehicle/<script>alert(1)</script>/"quoted"&x'


def picture(grey):
    out = io.BytesIO()
    Image.new("RGB", (64, 36), (grey, grey, grey)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A run of five messages: three arrived, one of them a picture, and a topic is written to break the page."""
    street = Sent(
        topic="vehicle/camera/front",
        payload=SPOOL.keep(picture(200)),
        country="CN",
        objects=(("person", 5, 5, 20, 30), ("plate", 30, 20, 40, 25)),
        recorded_ns=2 * SECOND,
        captured_ns=12 * SECOND,
    )
    topics = ["vehicle/telemetry/speed", "vehicle/telemetry/speed", HOSTILE, "vehicle/gnss"]
    sent = [
        Sent(
            topic=topic,
            payload=SPOOL.keep(b"%d" % number),
            country="CN",
            recorded_ns=number * SECOND,
            captured_ns=number * SECOND,
        )
        for number, topic in enumerate(topics)
    ]
    sent.append(street)
    verdict = Verdict(
        problems=["<b>something</b> went wrong"],
        deliveries=[
            Delivery(sent=0, broker="cn", time_ns=SECOND // 50, tag="cn"),
            Delivery(sent=1, broker="hk", time_ns=3 * SECOND, tag="hk"),
            Delivery(sent=4, broker="cn", time_ns=13 * SECOND, tag="cn"),
        ],
        pictures=[
            Redacted(
                sent=street,
                seen=Seen(broker="cn", topic="t", payload=SPOOL.keep(picture(10)), time_ns=0, properties=BINARY),
                fields=None,
                number=0,
                width=64,
                height=36,
                claimed={"person": 1},
                hits=(("person", True), ("plate", False)),
            )
        ],
    )
    run = RunFile(
        format=FORMAT,
        title="test & drive",
        created="2026-01-02T03:04:05.000000000Z",
        provenance={"composite": "true", "track": "synthetic"},
        problems=tuple(verdict.problems),
        counts={"received": 5, **STATES, "breakdown": {"delivered": {"region": {"cn": 2, "hk": 1}}}},
        policy={"version": "p-1", "sha256": "ab" * 32},
        model="cd" * 32,
        audit="rows 1 to 9 intact",
        replay={"sent": 5, "late_p50_ms": 0.1, "late_p99_ms": 1.5},
        events=events_of(sent, verdict, 0),
        track=((0.0, 22.53, 114.06), (4.0, 22.50, 114.07)),
        pictures=pictures_of(verdict, 0),
    )
    save(tmp_path / "run", run, verdict)
    return tmp_path / "run"


class Elements(HTMLParser):
    """Names and attributes of all elements, and the text."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_run_file_comes_back_as_it_was_kept(folder):
    kept = load(folder)
    assert kept.events[0] == Event(
        second=0, topic="vehicle/telemetry/speed", country="CN", brokers=("cn",), latency_ms=20.0, tag="cn"
    )
    assert [one.brokers for one in kept.events] == [("cn",), ("hk",), (), (), ("cn",)]
    assert kept.events[4].latency_ms == 1000
    assert (folder / PICTURES / kept.pictures[0].after).read_bytes() == picture(10)


def test_page_says_what_happened_and_names_the_evidence(folder):
    text = Elements(page(load(folder), folder / PICTURES)).text
    for wanted in (
        "FAILED",
        "Composite recording",
        "5 received = 3 delivered + 0 pending + 1 held + 1 refused + 0 expired + 0 evicted",
        "<b>something</b> went wrong",
        "rows 1 to 9 intact",
        "ab" * 32,
        "cd" * 32,
        "masked: person 1",
    ):
        assert wanted in text


def test_page_asks_for_nothing_outside_itself_and_escapes_what_it_shows(folder):
    html = page(load(folder), folder / PICTURES)
    elements = Elements(html)
    assert "default-src 'none'" in html
    assert "<script>alert" not in html
    assert sum(tag == "script" for tag, _ in elements.found) == 1
    sources = [attrs[key] for _, attrs in elements.found for key in ("src", "href") if key in attrs]
    assert len(sources) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert base64.b64decode(sources[1].partition(",")[2]) == picture(10)


def test_dots_of_the_map_are_where_the_fixes_around_them_say():
    projection = Projection([(22.0, 114.0), (22.1, 114.0)])
    x, y = projection.xy(22.05, 114.0)
    assert (x, y) == (450.0, pytest.approx(projection.height / 2, abs=0.1))
    assert projection.xy(22.06, 114.0)[1] < y
    event = Event(second=5, topic="t", country="CN", brokers=(), latency_ms=None, tag="")
    assert [(one.latitude, one.fate) for one in places_of([event], [(0, 22.0, 114.0), (10, 22.1, 114.0)])] == [
        (pytest.approx(22.05), "kept")
    ]
    assert places_of([event], []) == []


def test_long_topic_is_shortened_before_its_row_and_told_in_full():
    topic = "vehicle/" + "long/" * 20 + "end"
    event = Event(second=0, topic=topic, country="CN", brokers=(), latency_ms=None, tag="")
    drawn = Elements(timeline_svg([event], ["kept"]))
    assert drawn.text.startswith("…")
    assert f"long/end{topic}" in drawn.text


def test_histogram_counts_every_latency_once():
    drawn = histogram_svg("latency", [0.0, 1, 1.1, 15, 250, 4000])
    assert sum(int(count) for count in re.findall(r"<title>(\d+)</title>", drawn)) == 6


def test_command_writes_the_page_and_says_when_there_is_no_run(folder, tmp_path, capsys):
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size > 5000
    capsys.readouterr()
    assert main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["messages"] == 5
    assert main(["report", str(tmp_path)]) == 3
    assert "run.json" in capsys.readouterr().err


@needs_chromium
def test_page_is_no_wider_than_a_phone_whatever_the_names(folder, tmp_path):
    kept = load(folder)
    long = msgspec.structs.replace(kept.events[0], topic="vehicle/" + "<long>" * 30)
    path = tmp_path / "page.html"
    path.write_text(page(msgspec.structs.replace(kept, events=(*kept.events, long)), folder / PICTURES))
    with opened(path, tmp_path / "profile") as shown:
        shown.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        assert shown.evaluate("document.documentElement.scrollWidth") == 390
        assert shown.evaluate("document.querySelector('.timeline').getBoundingClientRect().width") > 600


@needs_chromium
def test_page_works_in_a_browser_without_an_error_or_a_request(folder, tmp_path):
    main(["report", str(folder)])
    with opened(folder / "report.html", tmp_path / "profile") as page:
        assert page.evaluate("document.getElementById('shown').textContent") == "messages shown: 5"
        change_topic = "topic.value = 'vehicle/gnss'; topic.dispatchEvent(new Event('change'))"
        page.evaluate(change_topic)
        assert page.evaluate("document.getElementById('shown').textContent") == "messages shown: 1"
        visible = "document.querySelectorAll('.map .dots:not(.off)').length"
        assert page.evaluate(visible) == 1
        page.evaluate("topic.value = ''; topic.dispatchEvent(new Event('change'))")
        page.evaluate("document.querySelector('input[data-fate=kept]').focus()")
        press(page, " ")
        assert page.evaluate("document.getElementById('shown').textContent") == "messages shown: 3"
        page.evaluate("document.querySelector('.picture input[type=range]').focus()")
        before = page.evaluate("getComputedStyle(document.querySelector('.after')).clipPath")
        press(page, "ArrowRight")
        after = page.evaluate("getComputedStyle(document.querySelector('.after')).clipPath")
        assert before != after
        assert page.evaluate("document.querySelectorAll('.boxes .hit, .boxes .miss').length") == 2
    assert page.complaints() == []
    assert page.requests() == []
