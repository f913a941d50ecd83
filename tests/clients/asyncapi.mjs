// Judges an AsyncAPI document with the official parser, then messages against it.
//   node asyncapi.mjs DOCUMENT < JSON lines {topic, contentType, userProperties, payload (base64)}
// Prints {diagnostics: [...], messages: [[channel, message, errors], ...]}.
import { readFileSync } from "node:fs";
import { Parser } from "@asyncapi/parser";
import { decode } from "@msgpack/msgpack";
import Ajv from "ajv";
import addFormats from "ajv-formats";

const { document, diagnostics } = await new Parser().parse(readFileSync(process.argv[2], "utf8"));
const found = diagnostics.map(({ severity, code, path, message }) => ({ severity, code, path: path.join("."), message }));
const ajv = new Ajv({ strict: false, allErrors: true });
addFormats(ajv);

// Byte strings become one character per byte, as the schemas describe them.
const asText = (value) =>
  value instanceof Uint8Array ? Buffer.from(value).toString("latin1")
  : Array.isArray(value) ? value.map(asText)
  : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, asText(v)]))
  : value;

// {topic} may hold further levels; every other parameter is one level.
function matches(address, topic) {
  const escaped = address.split(/\{(\w+)\}/).map((part, odd) =>
    odd % 2 ? (part === "topic" ? ".+" : "[^/]+") : part.replace(/[.*+?^$()|[\]\\]/g, "\\$&"));
  return new RegExp(`^${escaped.join("")}$`).test(topic);
}

function payloadOf(contentType, payload) {
  if (contentType?.endsWith("+json")) return JSON.parse(payload);
  return /\b(envelope|batch)\+msgpack$/.test(contentType) ? asText(decode(payload)) : payload.toString("latin1");
}

function errors(schema, value) {
  if (!schema) return [];
  const check = ajv.compile(schema.json());
  return check(value) ? [] : check.errors.map(({ instancePath, message }) => `${instancePath} ${message}`);
}

function judged({ topic, contentType, userProperties, payload }) {
  const bytes = Buffer.from(payload, "base64");
  const channels = document.channels().all().filter((channel) => matches(channel.address(), topic));
  // The records' address is a pattern that the others match as well: the one with the fewest parameters is meant.
  const parameters = (one) => one.address().split("{").length;
  const [channel] = channels.sort((one, other) => parameters(one) - parameters(other));
  if (!channel) return [null, null, [`no channel has the address ${topic}`]];
  const messages = channel.messages().all();
  const message = messages.find((one) => one.contentType() === contentType) ?? messages.find((one) => !one.contentType());
  if (!message) return [channel.id(), null, [`no message has the content type ${contentType}`]];
  return [channel.id(), message.id(), [
    ...errors(message.headers(), userProperties).map((text) => `headers${text}`),
    ...errors(message.payload(), payloadOf(contentType, bytes)).map((text) => `payload${text}`),
  ]];
}

const lines = readFileSync(0, "utf8").split("\n").filter(Boolean).map((line) => JSON.parse(line));
console.log(JSON.stringify({ diagnostics: found, messages: document ? lines.map(judged) : [] }));
