"""Signed policies, their borders, and manifests: what is refused, and what `sign` writes."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent import __main__ as command_line
from agent import assembly
from agent.errors import EnvelopeError, InvalidConfigError
from agent.wire import detached
from agent.wire.detached import Kind
from agent.wire.signing import Signer

POLICY = """
version = "7"
serial = 7
[regions.cn]
countries = ["CN"]
[endpoints.cn]
host = "127.0.0.1"
tls = false
[classes.data]
[permit.cn]
data = ["cn"]
[[rules]]
topic = "#"
action = "forward"
class = "data"
"""
AGENT = """
[vehicle]
source = "urn:test:car"
name = "car"
fixed_country = "CN"
[intake]
telemetry = ["vehicle/#"]
[model]
manifest = "detector.json"
[trust]
keys_file = "fleet.pem.pub"
"""


def sign(*arguments):
    return command_line.main(["sign", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    """A vehicle whose policy and manifest are signed."""
    (tmp_path / "agent.toml").write_text(AGENT)
    (tmp_path / "policy.toml").write_text(POLICY)
    (tmp_path / "detector.json").write_text("{}")
    assert sign("--key", tmp_path / "fleet.pem", "--generate") == 0
    assert sign("--key", tmp_path / "fleet.pem", tmp_path / "policy.toml", tmp_path / "detector.json") == 0
    return tmp_path


def refusal(folder):
    with pytest.raises(InvalidConfigError) as caught:
        assembly.load(folder / "agent.toml")
    return str(caught.value)


def test_signing_of_no_file_is_wrong_usage(files, capsys):
    with pytest.raises(SystemExit) as caught:
        sign("--key", files / "fleet.pem")
    assert caught.value.code == 2
    assert "name a FILE to sign" in capsys.readouterr().err


def test_signed_files_are_used_and_known_by_their_digests(files):
    setup = assembly.load(files / "agent.toml")
    assert setup.trusted
    assert (setup.policy.version, setup.policy.config.serial) == ("7", 7)
    assert len(setup.digest) == 64
    assert setup.manifest == b"{}"


@pytest.mark.parametrize(("name", "key"), [("policy.toml", "the file"), ("detector.json", "model.manifest")])
def test_altered_file_is_refused(files, name, key):
    with (files / name).open("a") as file:
        file.write("\n")
    assert key in refusal(files)
    assert "not what" in refusal(files)


@pytest.mark.parametrize("name", ["policy.toml", "detector.json"])
def test_file_without_a_signature_is_refused(files, name):
    (files / f"{name}.sig").unlink()
    assert f"{name}.sig" in refusal(files)


def test_signature_by_another_key_is_refused(files):
    sign("--key", files / "other.pem", "--generate", files / "policy.toml")
    assert "none of the trusted keys" in refusal(files)


def test_signature_by_another_key_under_a_trusted_name_is_refused(files):
    text = (files / "policy.toml.sig").read_text()
    keyid = text.split("keyid: ")[1].split("\n")[0]
    forger = Signer(key=Ed25519PrivateKey.generate(), key_id=keyid)
    (files / "policy.toml.sig").write_text(detached.sign(forger, Kind.POLICY, (files / "policy.toml").read_bytes()))
    assert "not what" in refusal(files)


def test_signature_of_one_kind_of_file_stands_for_no_other(files):
    sign("--key", files / "fleet.pem", "--as", "model", files / "policy.toml")
    assert "signs application/vnd.residency-agent.model" in refusal(files)
    signer = Signer.from_pem((files / "fleet.pem").read_bytes())
    data = (files / "policy.toml").read_bytes()
    text = detached.sign(signer, Kind.MODEL, data).replace(Kind.MODEL, Kind.POLICY)
    (files / "policy.toml.sig").write_text(text)
    assert "not what" in refusal(files)


def test_manifest_may_be_left_unsigned_where_the_vehicle_says_so(files):
    (files / "detector.json.sig").unlink()
    with (files / "agent.toml").open("a") as file:
        file.write("model = false\n")
    assert assembly.load(files / "agent.toml").trusted


def test_policy_that_has_to_be_signed_needs_a_serial(files):
    (files / "policy.toml").write_text(POLICY.replace("serial = 7", ""))
    sign("--key", files / "fleet.pem", files / "policy.toml")
    assert "serial" in refusal(files)


def square(east):
    """Borders of one country, from the equator and the prime meridian to 1 degree north and `east` degrees east."""
    ring = [[0, 0], [east, 0], [east, 1], [0, 1], [0, 0]]
    feature = {
        "type": "Feature",
        "properties": {"iso1A2": "CN"},
        "geometry": {"type": "Polygon", "coordinates": [ring]},
    }
    return json.dumps({"type": "FeatureCollection", "features": [feature]})


def write_policy(folder, borders=""):
    """A policy with its [borders], signed as a fleet with another tool would; the signature says nothing of borders."""
    text = f'{POLICY}[borders]\ngeojson = "own.geojson"\n{borders}'
    (folder / "policy.toml").write_text(text)
    signer = Signer.from_pem((folder / "fleet.pem").read_bytes())
    (folder / "policy.toml.sig").write_text(detached.sign(signer, Kind.POLICY, text.encode()))


def test_signed_policy_goes_with_no_other_borders_than_those_whose_digest_it_names(files):
    (files / "own.geojson").write_text(square(1))
    write_policy(files)
    digest = hashlib.sha256(square(1).encode()).hexdigest()
    assert f"borders.sha256: found 'nothing', wanted {digest}" in refusal(files)
    write_policy(files, f'sha256 = "{digest}"\n')
    assert assembly.load(files / "agent.toml").borders().countries_near(0.5, 0.5, 10) == {"CN"}
    (files / "own.geojson").write_text(square(2))
    assert "borders.sha256" in refusal(files), "they may have been those of an older policy"


def test_borders_that_are_not_those_of_the_policy_are_refused_at_a_development_desk_too(files):
    (files / "agent.toml").write_text(AGENT.split("[trust]", maxsplit=1)[0])
    (files / "own.geojson").write_text(square(1))
    write_policy(files)
    assert not assembly.load(files / "agent.toml").trusted, "nothing is asked for where nothing has to be signed"
    write_policy(files, f'sha256 = "{"0" * 64}"\n')
    assert "borders.sha256" in refusal(files)


def test_digest_of_borders_that_the_policy_does_not_name_is_a_mistake(files):
    text = POLICY + f'[borders]\nsha256 = "{"0" * 64}"\n'
    (files / "policy.toml").write_text(text)
    assert sign("--key", files / "fleet.pem", files / "policy.toml") == 2
    (files / "agent.toml").write_text(AGENT.split("[trust]", maxsplit=1)[0])
    assert "borders.geojson" in refusal(files)


def test_policy_without_the_digest_of_its_borders_is_not_signed_and_the_digest_is_told(files, capsys):
    (files / "own.geojson").write_text(square(1))
    write_policy(files)
    (files / "policy.toml.sig").unlink()
    assert sign("--key", files / "fleet.pem", files / "policy.toml") == 2
    told = capsys.readouterr().err
    assert not (files / "policy.toml.sig").exists()
    digest = re.search("wanted ([0-9a-f]{64})", told)[1]
    with (files / "policy.toml").open("a") as file:
        file.write(f'sha256 = "{digest}"\n')
    assert sign("--key", files / "fleet.pem", files / "policy.toml") == 0
    assert assembly.load(files / "agent.toml").trusted


def test_keys_that_cannot_be_read_leave_nothing_trusted(files):
    (files / "fleet.pem.pub").write_text("junk")
    assert "trust.keys_file" in refusal(files)


def test_without_trust_nothing_has_to_be_signed(files):
    (files / "policy.toml.sig").unlink()
    (files / "detector.json").unlink()
    (files / "agent.toml").write_text(AGENT.split("[trust]", maxsplit=1)[0])
    setup = assembly.load(files / "agent.toml")
    assert not setup.trusted
    assert setup.manifest == b""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "residency-agent signature v2\n",
        "\0" * 5000,
        f"residency-agent signature v1\ntype: {Kind.POLICY}\nkeyid: k\n",
    ],
)
def test_nonsense_is_no_signature(text):
    with pytest.raises(EnvelopeError):
        detached.verify(text, Kind.POLICY, b"", {})


def test_signature_of_another_length_is_refused():
    key = Ed25519PrivateKey.generate()
    text = f"residency-agent signature v1\ntype: {Kind.POLICY}\nkeyid: k\ned25519: AAAA\n"
    with pytest.raises(EnvelopeError):
        detached.verify(text, Kind.POLICY, b"", {"k": key.public_key()})


def test_generated_key_is_private_and_is_never_overwritten(files, capsys):
    assert (files / "fleet.pem").stat().st_mode & 0o077 == 0
    before = (files / "fleet.pem").read_bytes()
    assert sign("--key", files / "fleet.pem", "--generate") == 1
    assert "File exists" in capsys.readouterr().err
    assert (files / "fleet.pem").read_bytes() == before


def test_file_whose_kind_nobody_tells_is_not_signed(files, capsys):
    (files / "notes.txt").write_text("")
    assert sign("--key", files / "fleet.pem", files / "notes.txt") == 1
    assert "--as" in capsys.readouterr().err
    assert not Path(files / "notes.txt.sig").exists()


def test_status_is_told_although_the_policy_is_refused(files, capsys):
    (files / "policy.toml.sig").unlink()
    assert command_line.main(["check", str(files / "agent.toml")]) == 2
    assert command_line.main(["status", str(files / "agent.toml")]) == 1
    assert "ledger.sqlite" in capsys.readouterr().err
