// Pictures as they come and when they are done, and those before.

import { blobOf } from "./server.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 256; // pixels of a picture's longer side on the page, at least
const KEPT = 60; // pictures of the history
const history = [];

// What the buttons of a picture do, and how the page speaks: { edit, repeat, say }.
export const actions = {};

function shownWidth(width, height) {
  return Math.round(width * Math.max(1, SHOWN / Math.max(width, height)));
}

export function addCard(latent) {
  const card = document.createElement("figure");
  card.className = "wait";
  card.append(document.createElement("img"), document.createElement("figcaption"));
  card.querySelector("figcaption").textContent = latent ? `latent ${latent.join("×")}` : "edit";
  $("pictures").append(card);
  return card;
}

export function show(card, event, wanted) {
  const image = card.querySelector("img");
  const done = event.type.endsWith("completed");
  const [width, height] = event.size.split("x").map(Number);
  URL.revokeObjectURL(card.preview);
  const blob = blobOf(event.b64_json);
  const url = URL.createObjectURL(blob);
  image.src = url;
  image.width = shownWidth(width, height);
  image.alt = done
    ? `${wanted.prompt}, ${height} by ${width} pixels, seed ${event.seed}`
    : `${wanted.prompt} after step ${event.step} of ${event.steps}`;
  if (!done) {
    card.preview = url;
    return;
  }
  card.classList.remove("wait");
  remember({ blob, url, wanted, event });
  caption(card, { blob, url, wanted, event });
}

function caption(card, { blob, url, wanted, event }) {
  const [width, height] = event.size.split("x");
  const name = `${wanted.prompt.replace(/[^\w+-]+/g, "_").slice(0, 40)}-${event.seed}-${event.index}.png`;
  const link = Object.assign(document.createElement("a"), { href: url, download: name, textContent: "Download" });
  const change = Object.assign(document.createElement("button"), { type: "button", textContent: "Edit" });
  const again = Object.assign(document.createElement("button"), { type: "button", textContent: "Repeat" });
  change.addEventListener("click", () => actions.edit(blob));
  again.addEventListener("click", () => actions.repeat(blob));
  const row = document.createElement("div");
  row.className = "row";
  row.append(link, change, again);
  const text = document.createElement("div");
  text.textContent = `${height}×${width}, seed ${event.seed}, index ${event.index}`;
  const about = card.querySelector("figcaption");
  about.replaceChildren(...(about.textContent.startsWith("latent") ? [about.textContent] : []), text, row);
}

function remember(one) {
  history.unshift(one);
  for (const old of history.splice(KEPT)) URL.revokeObjectURL(old.url);
  $("history-title").hidden = false;
  $("history").replaceChildren(...history.map((own) => {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button" });
    const label = `${own.wanted.prompt}, seed ${own.event.seed}`;
    button.append(Object.assign(document.createElement("img"), { src: own.url, alt: label }));
    button.addEventListener("click", () => {
      $("pictures").replaceChildren();
      const card = addCard(null);
      card.querySelector("figcaption").textContent = "";
      card.classList.remove("wait");
      const image = card.querySelector("img");
      const [width, height] = own.event.size.split("x").map(Number);
      image.src = own.url;
      image.alt = label;
      image.width = shownWidth(width, height);
      caption(card, own);
      actions.say(`Shown: ${label}.`);
    });
    item.append(button);
    return item;
  }));
}
