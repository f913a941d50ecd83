"""From the configuration's tables to the options that each part takes; secrets are read from their files here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from agent import boot
from agent.assembly import Setup
from agent.beacon import BeaconOptions
from agent.errors import ConfigError, EnvelopeError, InvalidConfigError, ModelError
from agent.intake.intake import IntakeOptions
from agent.mqtt.packets import Session
from agent.payloads.fields import SHORTEST_KEY, FieldRules
from agent.payloads.inspection import InspectionLimits
from agent.pictures.formats import Fill, Margin, People, PictureLimits, RedactionOptions
from agent.pipeline import Identity, Pipeline
from agent.places.gnss import FixReader, FixSource
from agent.places.positions import PositionHistory, PositionLimits
from agent.redaction.manifest import parse_manifest, read_model
from agent.redaction.worker import WorkerOptions
from agent.settings.config import Credential, PositionSource
from agent.settings.field_config import field_rules
from agent.store.entries import LedgerLimits
from agent.uplink.egress import PeerRules
from agent.uplink.options import UplinkOptions
from agent.uplink.presence import PresenceOptions
from agent.wire.signing import Signer

SECOND = 10**9
PACKET_SLACK = 64 << 10  # topic, properties and headers of an MQTT packet


def _identity(setup: Setup) -> Identity:
    """Who this vehicle is, and which boot this is."""
    vehicle = setup.config.vehicle
    return Identity(
        source=vehicle.source,
        boot_id=boot.boot_id(),
        registration=vehicle.registration,
        fixed_country=vehicle.fixed_country,
    )


def pipeline(setup: Setup, signed_by: Signer | None) -> Pipeline:
    """The decisions of this vehicle under its policy, with an empty fix history; raises InvalidConfigError."""
    vehicle = _identity(setup)
    return Pipeline(
        identity=vehicle,
        policy=setup.policy,
        borders=setup.borders(),
        positions=PositionHistory(position_limits(setup), boot_id=vehicle.boot_id),
        limits=inspection_limits(setup),
        signer=signed_by,
        field_rules=field_rules_of(setup),
    )


def inspection_limits(setup: Setup) -> InspectionLimits:
    """What is looked into, and how far."""
    limits = setup.config.limits
    picture = PictureLimits(max_bytes=limits.payload_bytes, max_pixels=limits.picture_pixels)
    return InspectionLimits(max_bytes=limits.payload_bytes, max_pictures=limits.pictures_per_payload, picture=picture)


def ledger_limits(setup: Setup) -> LedgerLimits:
    """What the disk may hold."""
    limits = setup.config.limits
    return LedgerLimits(
        total_bytes=limits.ledger_bytes,
        lane_bytes=limits.lane_bytes,
        audit_bytes=limits.audit_bytes,
        intake_window=4 * max(setup.config.broker.window, setup.config.broker.picture_window),
    )


def worker_options(setup: Setup) -> WorkerOptions:
    """The redaction process."""
    model = setup.config.model
    return WorkerOptions(
        manifest=setup.manifest_path,
        manifest_data=setup.manifest,
        model_data=_model(setup),
        threads=model.threads,
        far=model.far,
        timeout_s=model.timeout_s,
        memory_bytes=model.memory_bytes,
        unload_after_s=model.unload_after_s,
        redaction=RedactionOptions(
            people=People(model.people),
            fill=Fill(model.fill),
            margins={label: Margin(part=model.margin) for label in ("person", "face", "plate")},
        ),
        limits=inspection_limits(setup),
    )


def _model(setup: Setup) -> bytes:
    """The model of the manifest; empty where it is not that, for the redaction process to say so."""
    try:
        return read_model(setup.manifest_path, parse_manifest(setup.manifest_path, setup.manifest))
    except ModelError:
        return b""


def position_limits(setup: Setup) -> PositionLimits:
    """What a fix says about other moments."""
    motion = setup.config.motion
    return PositionLimits(
        max_speed_mps=motion.max_speed_mps, max_age_ns=round(motion.max_fix_age_s * SECOND), fixes=motion.history
    )


def fix_readers(setup: Setup) -> list[tuple[str, FixReader]]:
    """A reader for each [[position]] table, with the filter of its topics."""
    return [(source.topic, FixReader(_fix_source(source))) for source in setup.config.position]


def signer(setup: Setup) -> Signer | None:
    """The signing key, if there is one; raises InvalidConfigError for a file that holds none."""
    signing = setup.config.signing
    if not signing.key_file:
        return None
    try:
        return Signer.from_pem(Path(signing.key_file).read_bytes(), signing.key_id or None)
    except (OSError, EnvelopeError, ValueError) as exc:
        wanted = "a readable Ed25519 private key in PEM"
        raise InvalidConfigError([ConfigError(setup.file, "signing.key_file", str(exc), wanted)]) from exc


def field_rules_of(setup: Setup) -> dict[str, FieldRules]:
    """Field rules by the topic filter of their rule; raises InvalidConfigError without the key that they need.

    Of rules with the same filter the first decides, in this as in all else, also where it has no field rules.
    """
    deciding = {rule.topic: rule.fields for rule in reversed(setup.policy.config.rules)}
    known = {topic: fields for topic, fields in deciding.items() if fields is not None}
    key = _pseudonym_key(setup) if any(fields.pseudonymise for fields in known.values()) else b""
    return {topic: field_rules(fields, key) for topic, fields in known.items()}


def _pseudonym_key(setup: Setup) -> bytes:
    file = setup.config.signing.pseudonym_key_file
    wanted = f"a file of at least {SHORTEST_KEY} secret bytes, which the policy's pseudonymise needs"
    try:
        key = Path(file).read_bytes() if file else b""
    except OSError as exc:
        raise InvalidConfigError([ConfigError(setup.file, "signing.pseudonym_key_file", str(exc), wanted)]) from exc
    if len(key) < SHORTEST_KEY:
        found = f"{len(key)} bytes" if file else "nothing"
        raise InvalidConfigError([ConfigError(setup.file, "signing.pseudonym_key_file", found, wanted)])
    return key


def audit_seal(found: Signer | None) -> Callable[[bytes], bytes] | None:
    """What signs the head of the audit log; the plain bytes are signed, they carry their own type."""
    return found.key.sign if found is not None else None


def intakes(setup: Setup) -> list[IntakeOptions]:
    """The telemetry session with the position topics, and the pictures' session where there are pictures."""
    intake, broker = setup.config.intake, setup.config.broker
    found = [_intake(setup, "telemetry", tuple(intake.telemetry), tuple(_fix_topics(setup)), broker.window)]
    if intake.pictures:
        found.append(_intake(setup, "pictures", tuple(intake.pictures), (), broker.picture_window))
    return found


