"""A new configuration while the car drives: all of it or nothing, and nothing is lost or goes where it must not."""

import asyncio
import dataclasses
import io
import json
import random
import shutil
import signal
import socket
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from canary import saved
from harness import SHENZHEN, car
from PIL import Image
from test_detector import FAR_ONLY, far_scene, manifest_for, mean_model
from test_faults_kill import jpeg

from agent import __main__ as command_line
from agent import assembly, status
from agent import reload as reload_module
from agent.accepted import FILE, Accepted
from agent.errors import AgentError, InvalidConfigError, LedgerStalledError
from agent.intake.intake import EVER_NS, Fixes
from agent.places.positions import PositionHistory
from agent.reload import Reloader
from agent.settings.config import shipped_manifest
from agent.wire.envelope import verify
from agent.wire.signing import public_keys
from tools.brokers import mosquitto_path

pytestmark = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")

TO_BOTH = '[permit.cn]\npicture = ["cn"]\ntelemetry = ["cn", "hk"]\n'
ONLY_CN = '[permit.cn]\npicture = ["cn"]\ntelemetry = ["cn"]\n'
ONLY_HK = '[permit.cn]\npicture = ["hk"]\ntelemetry = ["hk"]\n'


def edit(it, *changes, name="policy.toml"):
    text = (it.folder / name).read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (it.folder / name).write_text(text)


def told(it):
    """What the status file says of reloads."""
    return status.read(it.folder / "state" / "status.json").get("reload", {})


async def reload(it):
    """Ask for a reload and return its error, empty where it was done."""
    before = told(it)
    it.process.send_signal(signal.SIGHUP)
    await it.until(lambda: told(it)["count"] > before["count"] or told(it)["error_ns"] > before["error_ns"])
    return told(it)["error"]


async def settled(it, numbers):
    await it.until(lambda: set(it.numbers("cn")) | set(it.numbers("hk")) >= set(numbers) and not it.counts()["pending"])


async def test_reload_under_traffic_loses_nothing_and_sends_nothing_more_to_a_withdrawn_endpoint(tmp_path, patience):
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        await it.start()
        await it.at(SHENZHEN)
        sent, stop = [], asyncio.Event()

        async def traffic():
            while not stop.is_set():
                sent.append(len(sent))
                it.telemetry(sent[-1])
                it.drive(SHENZHEN)
                await asyncio.sleep(0.01)

        driving = asyncio.create_task(traffic())
        await it.until(lambda: len(it.numbers("cn")) > 20)
        edit(it, ('version = "test"', 'version = "second"'), (ONLY_CN, ONLY_HK))
        assert await reload(it) == ""
        before = len(it.numbers("cn"))
        await it.until(lambda: len(it.numbers("hk")) > 20)
        assert len(it.numbers("cn")) == before, "nothing after the reload was reported done"
        edit(it, ('version = "second"', 'version = "third"'), (ONLY_HK, TO_BOTH))
        assert await reload(it) == ""
        await it.until(lambda: len(it.numbers("cn")) > before + 20)
        stop.set()
        await driving
        await settled(it, sent)
        assert sorted(it.numbers("cn") + it.numbers("hk")) == sent, "each once: nobody was killed"
        counts = it.counts()
        assert (counts["conserved"], counts["delivered"], counts["refused"]) == (True, len(sent), 0)
        versions = {row.attributes.policyversion for row in it.received if row.region == "hk"}
        assert versions == {"second"}
        assert "<4>" not in it.log, "a healthy reload warns of nothing"


