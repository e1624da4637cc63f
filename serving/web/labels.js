// Labels as chips, by the parts of a condition, and the text that they come to.

const ONE = "one"; // values of the choice between these
const EACH = "each";
const MIXED = "mixed";
const $ = (id) => document.getElementById(id);

function how() {
  return document.querySelector("[name=how]:checked").value;
}

function chipsOf(part) {
  return [...document.querySelectorAll(`.chip[data-part="${part}"]`)];
}

export function chips(model, onChange) {
  let first = 0;
  const groups = model.parts.map((count, part) => {
    const group = document.createElement("div");
    group.className = "part";
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", model.parts.length > 1 ? `Labels, part ${part + 1}` : "Labels");
    for (let number = first; number < first + count; number += 1) group.append(chip(model.labels[number], number, part, onChange));
    first += count;
    return group;
  });
  $("chips").replaceChildren(...groups);
}

function chip(name, number, part, onChange) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "chip", textContent: name });
  const colour = name.replace(/^on-/, "");
  if (CSS.supports("color", colour)) {
    const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
    swatch.style.backgroundColor = colour;
    button.prepend(swatch);
  }
  // A name with a sign of the grammar in it goes by its number.
  Object.assign(button.dataset, { part, term: /^[\w-]+$/.test(name) ? name : String(number) });
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    if (how() === ONE) for (const other of chipsOf(part)) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", String(pressed));
    onChange(pressedPrompt());
  });
  return button;
}

// Every pressed label of a part with every one of the others: "7:red,7:blue", or with + between.
export function pressedPrompt() {
  const parts = [...$("chips").children].map((_, part) =>
    chipsOf(part).filter((own) => own.getAttribute("aria-pressed") === "true").map((own) => own.dataset.term));
  const terms = parts.filter((own) => own.length).reduce(
    (made, own) => made.flatMap((start) => own.map((term) => (start ? `${start}:${term}` : term))), [""]);
  return terms.filter(Boolean).join(how() === MIXED ? "+" : ",") || "none";
}

// Chips as the text says, where it is a plain list.
export function press(text) {
  const means = text.includes("+") ? MIXED : text.includes(",") ? EACH : ONE;
  document.querySelector(`[name=how][value=${means}]`).checked = true;
  const terms = new Set(text.split(/[,+:]/).map((term) => term.trim()));
  for (const own of document.querySelectorAll(".chip")) own.setAttribute("aria-pressed", String(terms.has(own.dataset.term)));
}
