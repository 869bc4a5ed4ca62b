// The options of the runs beside each other; those that differ first.

import { ask, el, labelled } from "./dom.js";
import { fits } from "./curves.js";

function text(value) {
  return value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value);
}

export async function config(room, state, given) {
  const found = await ask("config");
  let filter = given.filter ?? "", only = state.runs.length > 1 && found.differ.length > 0;
  const body = el("div", { class: "scroll" });
  const search = el("input", { type: "search", placeholder: "rollout, learning_rate, …", value: filter,
    oninput: () => { filter = search.value; draw(); } });
  const box = el("input", { type: "checkbox", checked: only, onchange: () => { only = box.checked; draw(); } });
  room.append(el("div", { class: "tools" }, labelled("options", search),
    state.runs.length > 1 ? labelled("only those that differ", box) : "",
    state.runs.length > 1 ? el("span", { class: "faint" }, `${found.differ.length} differ`) : ""), body);

  function draw() {
    const keys = found.options.filter((key) => fits(key, filter) && (!only || found.differ.includes(key)));
    body.replaceChildren(keys.length ? el("table", {},
      el("thead", {}, el("tr", {}, el("th", {}, "option"), state.runs.map((run) => el("th", {}, run.name)))),
      el("tbody", {}, keys.map((key) => el("tr", { class: found.differ.includes(key) && !only ? "differs" : "" },
        el("td", { class: "value" }, key), found.values.map((values) => el("td", { class: "value" }, text(values[key])))))))
      : el("p", { class: "note" }, found.options.length ? `no option has ${filter} in its name` : "no run here has a config.yaml"));
  }

  draw();
  return {};
}
