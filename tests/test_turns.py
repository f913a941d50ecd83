import asyncio

from agent.intake.turns import Turns


async def holding(turns, log, name, release):
    async with turns.deciding():
        log.append(f"{name} in")
        await release.wait()
        log.append(f"{name} out")


async def changing(turns, log):
    async with turns.alone():
        log.append("change")


async def until(log, entry):
    for _ in range(1000):
        if entry in log:
            return
        await asyncio.sleep(0)
    raise AssertionError(log)


async def test_change_waits_for_what_is_being_decided_and_the_next_decision_for_the_change():
    turns, log, release = Turns(), [], asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(holding(turns, log, "a", release))
        group.create_task(holding(turns, log, "b", release))
        await until(log, "b in")
        group.create_task(changing(turns, log))
        await asyncio.sleep(0)
        group.create_task(holding(turns, log, "c", release))
        for _ in range(5):
            await asyncio.sleep(0)
        assert log == ["a in", "b in"], "many decide at a time; nobody begins once a change is wanted"
        release.set()
    assert log.index("change") > max(log.index("a out"), log.index("b out"))
    assert log.index("c in") > log.index("change")


async def test_change_that_is_given_up_lets_everyone_go_on():
    turns, log, release = Turns(), [], asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(holding(turns, log, "a", release))
        await until(log, "a in")
        change = group.create_task(changing(turns, log))
        await asyncio.sleep(0)
        change.cancel()
        group.create_task(holding(turns, log, "b", release))
        await until(log, "b in")
        release.set()
    assert "change" not in log
