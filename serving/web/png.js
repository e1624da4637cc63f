// The request in a PNG that was drawn here or by runtime.generate: its tEXt chunk "r2".

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

export async function requestOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (SIGNATURE.some((byte, i) => bytes[i] !== byte)) return null;
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (kind === "IDAT" || at + 12 + length > bytes.length) return null;
    if (kind === "tEXt") {
      const text = new TextDecoder("latin1").decode(bytes.subarray(at + 8, at + 8 + length));
      if (text.startsWith("r2\0")) return parsed(text.slice(3));
    }
    at += 12 + length;
  }
  return null;
}

function parsed(text) {
  try {
    const found = JSON.parse(text);
    return found && typeof found.request === "object" ? found : null;
  } catch {
    return null;
  }
}

// Labels as metadata has them (7, [7, 11], {"7:11": 0.5}, null), in the grammar of prompts.
export function promptOf(labels) {
  return labels.map(written).join(",");
}

function written(label) {
  if (label === null) return "none";
  if (Array.isArray(label)) return label.join(":");
  if (typeof label === "object") return Object.entries(label).map(([term, weight]) => `${term}*${weight}`).join("+");
  return String(label);
}

// What of a request the server's interface has no word for; empty where it can be drawn again here.
export function missing(request) {
  const own = { crop: null, continue_at: null, noise: "coherent", init: null, mask: null };
  const found = Object.entries(own).filter(([name, usual]) => name in request && request[name] !== usual);
  const [low, high] = request.guidance_interval ?? [0, 1];
  if (low !== 0 || high !== 1) found.push(["guidance_interval"]);
  return found.map(([name]) => name);
}