def _in_car(setup: Setup, name: str) -> Session:
    broker = setup.config.broker
    return Session(
        host=broker.host,
        port=broker.port,
        client_id=f"{broker.client_id}-{name}",
        protocol=broker.protocol,
        username=broker.username,
        password=_secret(setup, "broker.password_file", broker.password_file),
        keepalive_s=broker.keepalive_s,
    )


def beacon(setup: Setup) -> BeaconOptions | None:
    """The status message on the in-car broker, where there is one."""
    table = setup.config.status
    if not table.topic:
        return None
    return BeaconOptions(session=_in_car(setup, "status"), topic=table.topic, interval_s=table.interval_s)


def _intake(setup: Setup, name: str, outgoing: tuple[str, ...], fixes: tuple[str, ...], window: int) -> IntakeOptions:
    broker, limits = setup.config.broker, setup.config.limits
    session = replace(
        _in_car(setup, name),
        clean_start=False,
        session_expiry_s=broker.session_expiry_s,
        receive_maximum=window,
        maximum_packet_bytes=2 * limits.payload_bytes + PACKET_SLACK,
    )
    return IntakeOptions(name=name, session=session, outgoing=outgoing, fixes=fixes, queue_bytes=limits.queue_bytes)


def _fix_topics(setup: Setup) -> list[str]:
    return [source.topic for source in setup.config.position]


def uplink(setup: Setup, name: str, key_id: str | None = None) -> UplinkOptions:
    """One endpoint of the policy with this vehicle's credentials for it; `key_id` names the signing key."""
    endpoint = setup.policy.endpoints[name]
    credential = setup.config.credentials.get(name, Credential())
    key = f"credentials.{name}.password_file"
    session = Session(
        host=endpoint.host,
        port=endpoint.port,
        client_id=f"{setup.config.vehicle.name}-{name}",
        protocol=endpoint.protocol,
        username=credential.username,
        password=_secret(setup, key, credential.password_file),
        keepalive_s=endpoint.keepalive_s,
    )
    peer = PeerRules(
        host=endpoint.host,
        port=endpoint.port,
        networks=tuple(endpoint.networks),
        spki_sha256=tuple(endpoint.spki_sha256),
        tls=endpoint.tls,
        ca_file=endpoint.ca_file,
        cert_file=credential.cert_file,
        key_file=credential.key_file,
    )
    return UplinkOptions(
        name=name,
        vehicle=setup.config.vehicle.name,
        session=session,
        peer=peer,
        topic=endpoint.topic,
        wire=endpoint.wire,
        batch_records=endpoint.batch_records,
        batch_compression=endpoint.batch_compression,
        in_flight=endpoint.in_flight,
        ack_timeout_s=endpoint.ack_timeout_s,
        presence=_presence(setup, key_id) if endpoint.presence else None,
        backlog_bytes_per_s=endpoint.backlog_bytes_per_s,
    )


def _presence(setup: Setup, key_id: str | None) -> PresenceOptions:
    vehicle = setup.config.vehicle
    return PresenceOptions(source=vehicle.source, vehicle=vehicle.name, keyid=key_id)


def _secret(setup: Setup, key: str, file: str) -> str:
    if not file:
        return ""
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidConfigError([ConfigError(setup.file, key, str(exc), "a readable file")]) from exc


def _fix_source(source: PositionSource) -> FixSource:
    return FixSource(
        format=source.format,
        latitude=source.latitude,
        longitude=source.longitude,
        accuracy=source.accuracy,
        time=source.time,
        datum=source.datum,
        default_accuracy_m=source.default_accuracy_m,
    )
