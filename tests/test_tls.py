"""Certificates that change while the car drives: the new ones where they work, the old ones where they do not."""

import asyncio
import signal
import ssl

import pytest
from authority import Authority
from harness import SHENZHEN, car
from test_reload import edit, reload

from agent.errors import EndpointError
from agent.uplink import tls
from agent.uplink.egress import PeerRules
from agent.uplink.tls import Files, Shown
from tools.brokers import free_port, mosquitto_path

HERE = "127.0.0.1"


class Server:
    """What an endpoint would say to a context: it knows which of our certificates it takes."""

    def __init__(self, *accepted):
        self.accepted, self.shown, self.up = set(accepted), [], True

    async def opened(self, made):
        name = made.certificate
        self.shown.append(name)
        if not self.up:
            raise EndpointError("unreachable")
        if name not in self.accepted:
            raise EndpointError(f"alert: {name}")
        return name


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """Three files; a context remembers which certificate it was made with. `bad` in a file makes it unusable."""

    def context(_rules, files):
        if None in (files.ca, files.cert, files.key) or b"bad" in (files.ca, files.cert, files.key):
            raise EndpointError("its TLS files cannot be used")
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.certificate = f"{files.cert.decode()} by {files.ca.decode()}"
        return made

    monkeypatch.setattr(tls, "context", context)
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text("1")
    files = {f"{name}_file": str(tmp_path / name) for name in ("ca", "cert", "key")}
    return PeerRules(host=HERE, port=1, **files)


class Certificate(ssl.SSLContext):
    certificate = ""


@pytest.fixture(autouse=True)
def marked(monkeypatch):
    """An SSLContext of C takes no attributes."""
    monkeypatch.setattr(tls.ssl, "SSLContext", Certificate)


async def test_new_files_are_used_at_the_next_connection(rules, tmp_path):
    server, shown = Server("1 by 1", "2 by 2"), Shown("a")
    assert await shown.connect(rules, server.opened) == "1 by 1"
    assert not await shown.differs(rules)
    (tmp_path / "cert").write_text("2")
    (tmp_path / "ca").write_text("2")
    assert await shown.differs(rules)
    assert await shown.connect(rules, server.opened) == "2 by 2"
    assert shown.error == ""


@pytest.mark.parametrize("content", ["2", "bad", None])
@pytest.mark.parametrize("name", ["cert", "key"])
async def test_certificate_that_does_not_work_leaves_the_last_one_in_use(rules, tmp_path, name, content):
    server, shown = Server("1 by 1"), Shown("a")
    await shown.connect(rules, server.opened)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    assert await shown.connect(rules, server.opened) == "1 by 1"
    if (name, content) == ("key", "2"):
        return  # this server takes it
    assert shown.error
    assert not shown.due(tls.time.monotonic())


async def test_files_that_failed_are_not_tried_at_every_connection_but_later_and_when_asked(
    rules, tmp_path, monkeypatch
):
    server, shown, now = Server("1 by 1"), Shown("a"), [1000.0]
    monkeypatch.setattr(tls.time, "monotonic", lambda: now[0])
    await shown.connect(rules, server.opened)
    (tmp_path / "cert").write_text("2")
    for _ in range(3):
        await shown.connect(rules, server.opened)
    assert server.shown == ["1 by 1", "2 by 1", "1 by 1", "1 by 1", "1 by 1"]
    now[0] += tls.FIRST_RETRY_SECONDS
    assert shown.due(now[0])
    await shown.connect(rules, server.opened)
    assert server.shown[5:] == ["2 by 1", "1 by 1"]
    now[0] += tls.FIRST_RETRY_SECONDS
    assert not shown.due(now[0]), "the second pause is longer"
    server.accepted.add("2 by 1")
    shown.ask()
    assert await shown.connect(rules, server.opened) == "2 by 1"
    assert shown.error == ""


async def test_endpoint_that_nobody_reaches_says_nothing_about_a_certificate(rules, tmp_path):
    server, shown = Server("1 by 1", "2 by 1"), Shown("a")
    await shown.connect(rules, server.opened)
    (tmp_path / "cert").write_text("2")
    server.up = False
    with pytest.raises(EndpointError, match="unreachable"):
        await shown.connect(rules, server.opened)
    assert shown.error == ""
    server.up = True
    assert await shown.connect(rules, server.opened) == "2 by 1"


