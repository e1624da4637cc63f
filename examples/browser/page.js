// The page: reads the form, asks the worker for one picture after the other, shows them.

const worker = new Worker("worker.js", { type: "module" });
const at = (id) => document.getElementById(id);
const say = (text) => (at("status").textContent = text);
let inputs = {};

/** What the worker answers; one question is open at a time. */
function ask(question) {
  return new Promise((resolve, reject) => {
    worker.onerror = (event) => reject(new Error(event.message || "the worker cannot be loaded"));
    worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve(data));
    worker.postMessage(question);
  });
}

/** Do what takes a while, with nothing else to be begun meanwhile; say what fails. */
async function busy(work) {
  at("draw").disabled = at("file").disabled = true;
  try {
    await work();
  } catch (error) {
    say(error.message);
  }
  at("file").disabled = false;
  at("draw").disabled = !inputs.noise;
}

async function open(model) {
  inputs = {};
  const opened = await ask({ model });
  inputs = opened.inputs;
  const names = ["none", ...Array(inputs.condition?.[1] ?? 0).keys()];
  at("labels").replaceChildren(at("labels").firstElementChild, ...names.map(choice));
  at("ratio").parentElement.hidden = !inputs.size;
  say(`Ready, on ${opened.provider}`);
}

/** A radio button of a label; the first label is chosen, none where there is no other. */
function choice(name, place) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "label", value: name, checked: place < 2 });
  label.append(input, String(name));
  return label;
}

/** Heights and widths in pixels, of a text such as 64x64, 40x80. */
function sizesOf(text) {
  return text.split(",").map((part) => {
    const found = part.trim().match(/^([1-9]\d{0,3})\s*[x×]\s*([1-9]\d{0,3})$/);
    if (!found) throw new Error(`"${part.trim()}" is no size; expected height x width, as 64x96`);
    return [Number(found[1]), Number(found[2])];
  });
}

async function draw() {
  const sizes = sizesOf(at("sizes").value);
  const label = document.querySelector("input[name=label]:checked").value;
  const ratio = inputs.size ? Number(at("ratio").value) : 1;
  at("pictures").replaceChildren();
  for (const size of sizes) {
    say(`Drawing ${size.join(" × ")}`);
    const drawn = await ask({
      seed: BigInt(at("seed").value),
      label: label === "none" ? null : Number(label),
      guidance: Number(at("guidance").value),
      latent: size.map((side) => Math.max(1, Math.round(side / ratio))),
      size,
    });
    at("pictures").append(figure(drawn, label));
  }
  say("Done");
}

/** Pixels [1, c, h, w] in [0, 1], grey or RGB, as a canvas with its size and time below. */
function figure({ pixels, shape, seconds, provider }, label) {
  const [, channels, height, width] = shape;
  const canvas = Object.assign(document.createElement("canvas"), { height, width });
  const image = new ImageData(width, height);
  const plane = height * width;
  for (let i = 0; i < plane; i++) {
    for (let colour = 0; colour < 3; colour++) {
      image.data[4 * i + colour] = 255 * pixels[(channels < 3 ? 0 : colour) * plane + i];
    }
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Label ${label}, ${height} × ${width}`);
  const caption = document.createElement("figcaption");
  caption.textContent = `${height} × ${width}, ${seconds.toFixed(1)} s on ${provider}`;
  const made = document.createElement("figure");
  made.append(canvas, caption);
  return made;
}

at("request").addEventListener("submit", (event) => {
  event.preventDefault();
  busy(draw);
});
at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  if (file) busy(async () => open(await file.arrayBuffer()));
});
busy(async () => {
  const answer = await fetch("picture.onnx");
  if (!answer.ok) {
    throw new Error("No picture.onnx beside this page: make it with python -m export.single_file");
  }
  await open(await answer.arrayBuffer());
});
