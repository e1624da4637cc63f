// The controls, what is drawn of them, and the history.

import { Brush } from "./brush.js";
import { actions, addCard, show } from "./cards.js";
import { chips, press, pressedPrompt } from "./labels.js";
import { missing, promptOf, requestOf } from "./png.js";
import { draw, models, setToken } from "./server.js";

const $ = (id) => document.getElementById(id);
const PREVIEWS = 8; // of each picture, at most
const SEVERAL = [0.5, 1, 1.5, 2]; // times the latent's sides

let known = [];
let model = null;
let running = null;
const brush = new Brush($("brush"), () => Number($("width").value));

// ---- what is to be drawn

function sides() {
  const shorter = Number($("cells").value);
  const aspect = Math.exp((Number($("aspect").value) / 20) * Math.log(aspectLimit()));
  return aspect >= 1 ? [legal(shorter * aspect), shorter] : [shorter, legal(shorter / aspect)];
}

function aspectLimit() {
  return Math.max(2, model.trained?.aspect ?? 2);
}

function legal(side) {
  const [minimum, maximum, multiple] = model.latent_sides;
  return Math.min(Math.max(Math.round(side / multiple) * multiple, minimum), maximum);
}

function written([height, width]) {
  return `${width}x${height}`; // HTTP's order
}

function scaled([height, width]) {
  const scale = model.decoupled ? Number($("scale").value) : model.pixels_per_latent;
  return [height * scale, width * scale];
}

function body(latent) {
  const wanted = {
    model: model.id,
    prompt: $("prompt").value.trim() || "none",
    n: Number($("count").value),
    num_inference_steps: Number($("steps").value),
    guidance_scale: Number($("guidance").value),
    seed: Number($("seed").value),
    partial_images: Math.min(PREVIEWS, Number($("steps").value) - 1),
  };
  if (repeating) Object.assign(wanted, { index: repeating.first_index, solver: repeating.solver, eta: repeating.eta });
  if (!latent) return { ...wanted, strength: Number($("strength").value) };
  return { ...wanted, latent: written(latent), size: written(repeating?.image ?? scaled(latent)) };
}

// A picture whose request the controls hold, until one of them is changed.
let repeating = null;

// ---- drawing

async function run(latents) {
  if (running) return;
  running = new AbortController();
  if (!$("lock").checked && !repeating) $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  say("Drawing…");
  fail("");
  setBusy(true);
  $("pictures").replaceChildren();
  $("status").scrollIntoView({ block: "nearest" });
  const edit = latents ? null : await brush.edit();
  let drawn = 0;
  try {
    const each = latents ?? [null];
    for (const [place, latent] of each.entries()) {
      const wanted = body(latent);
      const cards = new Map();
      await draw(wanted, edit, running.signal, (event) => {
        const card = cards.get(event.index) ?? cards.set(event.index, addCard(latent)).get(event.index);
        show(card, event, wanted);
        const share = event.type.endsWith("completed") ? 1 : event.step / event.steps;
        if (share === 1) drawn += 1;
        $("progress").value = (place + share) / each.length;
      });
    }
    say(`${drawn} ${drawn === 1 ? "picture" : "pictures"} drawn, seed ${$("seed").value}.`);
  } catch (error) {
    for (const card of document.querySelectorAll("figure.wait")) card.remove();
    if (error.name === "AbortError") say(`Cancelled; ${drawn} drawn.`);
    else {
      say("Not drawn.");
      fail(error.message);
      if (error.status === 401) askToken();
    }
  } finally {
    running = null;
    setBusy(false);
  }
}

// ---- files: edit, or repeat what made them

async function taken(blob) {
  fail("");
  const found = await requestOf(blob);
  if (!found) return startEdit(blob);
  const lacking = missing(found.request);
  if (lacking.length) {
    fail(`This picture was made with ${lacking.join(", ")}, which the page cannot repeat; it is edited instead.`);
    return startEdit(blob);
  }
  repeat(found.request);
  return run([found.request.latent]);
}

function repeat(request) {
  stopEdit();
  const [height, width] = request.latent;
  $("cells").value = Math.min(height, width);
  $("aspect").value = Math.round((20 * Math.log(height / width)) / Math.log(aspectLimit()));
  $("scale").value = Math.round(request.image[0] / height);
  $("steps").value = request.steps;
  $("guidance").value = request.guidance;
  $("count").value = 1;
  $("seed").value = request.seed;
  $("lock").checked = true;
  $("prompt").value = promptOf(request.label);
  press($("prompt").value);
  told();
  repeating = request;
}

