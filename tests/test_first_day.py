"""`init`: what it writes passes `check`, whatever regions are chosen."""

import errno
import itertools
import os
import random
import shutil
import stat
import tomllib
from pathlib import Path

import pytest

from agent import __main__ as command_line
from agent import assembly, commands, first_day
from agent.errors import AgentError
from agent.first_day import Broker, Wish, known_regions, write

ROOT = Path(__file__).parent.parent
REGIONS = known_regions()
VEHICLE = "urn:example:car-7"
CHANCE = random.Random(7)
COMBINATIONS = [
    *itertools.combinations(("cn", "hk", "eea", "uk"), 2),
    *(tuple(CHANCE.sample(REGIONS, number)) for number in (3, 5, 8, 13)),
    tuple(REGIONS),
]


def loaded(folder, **wish):
    write(folder, Wish(vehicle=VEHICLE, **{"regions": ("cn", "hk")} | wish))
    return assembly.load(folder / "agent.toml")


@pytest.mark.parametrize("regions", [*((name,) for name in REGIONS), *COMBINATIONS], ids=",".join)
def test_every_set_of_regions_passes_check_and_permits_nothing_else(tmp_path, regions):
    setup = loaded(tmp_path, regions=regions)
    assert set(setup.policy.config.regions) == set(setup.policy.endpoints) == set(regions)
    for region in regions:
        for data_class in setup.policy.config.classes:
            permitted = setup.policy.permitted((region,), data_class)
            assert region in permitted
            assert set(permitted) <= set(regions)
    warnings = {line.split()[1] for line in commands.check(setup).splitlines() if line.startswith("warning")}
    assert warnings <= {"signing.key_file", "trust.keys_file"}, "keys are made later; nothing else is left to say"


def test_files_can_be_written_by_their_owner_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        loaded(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}


def test_what_is_known_of_the_vehicle_stands_in_the_files(tmp_path):
    setup = loaded(
        tmp_path,
        registration="HK",
        state="state",
        broker=Broker(host="10.0.0.2", port=1884),
        endpoints={"cn": Broker(host="127.0.0.1", port=18841), "hk": Broker(host="mqtt.hk.example.org")},
    )
    config, endpoints = setup.config, setup.policy.endpoints
    assert (config.vehicle.source, config.vehicle.name, config.vehicle.registration) == (VEHICLE, "car-7", "HK")
    assert (config.broker.host, config.broker.port) == ("10.0.0.2", 1884)
    assert (endpoints["cn"].host, endpoints["cn"].port, endpoints["cn"].tls) == ("127.0.0.1", 18841, False)
    assert (endpoints["hk"].host, endpoints["hk"].port, endpoints["hk"].tls) == ("mqtt.hk.example.org", 8883, True)
    assert config.paths.state == str(tmp_path / "state")
    assert set(config.credentials) == {"cn", "hk"}
    assert config.status.topic
    text = (tmp_path / "agent.toml").read_text()
    assert "# Unix seconds" in text, "the comments stay"
    assert "endpoint `hk`" in text


def test_all_regions_give_the_example_itself_but_for_its_version(tmp_path):
    write(tmp_path, Wish(vehicle=VEHICLE, regions=REGIONS))
    written, shipped = (tmp_path / "policy.toml").read_text(), first_day.example("policy")
    assert written == shipped.replace(tomllib.loads(shipped)["version"], first_day.DRAFT_VERSION, 1)


@pytest.mark.parametrize("name", ["agent.toml", "policy.toml"])
def test_file_that_is_there_is_not_overwritten_and_nothing_is_written_beside_it(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(AgentError, match=name):
        loaded(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({"regions": ("cn", "atlantis")}, "'atlantis' is no region of the example policy: cn, hk"),
        ({"regions": ()}, "at least one region"),
        ({"endpoints": {"us": Broker(host="x")}}, "'us' belongs to none"),
        ({"regions": ("cn", "cn")}, "each region once, not cn,cn"),
        ({"registration": "DE"}, "'DE' is a country of none"),
        ({"vehicle": "urn:example:"}, "pseudonym"),
        ({"vehicle": "urn:example:car\n7"}, "control characters"),
        ({"state": "state\udcff"}, "no UTF-8"),
    ],
)
def test_wish_that_is_no_good_is_refused_before_anything_is_written(tmp_path, wish, told):
    given = {"vehicle": VEHICLE, "regions": ("cn", "hk")} | wish
    with pytest.raises(AgentError, match=told):
        write(tmp_path / "new", Wish(**given))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("state", ["state \U0001f697", "zustand über alles"])
def test_words_that_are_not_ascii_stand_in_the_file(tmp_path, state):
    assert loaded(tmp_path, state=state).config.paths.state == str(tmp_path / state)


def test_folder_that_may_not_be_looked_into_is_a_clear_error(tmp_path, monkeypatch):
    real = Path.stat

    def denied(path, **options):
        if not path.is_relative_to(tmp_path):
            return real(path, **options)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", denied)
    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(AgentError, match=f"{tmp_path}: Permission denied"):
        loaded(tmp_path)


def test_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AgentError, match="file"):
        loaded(tmp_path / "file")


def test_command_writes_what_it_says(tmp_path, capsys):
    words = ["--regions", "cn,hk", "--vehicle", VEHICLE, "--endpoint", "cn=[::1]:1885", "--broker", "localhost"]
    assert command_line.main(["init", str(tmp_path / "car"), *words]) == 0
    told = capsys.readouterr().out
    assert f"wrote {tmp_path / 'car' / 'policy.toml'}" in told
    setup = assembly.load(tmp_path / "car" / "agent.toml")
    assert (setup.policy.endpoints["cn"].host, setup.policy.endpoints["cn"].port) == ("::1", 1885)
    assert setup.config.broker.host == "localhost"
    assert command_line.main(["init", str(tmp_path / "car"), *words]) == 1
    assert "not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--endpoint", "cn"],
        ["--broker", ""],
        ["--endpoint", "cn="],
        ["--endpoint", "cn=127.0.0.1:99999"],
        ["--broker", "localhost:0"],
        ["--broker", "127.0.0.1:"],
        ["--broker", ":1883"],
        ["--endpoint", "cn=mqtt.cn.example.com:mqtt"],
        ["--endpoint", "cn=one two"],
    ],
)
def test_address_that_is_none_is_wrong_usage(tmp_path, words):
    with pytest.raises(SystemExit) as caught:
        command_line.main(["init", str(tmp_path), "--regions", "cn", "--vehicle", VEHICLE, *words])
    assert caught.value.code == 2


def test_installed_package_finds_the_examples_where_the_wheel_puts_them(tmp_path, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    placed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in placed.items():
        if source.endswith(".toml"):
            file = tmp_path / target
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, file)
    shipped = [first_day.example(name) for name in ("agent", "policy")]
    monkeypatch.setattr(first_day, "PACKAGE", tmp_path / "agent")
    assert (tmp_path / "agent" / "examples").is_dir()
    assert [first_day.example(name) for name in ("agent", "policy")] == shipped
