// The frame: views by their address, runs, notes, keys, light and dark.

import { address, ask, el } from "./dom.js";
import { config } from "./config.js";
import { curves } from "./curves.js";
import { evaluations } from "./evaluations.js";
import { group } from "./group.js";
import { rollouts } from "./rollouts.js";
import { timeline } from "./timeline.js";

// A view fills `main`, and gives {update, keys, close}: what it does each few seconds, by key, and when it is left.
const VIEWS = { curves, evaluations, rollouts, timeline, config, group };
const TABS = ["curves", "evaluations", "rollouts", "timeline", "config"];
const COLOURS = ["#2a7fd4", "#d9822b", "#2f9e5f", "#b04ac2", "#c8423b", "#0f9aa8", "#8a6d1f", "#6b6fd6"];
const POLL_MS = 2000;
const KEYS = { "1 – 5": "a view", "/": "search or filter", "j, k": "next and previous row or sample",
  "Enter": "open the row", "n, p": "next and previous page", "Esc": "back", "t": "light or dark", "?": "these keys" };

const state = { runs: [], hidden: new Set(), metrics: new Map() };
const main = document.getElementById("main");
let now = {}, opened = 0;

function place() {
  const [view, words] = location.hash.slice(1).split("?");
  return { view: VIEWS[view] ? view : "curves", given: Object.fromEntries(new URLSearchParams(words)) };
}

async function open() {
  const { view, given } = place(), mine = ++opened;
  now.close?.();
  now = {};
  for (const link of document.querySelectorAll("#tabs a")) {
    const current = link.dataset.view === (view === "group" ? "rollouts" : view);
    link.toggleAttribute("aria-current", current);
    if (current) link.setAttribute("aria-current", "page");
  }
  document.title = `${view} · ${state.runs.map((run) => run.name).join(", ")}`;
  const room = el("div");
  main.replaceChildren(room);
  try {
    const made = await VIEWS[view](room, state, given);
    if (mine === opened) now = made ?? {};
    else made?.close?.();
  } catch (error) {
    room.append(el("p", { class: "bad", role: "alert" }, error.message));
  }
}

async function lookAtRuns() {
  const found = await ask("runs");
  const before = JSON.stringify(state.found);
  if (before === JSON.stringify(found)) return;
  state.found = found;
  state.runs = found.runs.map((run, i) => ({ ...run, colour: COLOURS[i % COLOURS.length], dash: i < COLOURS.length ? [] : [4, 3] }));
  document.getElementById("runs").replaceChildren(...state.runs.map((run) => {
    const box = el("input", { type: "checkbox", checked: !state.hidden.has(run.id), onchange: () => {
      state.hidden[box.checked ? "delete" : "add"](run.id);
      now.redraw?.();
    } });
    const swatch = el("span", { class: "swatch" });
    swatch.style.background = run.colour;
    return el("label", { title: run.path }, state.runs.length > 1 ? box : "", swatch, run.name,
      el("span", { class: "faint" }, run.state));
  }));
  const of = state.runs.length > 1 ? (run) => `${run.name}: ` : () => "";
  document.getElementById("notes").replaceChildren(
    ...found.notes.map((note) => el("p", { class: "bad" }, note)),
    ...state.runs.flatMap((run) => run.notes.map((note) => el("p", {}, of(run) + note))));
}

function theme() {
  const dark = getComputedStyle(document.body).colorScheme === "dark" || (!document.documentElement.dataset.theme
    && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
  now.redraw?.();
}

function help() {
  const keys = document.getElementById("keys");
  keys.hidden = !keys.hidden;
  document.getElementById("help").setAttribute("aria-expanded", String(!keys.hidden));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input:not([type=checkbox], [type=range]), select, textarea");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const tab = TABS[Number(event.key) - 1];
  if (tab) location.hash = address(tab);
  else if (event.key === "/") document.querySelector("main input[type=search]")?.focus();
  else if (event.key === "t") theme();
  else if (event.key === "?") help();
  else if (now.keys?.[event.key]) now.keys[event.key]();
  else return;
  event.preventDefault();
}

async function live() {
  if (!document.hidden) {
    try {
      await lookAtRuns();
      document.getElementById("gone")?.remove();
      await now.update?.();
    } catch (error) {
      document.getElementById("gone")?.remove();
      document.getElementById("notes").append(el("p", { id: "gone", class: "bad" }, error.message));
    }
  }
  setTimeout(live, POLL_MS);
}

async function begin() {
  if (localStorage.getItem("theme")) document.documentElement.dataset.theme = localStorage.getItem("theme");
  document.getElementById("tabs").append(...TABS.map((view, i) =>
    el("a", { href: address(view), "data-view": view, title: `${i + 1}` }, view)));
  document.getElementById("keys").append(el("dl", {}, Object.entries(KEYS).map(([key, what]) =>
    [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)])));
  document.getElementById("theme").addEventListener("click", theme);
  document.getElementById("help").addEventListener("click", help);
  document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
  addEventListener("hashchange", open);
  addEventListener("keydown", onKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => now.redraw?.());
  try {
    await lookAtRuns();
    await open();
  } catch (error) {
    main.append(el("p", { class: "bad", role: "alert" }, error.message));
  }
  setTimeout(live, POLL_MS);
}

begin();