async def test_queue_of_an_endpoint_that_is_taken_away_goes_to_the_one_that_is_permitted_now(tmp_path, patience):
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        await it.outer["cn"].stop()
        await it.start()
        await it.at(SHENZHEN)
        for number in range(300):
            it.telemetry(number)
        await it.until(lambda: it.counts()["pending"] == 300)
        text = (it.folder / "policy.toml").read_text()
        start, end = text.index("[endpoints.cn]"), text.index("[permit.cn]")
        edit(it, (text[start:end], ""), (ONLY_CN, ONLY_HK), ('version = "test"', 'version = "second"'))
        assert await reload(it) == ""
        await settled(it, range(300))
        assert sorted(it.numbers("hk")) == list(range(300))
        assert {row.attributes.policyversion for row in it.received} == {"second"}
        assert {row.attributes.dataregion for row in it.received} == {("cn",)}
        await it.until(lambda: not told(it)["deciding_again"])
        assert list(status.read(tmp_path / "state" / "status.json")["endpoints"]) == ["hk"]


async def test_bad_file_keeps_everything_and_is_shown_until_it_is_mended(tmp_path, patience, capsys):
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        await it.start()
        await it.at(SHENZHEN)
        good = (tmp_path / "policy.toml").read_text()
        for bad, reason in (
            (good.replace("countries", "contries"), "contries"),
            ("not = [toml", "TOML 1.0"),
            (good.replace('telemetry = ["cn"]', 'telemetry = ["us"]'), "permit.cn.telemetry"),
        ):
            (tmp_path / "policy.toml").write_text(bad)
            assert reason in await reload(it)
        it.telemetry(1)
        await it.until(lambda: it.numbers("cn") == [1])
        assert command_line.main(["status", str(it.config)]) == 0
        printed = capsys.readouterr().out
        assert "policy      test" in printed
        assert "REFUSED" in printed
        assert "permit.cn.telemetry" in printed
        (tmp_path / "policy.toml").write_text(good)
        edit(it, ("payload_bytes = 2", "payload_bytes = 3"), ('state = "state"', 'state = "other"'), name="agent.toml")
        error = await reload(it)
        assert "limits.payload_bytes" in error
        assert "paths.state" in error
        assert "restart" in error
        edit(it, ("payload_bytes = 3", "payload_bytes = 2"), ('state = "other"', 'state = "state"'), name="agent.toml")
        assert await reload(it) == ""
        assert command_line.main(["status", str(it.config)]) == 0
        assert "REFUSED" not in capsys.readouterr().out


async def test_mistake_of_the_agents_own_while_it_reads_is_a_refusal_that_tells_the_kind_alone(tmp_path, monkeypatch):
    def broken(_):
        raise RuntimeError("secret")

    reloader = object.__new__(Reloader)
    reloader.setup = SimpleNamespace(file=tmp_path / "agent.toml")
    monkeypatch.setattr(assembly, "load", broken)
    with pytest.raises(AgentError, match=r"could not be read: RuntimeError$"):
        await reloader._reload(None)


async def test_region_loses_no_country_while_records_that_may_carry_it_are_still_being_written_down():
    stopped = []

    async def stop(names):
        stopped.extend(names)

    reloader = object.__new__(Reloader)
    reloader._accepted, reloader.uplinks = Accepted(), SimpleNamespace(running={"cn": None}, stop=stop)
    reloader._inward = SimpleNamespace(
        committer=SimpleNamespace(stalled=None), board=SimpleNamespace(claimed={"claimed by an uplink"})
    )
    with pytest.raises(AgentError, match="not written down"):
        await reloader._remember(SimpleNamespace(policy=SimpleNamespace(shrunk=lambda _: {"cn"})))
    assert stopped == ["cn"]


@pytest.mark.parametrize("stalls", [False, True])
async def test_all_that_is_held_is_looked_at_again_after_a_review(monkeypatch, patience, stalls):
    monkeypatch.setattr(reload_module, "PAUSE_SECONDS", 0.01)
    fixes, found = Fixes([], PositionHistory()), [LedgerStalledError("full")] * stalls + [(0, 1), (3, 0)]
    fixes.taken()

    async def review():
        assert not fixes.arrived.is_set(), "not before the last record was decided about"
        one = found.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    async def submit(_entry):
        """A note is durable."""

    reloader = object.__new__(Reloader)
    reloader.setup, reloader._due = SimpleNamespace(digest="new"), asyncio.Event()
    reloader.resolver = SimpleNamespace(review=review)
    reloader._inward = SimpleNamespace(fixes=fixes, committer=SimpleNamespace(submit=submit))
    reloader._due.set()
    task = asyncio.create_task(reloader.review_loop())
    async with asyncio.timeout(patience):
        await fixes.arrived.wait()
    task.cancel()
    assert (fixes.taken(), found) == (EVER_NS, [])


