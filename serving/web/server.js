// What the page asks of its server: models, and pictures as a stream of events.

let token = sessionStorage.getItem("token") ?? "";

export function setToken(text) {
  token = text;
  sessionStorage.setItem("token", text);
}

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(more = {}) {
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

async function checked(answer) {
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw new ServerError(said?.error?.message ?? `the server answers ${answer.status}`, answer.status);
}

export async function models() {
  const answer = await checked(await fetch("/v1/models", { headers: headers() }));
  return (await answer.json()).data;
}

// Pictures of a request, each event handed on as it comes. `edit`: { image, mask } as blobs.
export async function draw(body, edit, signal, onEvent) {
  const streamed = { ...body, stream: true };
  let path = "/v1/images/generations";
  let options = { headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(streamed) };
  if (edit) {
    path = "/v1/images/edits";
    const form = new FormData();
    for (const [name, value] of Object.entries(streamed)) form.set(name, String(value));
    form.set("image", edit.image, "image");
    if (edit.mask) form.set("mask", edit.mask, "mask");
    options = { headers: headers(), body: form };
  }
  const answer = await checked(await fetch(path, { method: "POST", signal, ...options }));
  for await (const event of events(answer.body)) {
    if (event.error) throw new ServerError(event.error.message, 0);
    onEvent(event);
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

export function blobOf(base64, type = "image/png") {
  return new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type });
}
