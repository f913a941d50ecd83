import asyncio

import pytest
from harness import car

from agent import assembly, doctor
from agent.settings.config import shipped_manifest


async def findings(setup):
    return {finding.name: finding async for finding in doctor.examine(setup)}


@pytest.mark.skipif(not shipped_manifest().is_file(), reason="the detector is not in this checkout")
async def test_doctor_finds_nothing_wrong_with_a_working_car(tmp_path, patience):
    (tmp_path / "state").mkdir(mode=0o700)
    async with asyncio.timeout(2 * patience), car(tmp_path) as it:
        found = await findings(assembly.load(it.config))
    assert set(found) == {"clock", "disk", "in-car broker", "endpoint cn", "endpoint hk", "model"}
    assert all(not finding.advice for finding in found.values()), [str(finding) for finding in found.values()]


async def test_doctor_says_what_to_do_about_each_failure(tmp_path, patience):
    (tmp_path / "state").mkdir(mode=0o755)
    async with asyncio.timeout(2 * patience), car(tmp_path) as it:
        it.configure(agent='[model]\nmanifest = "absent.json"\n')
        await it.inner.kill()
        await it.outer["hk"].kill()
        found = await findings(assembly.load(it.config))
    assert {name for name, finding in found.items() if finding.advice} == {
        "disk",
        "in-car broker",
        "endpoint hk",
        "model",
    }
    assert "[broker]" in str(found["in-car broker"])
    assert str(found["endpoint cn"]).startswith("ok")


def test_clock_that_was_never_set_is_a_finding(monkeypatch):
    monkeypatch.setattr("time.time_ns", lambda: 86_400 * 10**9)
    assert "1970-01-02" in doctor._clock().detail
    assert doctor._clock().advice
