import pytest

from agent import __main__ as command_line

AGENT = """
[vehicle]
source = "urn:example:1"
name = "one"
registration = "HK"
[intake]
telemetry = ["car/telemetry/#"]
pictures = ["car/camera/#"]
[[position]]
topic = "car/gnss"
[motion]
max_speed_mps = 50.0
max_fix_age_s = 60.0
"""
POLICY = """
version = "7"
[[rules]]
topic = "car/camera/cabin/#"
action = "refuse"
[[rules]]
topic = "car/camera/+"
action = "redact"
class = "picture"
[[rules]]
topic = "car/telemetry/tyres"
action = "forward"
class = "owned"
fields = { drop = ["/wear"] }
[[rules]]
topic = "car/telemetry/contract"
action = "forward"
class = "owned"
basis = "registration"
[[rules]]
topic = "car/telemetry/#"
action = "forward"
class = "telemetry"
capture_time = "/ts"
[rules.fields]
keep = ["/ts", "/lat", "/lon", "/vin"]
drop = ["/name"]
pseudonymise = ["/vin"]
positions = [{ latitude = "/lat", longitude = "/lon", metres = 500 }]
times = [{ place = "/ts", seconds = 60 }]
[classes.telemetry]
hold_s = 120
[classes.picture]
priority = "bulk"
[classes.owned]
registration_bound = true
[regions.cn]
countries = ["CN"]
reach = ["cn", "spare"]
[regions.hk]
countries = ["HK"]
[endpoints.cn]
host = "cn.example.com"
[endpoints.spare]
host = "spare.example.com"
[endpoints.hk]
host = "hk.example.com"
[permit.cn]
telemetry = ["cn", "spare"]
owned = ["cn", "hk"]
[permit.hk]
telemetry = ["hk"]
picture = ["hk"]
owned = ["hk"]
"""
SHENZHEN = "22.6329,114.0580,10"
BORDER = "22.5160,114.0680,10"
PARIS = "48.8566,2.3522,10"
TEN = "2026-11-23T10:00:00Z"


@pytest.fixture
def ask(tmp_path, capsys):
    """Lines of the explanation, by label; a label that is repeated has several."""

    def asking(topic, *options, agent=AGENT, policy=POLICY):
        (tmp_path / "agent.toml").write_text(agent)
        (tmp_path / "policy.toml").write_text(policy)
        assert command_line.main(["explain", str(tmp_path / "agent.toml"), "--topic", topic, *options]) == 0
        found, label = {}, ""
        for line in capsys.readouterr().out.splitlines():
            label = line[:12].strip() or label
            found.setdefault(label, []).append(line[12:])
        return found

    return asking


def test_every_step_of_a_decision_is_told_in_order(ask):
    found = ask("car/telemetry/speed", "--time", TEN, "--at", SHENZHEN)
    assert found == {
        "policy": ["7"],
        "topic": ["car/telemetry/speed"],
        "intake": ["car/telemetry/# (telemetry session)"],
        "rule": ["rules[4] car/telemetry/# -> forward"],
        "class": ["telemetry: live, kept for 604800 s, held for 120 s"],
        "fields": [
            "keep only /ts /lat /lon /vin",
            "drop /name",
            "pseudonymise /vin",
            "coarsen /lat /lon to 500 m",
            "coarsen /ts to 60 s",
        ],
        "captured": ["2026-11-23T10:00:00Z, known to 0.5 s"],
        "fix": ["22.6329, 114.058 within 10 m (95 %)"],
        "position": ["22.63290, 114.05800 within 105 m: CN"],
        "candidates": ["cn (gnss)"],
        "permits": ["cn: cn spare"],
        "all permit": ["cn spare"],
        "decision": ["publish to cn, else spare"],
        "reach": ["while the car may be in cn, only cn spare may be connected to"],
    }
    assert list(found)[-2:] == ["decision", "reach"]


def test_doubt_at_the_border_is_held_with_both_candidates_named(ask):
    found = ask("car/telemetry/speed", "--at", BORDER)
    assert found["candidates"] == ["cn, hk (gnss)"]
    assert found["permits"] == ["cn: cn spare", "hk: hk"]
    assert found["all permit"] == ["nothing"]
    assert found["decision"] == ["hold: region.doubt; later fixes may settle it, it expires after 120 s"]


def test_held_record_expires_with_its_time_to_live_where_that_is_shorter_than_the_hold(ask):
    policy = POLICY.replace("hold_s = 120", "hold_s = 120\nttl_s = 60")
    found = ask("car/telemetry/speed", "--at", BORDER, policy=policy)
    assert found["class"] == ["telemetry: live, kept for 60 s, held for 60 s"]
    assert found["decision"] == ["hold: region.doubt; later fixes may settle it, it expires after 60 s"]


def test_place_that_permits_nothing_is_refused(ask):
    assert ask("car/camera/front", "--at", SHENZHEN)["decision"] == ["refuse: region.not-permitted"]
    found = ask("car/telemetry/speed", "--at", PARIS)
    assert found["position"][0].endswith("FR")
    assert found["candidates"] == ["unlisted (gnss)"]
    assert found["decision"] == ["refuse: region.not-permitted"]
    assert "reach" not in found


