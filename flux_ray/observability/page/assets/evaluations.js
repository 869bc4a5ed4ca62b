// Evaluations: the metrics of each, and the same prompts' answers first and last.

import { ask, chooseRun, el, shown } from "./dom.js";

export async function evaluations(room, state, given) {
  const run = Number(given.run ?? 0);
  const found = await ask("evaluations", { run });
  const lines = found.evaluations;
  room.append(el("div", { class: "tools" },
    chooseRun(state, run, (id) => { location.hash = `#evaluations?run=${id}`; })));
  if (!lines.length) {
    room.append(el("p", { class: "note" }, "this run has no evaluation; eval.data=FILE makes them"));
  } else {
    room.append(table(lines), ...answers(lines));
  }
  return { update: async () => {
    const newer = await ask("evaluations", { run });
    if (newer.evaluations.length !== lines.length) {
      room.replaceChildren();
      await evaluations(room, state, given);
      lines.length = newer.evaluations.length;
    }
  } };
}

function table(lines) {
  const names = [...new Set(lines.flatMap((line) => Object.keys(line)))].filter((name) =>
    lines.some((line) => typeof line[name] === "number") && name !== "step");
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", { class: "number" }, "step"), names.map((name) =>
      el("th", { class: "number" }, name.replace("eval/", ""))))),
    el("tbody", {}, lines.map((line) => el("tr", {}, el("td", { class: "number" }, shown(line.step)),
      names.map((name) => el("td", { class: "number" }, shown(line[name]))))))));
}

function text(of) {
  return typeof of === "string" ? of : JSON.stringify(of ?? "");
}

function answers(lines) {
  const with_answers = lines.filter((line) => Array.isArray(line.answers) && line.answers.length);
  if (!with_answers.length) return [];
  const first = with_answers[0], last = with_answers.at(-1);
  const later = new Map(last.answers.map((answer) => [text(answer.prompt), answer]));
  const cell = (answer) => [el("td", { class: "text" }, el("div", {}, text(answer?.completion))),
    el("td", { class: "number" }, shown(answer?.reward))];
  return [el("h2", {}, `The same prompts at step ${first.step} and at step ${last.step}`), el("div", { class: "scroll" },
    el("table", {}, el("thead", {}, el("tr", {}, ["prompt", `step ${first.step}`, "reward", `step ${last.step}`, "reward"]
      .map((name) => el("th", {}, name)))),
    el("tbody", {}, first.answers.map((answer) => el("tr", {}, el("td", { class: "text" }, el("div", {}, text(answer.prompt))),
      cell(answer), cell(later.get(text(answer.prompt))))))))];
}
