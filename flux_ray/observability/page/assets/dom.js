// What every view makes its elements with. Text goes in as text: a rollout may hold anything.

/** An element: attributes, handlers (`onclick`), and children that are elements or texts. */
export function el(tag, given = {}, ...children) {
  const svg = ["svg", "rect", "text", "g", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, v] of Object.entries(value)) made.style.setProperty(key, v);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** A number for people: at most four digits that count. */
export function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

/** What the server answers. An error has the server's line. */
export async function ask(what, given = {}) {
  const words = Object.entries(given).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  let response;
  try {
    response = await fetch(`api/${what}?${new URLSearchParams(words)}`);
  } catch {
    throw new Error("the server doesn't answer: `flux-ray view` has ended");
  }
  let value;
  try {
    value = await response.json();
  } catch {
    throw new Error(`${what}: the server failed (${response.status}); its terminal says why`);
  }
  if (!response.ok) throw new Error(value.error);
  return value;
}

/** The address of a view: what stands behind #. */
export function address(view, given = {}) {
  const words = Object.entries(given).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return `#${view}${words.length ? `?${new URLSearchParams(words)}` : ""}`;
}

export function labelled(text, input) {
  return el("label", {}, text, input);
}

/** A select of one of the runs; none where there is one run. */
export function chooseRun(state, chosen, change) {
  if (state.runs.length < 2) return "";
  return labelled("run", el("select", { onchange: (event) => change(event.target.value) }, state.runs.map((run) =>
    el("option", { value: run.id, selected: run.id === chosen }, run.name))));
}
