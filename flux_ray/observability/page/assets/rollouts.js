// The table of rollouts: the server searches, filters, sorts and pages.

import { address, ask, chooseRun, el, labelled, shown } from "./dom.js";

const SIZE = 50;
const WAIT_MS = 250;   // after a key, before the server is asked
const COLUMNS = [["step", "number"], ["uid", "number"], ["sample", "number"], ["data_set", ""], ["reward", "number"],
  ["advantage", "number"], ["num_tokens", "number"], ["outcome", ""]];
const FIELDS = [["first_step", "from step"], ["last_step", "to step"], ["least_reward", "reward ≥"],
  ["most_reward", "reward ≤"], ["uid", "uid"]];

export async function rollouts(room, state, given) {
  const asked = { run: 0, sort: "step", descending: "true", first: 0, ...given };
  let page = null, chosen = 0, timer = 0, number = 0;
  const said = el("p", { class: "note", role: "status" }), body = el("div", { class: "scroll" });
  const search = el("input", { type: "search", placeholder: "in prompt or response", value: asked.search ?? "",
    oninput: () => change({ search: search.value }, WAIT_MS) });
  const field = ([name, label]) => labelled(label, el("input", { type: "number", step: "any", value: asked[name] ?? "",
    oninput: (event) => change({ [name]: event.target.value }, WAIT_MS) }));
  const outcome = el("select", { "aria-label": "outcome", onchange: () => change({ outcome: outcome.value }) });
  const data_set = el("select", { "aria-label": "data set", onchange: () => change({ data_set: data_set.value }) });
  const before = el("button", { type: "button", onclick: () => turn(-1) }, "previous page");
  const next = el("button", { type: "button", onclick: () => turn(1) }, "next page");
  room.append(el("div", { class: "tools" }, chooseRun(state, Number(asked.run), (run) => change({ run })),
    labelled("search", search), FIELDS.map(field), outcome, data_set), el("div", { class: "tools" }, before, next, said), body);

  function change(values, wait = 0) {
    Object.assign(asked, { first: 0 }, values);
    chosen = 0;
    clearTimeout(timer);
    timer = setTimeout(look, wait);
  }

  function turn(by) {
    const first = Number(asked.first) + by * SIZE;
    if (page && first >= 0 && first < page.total) { chosen = 0; change({ first }); }
  }

  async function look() {
    const mine = ++number;
    history.replaceState(null, "", address("rollouts", asked));
    if (asked.search && !page?.searched?.has(asked.search)) said.textContent = "searching …";
    try {
      const found = await ask("rollouts", { ...asked, size: SIZE });
      if (mine !== number) return;
      page = found;
      draw();
      if (page.unread) timer = setTimeout(look, 50);
    } catch (error) {
      if (mine !== number) return;
      said.textContent = error.message;
    }
  }

  function draw() {
    const reading = page.unread ? `; reading, ${shown(page.unread)} files are left` : "";
    const last = page.first + page.rows.length;
    said.textContent = [`${page.total ? `${shown(page.first + 1)} to ${shown(last)} of ` : ""}${shown(page.total)}`,
      page.total === page.known ? "" : ` that fit, of ${shown(page.known)}`, reading,
      ...page.notes.map((note) => `; ${note}`)].join("");
    before.disabled = page.first === 0;
    next.disabled = last >= page.total;
    options(outcome, "any outcome", page.outcomes, asked.outcome);
    options(data_set, "any data set", page.data_sets, asked.data_set);
    body.replaceChildren(page.rows.length ? el("table", {}, head(), el("tbody", {}, page.rows.map(row))) : "");
    mark(false);
  }

  function options(select, any, values, value) {
    select.hidden = values.length < 2 && !value;
    select.replaceChildren(el("option", { value: "" }, any), ...values.map((name) =>
      el("option", { value: name, selected: name === value }, name)));
  }

  function head() {
    return el("thead", {}, el("tr", {}, COLUMNS.map(([name, kind]) => {
      const sorted = asked.sort === name, down = asked.descending === "true";
      const sort = () => change({ sort: name, descending: String(!(sorted && down)) });
      return el("th", { class: kind, "aria-sort": sorted ? (down ? "descending" : "ascending") : "none" },
        el("button", { type: "button", onclick: sort }, `${name}${sorted ? (down ? " ↓" : " ↑") : ""}`));
    }), el("th", {}, "prompt"), el("th", {}, "response")));
  }

  function row(values) {
    const cells = COLUMNS.map(([name, kind]) => el("td", { class: kind }, shown(values[name])));
    if (values.uid !== undefined && values.uid !== null) {
      cells[0].replaceChildren(el("a", { href: group(values) }, shown(values.step)));
    }
    return el("tr", {}, cells, ["prompt", "response"].map((name) => el("td", { class: "text" },
      el("div", {}, values[name] ?? ""))));
  }

  function group(values) {
    return address("group", { run: asked.run, step: values.step, uid: values.uid, attempt: values.attempt,
      sample: values.sample });
  }

  function mark(focus = true) {
    const rows = [...body.querySelectorAll("tbody tr")];
    rows.forEach((line, i) => line.classList.toggle("chosen", i === chosen));
    if (focus) {
      rows[chosen]?.scrollIntoView({ block: "nearest" });
      rows[chosen]?.querySelector("a")?.focus();
    }
  }

  function move(by) {
    chosen = Math.max(0, Math.min((page?.rows.length ?? 1) - 1, chosen + by));
    mark();
  }

  await look();
  return {
    keys: { j: () => move(1), k: () => move(-1), n: () => turn(1), p: () => turn(-1),
      Enter: () => { const values = page?.rows[chosen]; if (values?.uid !== undefined) location.hash = group(values); } },
    update: async () => { if (state.runs[asked.run]?.state === "goes on" && Number(asked.first) === 0 && !asked.search) await look(); },
    close: () => { clearTimeout(timer); number++; },
  };
}