async def test_roots_never_go_back_unless_the_new_file_holds_none(rules, tmp_path):
    server, shown = Server("1 by 1"), Shown("a")
    await shown.connect(rules, server.opened)
    (tmp_path / "ca").write_text("2")
    with pytest.raises(EndpointError, match="1 by 2"):
        await shown.connect(rules, server.opened)
    assert server.shown[1:] == ["1 by 2", "1 by 2"], "the old roots were not tried"
    (tmp_path / "ca").write_text("bad")
    assert await shown.connect(rules, server.opened) == "1 by 1"


async def test_without_anything_that_worked_there_is_nothing_to_fall_back_to(rules):
    shown = Shown("a")
    with pytest.raises(EndpointError, match="alert"):
        await shown.connect(rules, Server().opened)
    assert shown.error == ""


def test_certificates_are_used_from_memory_and_roots_must_be_some(tmp_path, monkeypatch):
    monkeypatch.undo()
    authority = Authority(tmp_path)
    mine, other = authority.issue("car"), authority.issue("other")
    rules = PeerRules(host=HERE, port=1, ca_file=str(authority.file), cert_file=str(mine.cert), key_file=str(mine.key))
    files = tls.read(rules)
    for path in (authority.file, mine.cert, mine.key):
        path.unlink()
    assert tls.context(rules, files).verify_mode is ssl.CERT_REQUIRED
    wrong = [
        Files(ca=files.ca, cert=files.cert, key=other.key.read_bytes()),
        Files(ca=b"", cert=files.cert, key=files.key),
        Files(ca=files.ca, cert=None, key=files.key),
    ]
    for given in wrong:
        with pytest.raises(EndpointError, match="TLS files"):
            tls.context(rules, given)


@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
async def test_certificates_change_under_traffic_and_nothing_is_lost(tmp_path, patience, monkeypatch):
    monkeypatch.undo()
    authority, stranger, port = Authority(tmp_path), Authority(tmp_path, "stranger"), free_port()
    server = authority.issue(HERE, name="server")
    lines = [
        *(f"listener {port} {HERE}", f"certfile {server.cert}", f"keyfile {server.key}", f"cafile {authority.file}"),
        *("require_certificate true", "use_identity_as_username true", "log_type all"),
    ]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "tls.conf").write_text("\n".join(lines) + "\n")
    async with (
        asyncio.timeout(4 * patience),
        car(tmp_path, regions=("cn",), lines=[f"include_dir {tmp_path}/more"]) as it,
    ):
        files = f'cert_file = "{tmp_path}/car.crt"\nkey_file = "{tmp_path}/car.key"\n'
        it.configure(agent=f"[credentials.cn]\n{files}")
        edit(it, ("tls = false", f'ca_file = "{authority.file}"'), (f"port = {it.outer['cn'].port}", f"port = {port}"))

        def install(issuer, name):
            made = issuer.issue(name, name=name)
            (tmp_path / "car.crt").write_bytes(made.cert.read_bytes())
            (tmp_path / "car.key").write_bytes(made.key.read_bytes())

        async def sends(number):
            it.telemetry(number)
            await it.until(lambda: number in it.numbers("cn") and not it.counts()["pending"])

        def certificate():
            return it.status()["endpoints"]["cn"]["certificate"]

        def users():
            return [
                line.split("u'")[1].split("'")[0]
                for line in it.outer["cn"].log_path.read_text().split("\n")
                if "u'car" in line
            ]

        install(authority, "car-1")
        await it.start()
        await it.at(SHENZHEN)
        await sends(0)
        for number, spoil in enumerate(
            (
                lambda: (tmp_path / "car.crt").write_text("no certificate"),
                (tmp_path / "car.key").unlink,
                lambda: install(stranger, "car-x"),
            ),
            1,
        ):
            install(authority, "car-1")
            spoil()
            assert await reload(it) == "", "a certificate that does not work is no reason to refuse the rest"
            await sends(number)
            await it.until(certificate)
        assert set(users()) == {"car-1"}
        install(authority, "car-2")
        assert await reload(it) == ""
        await sends(4)
        await it.until(lambda: not certificate())
        assert users()[-1] == "car-2"
        assert sorted(it.numbers("cn")) == list(range(5)), "each once"
        assert it.log.count("uplink.old-certificate") == 3
        await it.stop(signal.SIGTERM)
        assert it.counts()["conserved"]
