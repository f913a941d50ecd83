// Reads records from a broker with clients that know nothing of the agent, and prints what it saw as JSON lines.
//   node records.mjs PORT FILTER COUNT KEYID PUBLIC_KEY_PEM
import { createHash, createPublicKey, verify } from "node:crypto";
import { readFileSync } from "node:fs";
import { decode, encode } from "@msgpack/msgpack";
import { MQTT } from "cloudevents";
import mqtt from "mqtt";

const [port, filter, count, keyid, pem] = process.argv.slice(2);
const keys = { [keyid]: createPublicKey(readFileSync(pem)) };
const ENVELOPE = "application/vnd.residency-agent.envelope+msgpack";
const EVENT = "application/vnd.residency-agent.event.v1+msgpack";

// MQTT.js gives a name that occurs once as a string, and one that occurs again as an array.
function verified(type, payload, signature) {
  if (!signature || !(signature.keyid in keys)) return false;
  const head = `DSSEv1 ${Buffer.byteLength(type)} ${type} ${payload.length} `;
  return verify(null, Buffer.concat([Buffer.from(head), payload]), keys[signature.keyid], signature.sig);
}

function fromEnvelope(payload) {
  const envelope = decode(payload);
  const { data, ...attributes } = decode(envelope.payload);
  return { attributes, data, good: verified(envelope.payloadType, envelope.payload, envelope.signatures[0]) };
}

function fromBinary(payload, contentType, headers) {
  const event = MQTT.toEvent({ headers, body: payload, PUBLISH: { "Content Type": contentType } }, true);
  const { keyid, signature, ...signed } = headers;
  const attributes = { ...signed, datacontenttype: contentType };
  const rebuilt = encode({ ...attributes, data: payload }, { sortKeys: true });
  const sig = signature && { keyid, sig: Buffer.from(signature, "base64") };
  const { id, source, type, subject, dataregion } = event;
  return { attributes, data: event.data, good: verified(EVENT, rebuilt, sig), sdk: { id, source, type, subject, dataregion } };
}

let left = Number(count);
const client = mqtt.connect({ port: Number(port), host: "127.0.0.1", protocolVersion: 5, clientId: "node-records" });
client.on("connect", () => client.subscribe(filter, { qos: 1 }, () => console.log(JSON.stringify({ ready: true }))));
client.on("error", (error) => { if (left > 0) { console.error(error); process.exit(1); } });
client.on("message", (topic, payload, packet) => {
  const { contentType, userProperties = {} } = packet.properties ?? {};
  const headers = { ...userProperties };
  const record = contentType === ENVELOPE ? fromEnvelope(payload) : fromBinary(payload, contentType, headers);
  const { attributes, data, good, sdk } = record;
  const digest = createHash("sha256").update(data).digest("hex");
  console.log(JSON.stringify({
    topic, contentType, userProperties: headers, attributes, good, sdk, digest, payload: payload.toString("base64"),
  }));
  if (--left === 0) setImmediate(() => client.end()); // after the PUBACK of this message
});