def test_without_a_fix_every_region_is_a_candidate(ask):
    found = ask("car/telemetry/speed")
    assert found["position"] == ["no usable fix: the car may be anywhere"]
    assert found["candidates"] == ["cn, hk, unlisted (gnss)"]
    assert found["decision"][0].startswith("hold: region.doubt")


def test_older_fix_widens_the_disc_by_what_the_car_can_have_driven(ask):
    """Twice the accuracy and 10 m; at 50 m/s for the age, half a second of latency and one of the producer's clock."""
    for age, seconds in (("10:00:00", 0 + 1), ("09:59:30", 30)):
        found = ask("car/telemetry/speed", "--time", TEN, "--at", f"{SHENZHEN},2026-11-23T{age}Z")
        assert f" within {2 * 10 + 10 + 50 * (seconds + 0.5):.0f} m: CN" in found["position"][0]
    found = ask("car/telemetry/speed", "--time", TEN, "--at", f"{SHENZHEN},2026-11-23T09:59:00Z")
    assert found["position"] == ["no usable fix: the car may be anywhere"]


def test_fixes_before_and_after_the_capture_both_count(ask):
    before, after = f"{SHENZHEN},2026-11-23T09:59:45Z", "22.6300,114.0580,10,2026-11-23T11:00:10+01:00"
    found = ask("car/telemetry/speed", "--time", TEN, "--at", before, "--at", after)
    assert found["fix"] == [
        "22.6329, 114.058 within 10 m (95 %) at 2026-11-23T09:59:45Z",
        "22.63, 114.058 within 10 m (95 %) at 2026-11-23T10:00:10Z",
    ]
    assert len(found["position"]) == 2
    assert found["decision"] == ["publish to cn, else spare"]


def test_topic_that_is_refused_or_unknown_says_by_which_rule(ask):
    found = ask("car/camera/cabin/left")
    assert found["rule"] == ["rules[0] car/camera/cabin/# -> refuse"]
    assert found["decision"] == ["refuse: policy.refused"]
    found = ask("bus/speed")
    assert found["intake"] == ["not subscribed to: such a message stays where it is"]
    assert (found["rule"], found["decision"]) == (["none matches"], ["refuse: policy.no-rule"])
    assert ask("car/camera/front")["intake"] == ["car/camera/# (pictures session)"]


def test_class_that_is_bound_to_the_registration_asks_its_region_too(ask):
    found = ask("car/telemetry/tyres", "--at", SHENZHEN)
    assert found["fields"] == ["drop /wear"]
    assert found["class"] == ["owned: live, kept for 604800 s, held for 3600 s, bound to the registration"]
    assert found["permits"] == ["cn: cn hk", "hk: hk (registered in HK)"]
    assert found["decision"] == ["publish to hk"]
    unregistered = AGENT.replace('registration = "HK"', "")
    placed = POLICY.replace('basis = "registration"', "")
    found = ask("car/telemetry/tyres", "--at", SHENZHEN, agent=unregistered, policy=placed)
    assert found["permits"][1:] == ["hk: hk (registered in no country)", "unlisted: nothing (registered in no country)"]
    assert found["decision"] == ["refuse: region.not-permitted"]


def test_basis_is_named_where_it_is_not_the_position(ask):
    found = ask("car/telemetry/contract", "--at", SHENZHEN)
    assert found["candidates"] == ["hk (registration)"]
    assert "position" not in found
    found = ask("car/telemetry/speed", agent=AGENT.replace("[intake]", 'fixed_country = "CN"\n[intake]'))
    assert found["candidates"] == ["cn (fixed)"]
    assert "position" not in found


def test_places_south_of_the_equator_are_taken_with_and_without_an_equals_sign(tmp_path, capsys):
    (tmp_path / "agent.toml").write_text(AGENT)
    (tmp_path / "policy.toml").write_text(POLICY)
    sydney, told = "-33.86,151.2,10", []
    for words in (["--at", sydney], [f"--at={sydney}"]):
        arguments = ["explain", str(tmp_path / "agent.toml"), "--topic", "a", "--time", TEN, *words]
        assert command_line.main(arguments) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("--topic", "car/#"),
        ("--topic", ""),
        ("--at", "22.5,114.0"),
        ("--at", "91,0,10"),
        ("--at", "nan,0,10"),
        ("--at", "22.5,114.0,0"),
        ("--at", f"{SHENZHEN},yesterday"),
        ("--at", f"{SHENZHEN},{TEN},{TEN}"),
        ("--time", "2026-11-23T10:00:00"),
        ("--time", "noon"),
    ],
)
def test_question_that_makes_no_sense_is_wrong_usage(capsys, option, wrong):
    with pytest.raises(SystemExit) as caught:
        command_line.main(["explain", "agent.toml", "--topic", "a", option, wrong])
    assert caught.value.code == command_line.EXIT_CONFIG
    assert repr(wrong.removeprefix(f"{SHENZHEN},")) in capsys.readouterr().err or wrong.count(",") == 4


def test_mistake_in_a_file_is_told_with_its_status(tmp_path, capsys):
    (tmp_path / "agent.toml").write_text(AGENT)
    (tmp_path / "policy.toml").write_text(POLICY.replace('"cn.example.com"', '""'))
    arguments = ["explain", str(tmp_path / "agent.toml"), "--topic", "car/telemetry/speed"]
    assert command_line.main(arguments) == command_line.EXIT_CONFIG
    assert "endpoints.cn.host" in capsys.readouterr().err