def sign(folder, *names):
    command_line.main(["sign", "--key", str(folder / "fleet.pem"), *(str(folder / name) for name in names)])


async def test_only_signed_policies_are_taken_and_none_twice_or_older(tmp_path, patience):
    async with asyncio.timeout(5 * patience), car(tmp_path) as it:
        for name in ("detector.json", "detector.onnx"):
            shutil.copy(shipped_manifest().with_name(name), tmp_path)
        it.configure(agent='[model]\nmanifest = "detector.json"\n[trust]\nkeys_file = "fleet.pem.pub"\n')
        edit(it, ('version = "test"', 'version = "five"\nserial = 5'))
        command_line.main(["sign", "--key", str(tmp_path / "fleet.pem"), "--generate"])
        sign(tmp_path, "policy.toml", "detector.json")
        await it.start()
        await it.at(SHENZHEN)
        old = {name: (tmp_path / name).read_text() for name in ("policy.toml", "policy.toml.sig")}

        edit(it, (ONLY_CN, ONLY_HK), ("serial = 5", "serial = 6"), ('"five"', '"six"'))
        assert "not what" in await reload(it), "altered after it was signed"
        (tmp_path / "policy.toml.sig").unlink()
        assert "policy.toml.sig" in await reload(it)
        sign(tmp_path, "policy.toml")
        assert await reload(it) == ""

        for name, text in old.items():
            (tmp_path / name).write_text(text)
        assert "above 6" in await reload(it)
        edit(it, ("serial = 5", "serial = 6"))
        sign(tmp_path, "policy.toml")
        assert "another content" in await reload(it)

        it.telemetry(1)
        await it.until(lambda: it.numbers("hk") == [1])
        await it.stop(signal.SIGKILL)
        for path in (tmp_path / "state").glob("ledger.sqlite*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, text in old.items():
            (tmp_path / name).write_text(text)
        with (tmp_path / "agent.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "agent", "run", str(it.config), stdout=log, stderr=log
            )
        assert await process.wait() == 2, "a step back is refused at the start, even without the ledger"
        assert "above 6" in it.log


async def test_model_that_does_not_open_keeps_the_old_one(tmp_path, patience):
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        for name in ("detector.json", "detector.onnx"):
            shutil.copy(shipped_manifest().with_name(name), tmp_path)
        it.configure(agent='[model]\nmanifest = "detector.json"\n')
        await it.start()
        digest = it.status()["model"]["digest"]
        manifest = json.loads((tmp_path / "detector.json").read_text())
        (tmp_path / "detector.json").write_text(json.dumps(manifest | {"sha256": "0" * 64}))
        assert "not the one of the manifest" in await reload(it)
        await it.until(lambda: it.status()["model"]["ready"])
        assert it.status()["model"]["digest"] == digest
        thresholds = {name: value / 2 for name, value in manifest["thresholds"].items()}
        (tmp_path / "detector.json").write_text(json.dumps(manifest | {"thresholds": thresholds}))
        pid = it.process.pid
        assert await reload(it) == ""
        assert it.status()["model"]["ready"]
        assert it.process.pid == pid


async def test_refused_model_is_not_taken_by_a_redaction_process_that_starts_again(tmp_path, patience):
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        for name in ("detector.json", "detector.onnx"):
            shutil.copy(shipped_manifest().with_name(name), tmp_path)
        it.configure(agent='[model]\nmanifest = "detector.json"\nunload_after_s = 0.2\n')
        await it.start()
        await it.at(SHENZHEN)
        digest = it.status()["model"]["digest"]
        (tmp_path / "detector.json").write_text("{}")
        (tmp_path / "detector.onnx").unlink()
        assert "not valid" in await reload(it)
        await it.until(lambda: it.status()["model"]["unloaded"])
        user = [("time", str(time.time_ns()))]
        it.client.publish("vehicle/camera/front", jpeg(1), user)
        it.drive(SHENZHEN)
        await it.until(lambda: it.received)
        assert it.received[0].attributes.modeldigest == digest


async def test_far_plate_is_masked_once_a_reload_has_switched_the_second_look_on(tmp_path, patience):
    scene, (x, y) = far_scene()
    manifest_for(tmp_path, mean_model(), **FAR_ONLY)
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        it.configure(agent='[model]\nmanifest = "tiny.json"\n')
        await it.start()
        await it.at(SHENZHEN)
        for number, far in enumerate(("", "far = true\n"), 1):
            if far:
                edit(it, ("[model]\n", "[model]\n" + far), name="agent.toml")
                assert await reload(it) == ""
            it.client.publish("vehicle/camera/front", saved(scene, "PNG"), [("time", str(time.time_ns()))])
            it.drive(SHENZHEN)
            await it.until(lambda wanted=number: len(it.received) == wanted)
        seen = [np.asarray(Image.open(io.BytesIO(one.data)))[y : y + 32, x : x + 32] for one in it.received]
        assert [one.attributes.redaction for one in it.received] == ["none", "plate=1"]
        assert (seen[0].min(), seen[1].max()) == (255, 0)


async def test_agent_killed_during_a_reload_starts_again_with_everything(tmp_path, patience):
    chance = random.Random(5)
    async with asyncio.timeout(8 * patience), car(tmp_path) as it:
        await it.outer["cn"].stop()
        await it.outer["hk"].stop()
        await it.start()
        await it.at(SHENZHEN)
        for number in range(200):
            it.telemetry(number)
        await it.until(lambda: it.counts()["pending"] == 200)
        rows = [ONLY_CN, ONLY_HK]
        for turn in range(2):
            edit(it, (rows[turn % 2], rows[(turn + 1) % 2]))
            it.process.send_signal(signal.SIGHUP)
            await asyncio.sleep(chance.uniform(0.0, 0.3))
            await it.stop(signal.SIGKILL)
            await it.start()
            counts = it.counts()
            assert (counts["conserved"], counts["pending"]) == (True, 200)
        await it.until(lambda: not told(it)["deciding_again"])
        await it.outer["cn"].start()
        await it.outer["hk"].start()
        await settled(it, range(200))
        assert sorted(it.numbers("cn")) == list(range(200))
        assert it.numbers("hk") == []


async def test_systemd_hears_when_a_reload_begins_and_ends(tmp_path, patience, monkeypatch):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        async with asyncio.timeout(2 * patience), car(tmp_path, regions=("cn",)) as it:
            monkeypatch.setenv("NOTIFY_SOCKET", str(path))  # for the agent only: the brokers would speak to it too
            await it.start()
            await reload(it)
            await it.stop()
        listener.setblocking(False)
        said = []
        while "STOPPING=1" not in said:
            said.append(listener.recv(1000).decode())
    said = [text for text in said if not text.startswith("WATCHDOG")]
    assert [text.split("\n")[0] for text in said] == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
    assert said[1].split("\n")[1].removeprefix("MONOTONIC_USEC=").isdigit()


async def test_region_that_loses_a_country_is_refused_with_its_records_before_the_policy_holds(tmp_path, patience):
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        edit(it, ('countries = ["CN"]', 'countries = ["CN", "MO"]'))
        await it.outer["cn"].stop()
        await it.start()
        await it.at(SHENZHEN)
        it.telemetry(1)
        await it.until(lambda: it.counts()["pending"] == 1)
        edit(it, ('countries = ["CN", "MO"]', 'countries = ["CN"]'))
        assert await reload(it) == ""
        it.telemetry(2)
        await it.outer["cn"].start()
        await it.until(lambda: it.numbers("cn") == [2])
        counts = it.counts()
        assert counts["breakdown"]["refused"]["reason"] == {"region.redefined": 1}
        assert counts["conserved"]


# --- what is remembered -------------------------------------------------------------------------------------------


def test_note_and_file_are_believed_whichever_has_seen_more(tmp_path):
    for text in (None, "", "{", "[]", '{"serial": "x"}'):
        (tmp_path / FILE).write_text(text or "")
        assert Accepted.read(text, tmp_path) == Accepted()
    older, newer = Accepted(serial=3, digest="d"), Accepted(serial=4, digest="e", meanings={"cn": ["CN"]})
    newer.write(tmp_path)
    assert Accepted.read(older.note(), tmp_path) == newer
    older.write(tmp_path)
    assert Accepted.read(newer.note(), tmp_path) == newer
    (tmp_path / FILE).unlink()
    assert Accepted.read(newer.note(), tmp_path) == newer


@pytest.fixture
def setup_of(tmp_path):
    def make(serial, *, trusted=True, digest="new"):
        (tmp_path / "agent.toml").write_text(
            '[vehicle]\nsource = "urn:x"\nname = "x"\nfixed_country = "CN"\n[intake]\ntelemetry = ["a"]\n'
        )
        (tmp_path / "policy.toml").write_text(
            f'version = "1"\nserial = {serial}\nrules = []\n[regions.cn]\ncountries = ["CN"]\n'
            "[endpoints]\n[classes]\n[permit]\n"
        )
        return dataclasses.replace(assembly.load(tmp_path / "agent.toml"), trusted=trusted, digest=digest)

    return make


@pytest.mark.parametrize(
    ("serial", "digest", "good"), [(6, "x", True), (5, "old", True), (5, "x", False), (4, "x", False)]
)
def test_serial_goes_up_and_one_serial_is_one_content(setup_of, serial, digest, good):
    remembered = Accepted(serial=5, digest="old")
    if good:
        remembered.check(setup_of(serial, digest=digest))
        return
    with pytest.raises(InvalidConfigError, match="serial"):
        remembered.check(setup_of(serial, digest=digest))


def test_unsigned_policy_moves_no_serial(setup_of):
    remembered = Accepted(serial=5, digest="old", meanings={"gone": ["XX"]})
    remembered.check(setup_of(1, trusted=False))
    after = remembered.after(setup_of(99, trusted=False))
    assert (after.serial, after.digest) == (5, "old")
    assert after.meanings == {"gone": ["XX"], "cn": ["CN"]}
    assert remembered.after(setup_of(6)).serial == 6


async def test_record_key_is_taken_over_and_a_bad_one_is_not(tmp_path, patience):
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        it.configure(agent='[signing]\nkey_file = "car.pem"\n')
        command_line.main(["sign", "--key", str(tmp_path / "car.pem"), "--generate"])
        await it.start()
        await it.at(SHENZHEN)

        async def signed(number):
            it.telemetry(number)
            await it.until(lambda: len(it.received) == number)
            return it.received[-1].envelope

        keys = public_keys((tmp_path / "car.pem.pub").read_bytes())
        verify(await signed(1), keys)
        good = (tmp_path / "car.pem").read_bytes()
        (tmp_path / "car.pem").write_text("no key")
        assert "signing.key_file" in await reload(it)
        verify(await signed(2), keys)
        (tmp_path / "car.pem").unlink()
        command_line.main(["sign", "--key", str(tmp_path / "car.pem"), "--generate"])
        assert (tmp_path / "car.pem").read_bytes() != good
        assert await reload(it) == ""
        fresh = public_keys((tmp_path / "car.pem.pub").read_bytes())
        verify(await signed(3), fresh)
        await it.stop()
        audit = ["audit", "verify", "--key", str(tmp_path / "car.pem.pub"), str(tmp_path / "state" / "ledger.sqlite")]
        assert command_line.main(audit) == 0, "the audit log's seal is signed by the new key as well"