async function startEdit(blob) {
  try {
    await brush.open(blob);
  } catch {
    return fail("This file is no picture that the browser can show; expected PNG, JPEG or WebP.");
  }
  repeating = null;
  $("editing").hidden = false;
  $("brush").setAttribute("aria-label", `The picture that is edited, ${brush.image.height} by ${brush.image.width}`);
  $("several").disabled = true;
  for (const id of ["cells", "aspect", "scale"]) $(id).disabled = true;
  say("Editing: draw to see it.");
  told();
  $("brush").focus();
}

function stopEdit() {
  $("editing").hidden = true;
  $("several").disabled = false;
  for (const id of ["cells", "aspect", "scale"]) $(id).disabled = false;
  told();
}

// ---- controls

function told() {
  const latent = sides();
  const [height, width] = scaled(latent);
  $("sizes").value = $("editing").hidden
    ? `latent ${latent.join("×")}, picture ${height}×${width}`
    : `that of the picture, ${brush.image.height}×${brush.image.width}`;
  for (const output of document.querySelectorAll(".slider output")) {
    const input = $(output.htmlFor.value);
    output.value = input.id === "aspect" ? latent.join(" : ") : input.value;
    if (input.id === "aspect") input.setAttribute("aria-valuetext", `${latent[0]} to ${latent[1]}`);
  }
}

function choose(id) {
  model = known.find((own) => own.id === id) ?? known[0];
  const [width, height] = model.latent.split("x").map(Number);
  const [minimum, maximum, multiple] = model.latent_sides;
  const most = Math.floor(Math.sqrt(model.limits.cells / aspectLimit()));
  const longest = model.decoupled ? Math.max(2 * (model.trained?.longest ?? 16), height) : maximum;
  Object.assign($("cells"), { min: minimum, step: multiple, max: Math.min(longest, maximum, most) });
  $("cells").value = Math.min(width, height);
  $("scale-field").hidden = !model.decoupled;
  $("scale").value = 2 * model.pixels_per_latent;
  $("guidance").value = model.guidance_scale;
  $("steps").max = Math.min(100, model.limits.steps);
  $("count").max = Math.min(8, model.limits.images);
  chips(model, (text) => {
    $("prompt").value = text;
    repeating = null;
  });
  $("prompt").value = model.labels.length ? "" : "none";
  document.querySelector(".chip")?.click();
  told();
}

function setBusy(busy) {
  $("cancel").disabled = !busy;
  $("draw").disabled = busy;
  $("several").disabled = busy || !$("editing").hidden;
  Object.assign($("progress"), { hidden: !busy, value: 0 });
}

function say(text) {
  $("status").textContent = text;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function askToken() {
  $("token-field").hidden = false;
  $("token").focus();
}

function several() {
  const [height, width] = sides();
  const each = SEVERAL.map((times) => [legal(height * times), legal(width * times)]);
  const { cells } = model.limits;
  const fitting = each.filter(([h, w]) => h * w <= cells);
  return [...new Map(fitting.map((own) => [written(own), own])).values()];
}

async function begin() {
  try {
    known = await models();
  } catch (error) {
    fail(error.message);
    if (error.status === 401) askToken();
    return;
  }
  fail("");
  $("token-field").hidden = true;
  $("model").replaceChildren(...known.map((own) => new Option(own.id, own.id)));
  $("model-field").hidden = known.length < 2;
  choose(known[0].id);
}

// ---- events

$("controls").addEventListener("input", (event) => {
  if (event.target.id === "token" || !model) return;
  repeating = null;
  if (event.target.id === "prompt") press($("prompt").value);
  if (event.target.name === "how") $("prompt").value = pressedPrompt();
  told();
});
$("token").addEventListener("change", () => { setToken($("token").value.trim()); begin(); });
$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  if (model) run($("editing").hidden ? [repeating?.latent ?? sides()] : null);
});
$("several").addEventListener("click", () => { repeating = null; run(several()); });
$("cancel").addEventListener("click", () => running?.abort());
$("model").addEventListener("change", () => choose($("model").value));
$("wipe").addEventListener("click", () => brush.wipe());
$("leave").addEventListener("click", stopEdit);
$("file").addEventListener("change", () => { if ($("file").files[0]) taken($("file").files[0]); $("file").value = ""; });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("controls").requestSubmit();
});
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (file && model) taken(file);
});

Object.assign(actions, { edit: startEdit, repeat: taken, say });
begin();
