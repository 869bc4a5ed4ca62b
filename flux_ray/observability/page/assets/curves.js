// Curves of one or several runs over each other, by metric.

import uPlot from "./uPlot.esm.js";
import { ask, el, labelled, shown } from "./dom.js";

const FIRST = ["reward/task_mean", "reward/mean", "actor/loss", "actor/entropy", "actor/grpo_kl",
  "rollout/response_length_mean", "rollout/truncated_frac", "train/grad_norm", "rollout/tokens_per_s", "driver/step_s"];
const HEIGHT = 178;
const NEAR_PX = 300;   // charts so far outside of the window are drawn, too

/** What is new of each run's metrics.jsonl; whether anything is. */
async function follow(state) {
  const found = await Promise.all(state.runs.map(async (run) => {
    const known = state.metrics.get(run.id) ?? { cursor: "", steps: [], values: {} };
    const lines = await ask("metrics", { run: run.id, cursor: known.cursor });
    if (lines.anew) Object.assign(known, { steps: [], values: {} });
    const before = known.steps.length;
    known.steps.push(...lines.steps);
    for (const name of new Set([...Object.keys(known.values), ...Object.keys(lines.values)])) {
      known.values[name] ??= new Array(before).fill(null);
      known.values[name].push(...(lines.values[name] ?? new Array(lines.steps.length).fill(null)));
    }
    known.cursor = lines.cursor;
    state.metrics.set(run.id, known);
    return lines.anew || lines.steps.length > 0;
  }));
  return found.some(Boolean);
}

/** Each value mixed with those before it: `share` of the mean so far, corrected for its start. */
export function smooth(values, share) {
  let mean = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = share * mean + (1 - share) * value;
    weight = share * weight + (1 - share);
    return mean / weight;
  });
}

function names(state) {
  const all = new Set([...state.metrics.values()].flatMap((known) => Object.keys(known.values)));
  const rest = [...all].filter((name) => !FIRST.includes(name)).sort();
  return [...FIRST.filter((name) => all.has(name)), ...rest];
}

/** Whether a metric's name fits: every word of the filter stands in it. */
export function fits(name, filter) {
  return filter.toLowerCase().split(/\s+/).every((word) => name.toLowerCase().includes(word));
}

function drawn(state, name, share) {
  const tables = [], series = [{ label: "step" }], said = [];
  const scattered = state.runs.filter((run) => !state.hidden.has(run.id) && state.metrics.get(run.id)?.values[name]);
  for (const run of scattered) {
    const known = state.metrics.get(run.id), values = known.values[name];
    const last = values.findLast((value) => value !== null);
    const paint = { stroke: run.colour, dash: run.dash, points: { show: known.steps.length < 40, size: 4 } };
    tables.push([known.steps, share ? smooth(values, share) : values]);
    series.push({ label: run.name, width: 1.6, spanGaps: true, ...paint });
    if (share) {
      tables.push([known.steps, values]);
      series.push({ label: `${run.name}, as it is`, width: 1, alpha: 0.3, spanGaps: true, stroke: run.colour,
        points: { show: false } });
    }
    said.push([run, last]);
  }
  return { data: tables.length ? uPlot.join(tables) : [[]], series, said };
}

export async function curves(room, state, given) {
  let filter = given.filter ?? "", share = Number(given.smooth ?? 0);
  const cards = new Map();
  const room_of_charts = el("div", { class: "charts" });
  const none = el("p", { class: "note" });
  const search = el("input", { type: "search", placeholder: "reward, kl, …", value: filter,
    oninput: () => { filter = search.value; arrange(); keep(); } });
  const smoothing = el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: share,
    oninput: () => { share = Number(smoothing.value); redraw(); keep(); } });
  const told = el("output", {}, shown(share));
  room.append(el("div", { class: "tools" }, labelled("metrics", search), labelled("smoothing", smoothing), told,
    el("span", { class: "faint" }, "drag: zoom in; double click: all")), none, room_of_charts);

  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const card = cards.get(target.dataset.metric);
      card.visible = isIntersecting;
      if (isIntersecting && card.stale) draw(card);
    }
  }, { rootMargin: `${NEAR_PX}px` });
  const sized = new ResizeObserver(() => redraw());
  sized.observe(room_of_charts);

  function card(name) {
    const box = el("section", { class: "chart", "data-metric": name, "aria-label": name });
    const made = { name, box, stale: true, visible: false, plot: null };
    box.append(el("h3", {}, name), made.now = el("div", { class: "now" }), made.room = el("div", { role: "img" }));
    seen.observe(box);
    return made;
  }

  function draw(made) {
    const { data, series, said } = drawn(state, made.name, share);
    const { color, borderTopColor: line } = getComputedStyle(made.box);   // as light or dark has them
    const axis = { stroke: color, grid: { stroke: line, width: 1 },
      ticks: { stroke: line, width: 1 }, font: "11px system-ui" };
    made.plot?.destroy();
    made.stale = false;
    made.now.replaceChildren(...said.map(([run, last]) => {
      const value = el("span", {}, shown(last));
      if (state.runs.length > 1) value.style.color = run.colour;
      return value;
    }));
    made.room.setAttribute("aria-label", `${made.name} by step; last: ${said.map(([run, last]) =>
      `${run.name} ${shown(last)}`).join(", ")}`);
    made.plot = new uPlot({ width: Math.max(100, made.room.clientWidth), height: HEIGHT, series,
      legend: { show: false }, scales: { x: { time: false } }, cursor: { sync: { key: "step" } },
      axes: [{ ...axis, size: 28 }, { ...axis, size: 54, values: (_, ticks) => ticks.map((tick) => shown(tick)) }],
      hooks: { setCursor: [(plot) => under(made, plot, said)] } }, data, made.room);
  }

  /** The values under the cursor; the last ones where there is none. */
  function under(made, plot, said) {
    const at = plot.cursor.idx, every = share ? 2 : 1;
    [...made.now.children].forEach((value, i) => {
      value.textContent = at === null || at === undefined ? shown(said[i]?.[1])
        : `${plot.data[0][at]}: ${shown(plot.data[1 + i * every]?.[at])}`;
    });
  }

  function redraw() {
    told.textContent = shown(share);
    for (const made of cards.values()) {
      made.stale = true;
      if (made.visible) draw(made);
    }
  }

  function arrange() {
    const all = names(state), wanted = all.filter((name) => fits(name, filter));
    for (const name of wanted) if (!cards.has(name)) cards.set(name, card(name));
    const boxes = wanted.map((name) => cards.get(name).box);
    if (boxes.length !== room_of_charts.children.length || boxes.some((box, i) => box !== room_of_charts.children[i])) {
      room_of_charts.replaceChildren(...boxes);
    }
    for (const made of wanted.map((name) => cards.get(name))) {
      made.visible ||= made.box.getBoundingClientRect().top < innerHeight + NEAR_PX;
      if (made.visible && made.stale) draw(made);
    }
    none.textContent = !all.length ? "no metrics yet" : wanted.length ? ""
      : `no metric has ${filter} in its name: there are ${all.length}, such as ${all.slice(0, 3).join(", ")}`;
  }

  function keep() {
    const words = new URLSearchParams({ filter, smooth: share });
    history.replaceState(null, "", `#curves?${words}`);
  }

  await follow(state);
  arrange();
  return {
    redraw, update: async () => {
      if (await follow(state)) { arrange(); redraw(); }
    },
    close: () => { seen.disconnect(); sized.disconnect(); for (const made of cards.values()) made.plot?.destroy(); },
  };
}
