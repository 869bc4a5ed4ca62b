// The time line of a step: a lane for each actor's thread, and the longest spans as a table.

import { address, ask, chooseRun, el, labelled, shown } from "./dom.js";

const ROW = 20;
const LONGEST = 15;
const COLOURS = ["#2b64a8", "#9a5a12", "#23703f", "#7d3690", "#a2322c", "#0d6f79", "#6d5517", "#4d51a8"];

export async function timeline(room, state, given) {
  const run = Number(given.run ?? 0), steps = state.runs[run]?.traces ?? [];
  const to = (values) => { location.hash = address("timeline", { run, ...values }); };
  const choice = el("div", { class: "tools" }, chooseRun(state, run, (id) => to({ run: id })));
  room.append(choice);
  if (!steps.length) {
    room.append(el("p", { class: "note" }, "this run keeps no time line: there is no traces/step-*.json"));
    return {};
  }
  const step = Number(given.step ?? steps.at(-1)), at = steps.indexOf(step);
  choice.append(labelled("step", el("select", { onchange: (event) => to({ step: event.target.value }) },
    steps.map((number) => el("option", { value: number, selected: number === step }, String(number))))));
  const found = await ask("timeline", { run, step });
  const spans = found.lanes.flatMap((lane) => lane.spans.map((span) => ({ ...span, lane: lane.name })));
  const end = Math.max(1e-9, ...spans.map((span) => span.begin_ms + span.ms));
  const names = [...new Set(spans.map((span) => span.name))];
  room.append(el("p", { class: "note" }, `${shown(end / 1000)} s; ui.perfetto.dev opens ${found.file} ${found.note && `; ${found.note}`}`),
    ...found.lanes.map((lane) => drawn(lane, end, names)), el("h2", {}, "The longest"), table(spans, end));
  return { keys: { j: () => move(1), k: () => move(-1), n: () => move(1), p: () => move(-1) } };

  function move(by) {
    if (steps[at + by] !== undefined) to({ step: steps[at + by] });
  }
}

function colour(names, name) {
  return COLOURS[names.indexOf(name) % COLOURS.length];
}

function said(span) {
  const args = Object.entries(span.args).map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : shown(value)}`);
  return [`${span.name}: ${shown(span.ms)} ms from ${shown(span.begin_ms)} ms`, ...args].join("\n");
}

function drawn(lane, end, names) {
  const rows = 1 + Math.max(0, ...lane.spans.map((span) => span.depth));
  const svg = el("svg", { height: rows * ROW, role: "img", "aria-label": `${lane.name}: ${lane.spans.length} spans` });
  for (const span of lane.spans) {
    const x = `${100 * span.begin_ms / end}%`, share = span.ms / end;
    svg.append(el("rect", { x, y: span.depth * ROW, width: `${Math.max(0.1, 100 * share)}%`, height: ROW - 2, rx: 2,
      fill: colour(names, span.name) }, el("title", {}, said(span))));
    if (share > 0.12) svg.append(el("text", { x, dx: 5, y: span.depth * ROW + 13 }, span.name));
  }
  return el("div", { class: "lane" }, el("div", {}, lane.name), svg);
}

function table(spans, end) {
  const longest = [...spans].sort((a, b) => b.ms - a.ms).slice(0, LONGEST);
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", {}, "span"), el("th", {}, "lane"),
      ["begin, ms", "length, ms", "share"].map((name) => el("th", { class: "number" }, name)))),
    el("tbody", {}, longest.map((span) => el("tr", {}, el("td", {}, span.name), el("td", {}, span.lane),
      [shown(span.begin_ms), shown(span.ms), `${(100 * span.ms / end).toFixed(1)} %`].map((text) => el("td", { class: "number" }, text)))))));
}
