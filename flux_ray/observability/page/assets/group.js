// A group side by side: rewards, parts, and its tokens coloured by one of their numbers.

import { address, ask, el, labelled, shown } from "./dom.js";

const LOGPROBS = ["sampler_logprobs", "old_logprobs", "policy_logprobs", "reference_logprobs"];
const FACTS = ["reward", "task_reward", "advantage", "outcome", "finish_reason", "num_tokens", "num_turns", "generate_s",
  "score_s", "reference_s", "worker", "engine", "row", "data_set"];
const LEAST_LOGPROB = -5;   // nats: a token this unlikely has the full colour

/** How a token is coloured: a class and how much of it. */
const COLOURS = {
  none: () => null,
  "log-prob": (sample, i) => {
    const value = sample[logprob(sample)]?.[i];
    return value === null || value === undefined ? null : ["low", Math.min(1, value / LEAST_LOGPROB)];
  },
  advantage: (sample, i, group) => {
    const value = sample.advantages?.[i];
    return value === null || value === undefined || !value ? null
      : [value > 0 ? "up" : "down", Math.abs(value) / group.most_advantage];
  },
  version: (sample, i, group) => {
    const value = sample.versions?.[i];
    const [least, most] = group.versions;
    return value === null || value === undefined || value < 0 ? null
      : ["version", most > least ? 0.15 + 0.85 * (value - least) / (most - least) : 0.5];
  },
};

function logprob(sample) {
  return LOGPROBS.find((name) => sample[name]);
}

/** The extremes that colours are relative to. */
function extremes(samples) {
  let most_advantage = 1e-12, least = Infinity, most = -Infinity;
  for (const sample of samples) {
    for (const value of sample.advantages ?? []) most_advantage = Math.max(most_advantage, Math.abs(value ?? 0));
    (sample.versions ?? []).forEach((value, i) => {
      if (value !== null && value >= 0 && sample.loss_mask?.[i]) { least = Math.min(least, value); most = Math.max(most, value); }
    });
  }
  return { most_advantage, versions: [least, most] };
}

function legend(by, group) {
  const swatch = (kind, much, text) => el("span", {}, el("span", { class: `token ${kind}`, vars: { "--much": much } }, "  "), ` ${text}`);
  if (by === "log-prob") return [swatch("low", 0.1, "likely"), swatch("low", 1, `${LEAST_LOGPROB} nats or less`)];
  if (by === "advantage") return [swatch("up", 1, `+${shown(group.most_advantage)}`), swatch("down", 1, `−${shown(group.most_advantage)}`)];
  if (by === "version" && group.versions[0] <= group.versions[1]) {
    const [least, most] = group.versions;
    return least === most ? [swatch("version", 0.5, `version ${least}`)]
      : [swatch("version", 0.15, `version ${least}`), swatch("version", 1, `version ${most}`)];
  }
  return [];
}

export async function group(room, state, given) {
  const asked = { run: 0, attempt: 0, ...given };
  const by_default = localStorage.getItem("colour") ?? "log-prob";
  let by = COLOURS[by_default] ? by_default : "log-prob", at = Number(asked.sample ?? 0);
  const back = el("a", { href: address("rollouts", { run: asked.run }), onclick: (event) => {
    if (history.length > 1) { event.preventDefault(); history.back(); } } }, "← rollouts");
  room.append(el("p", {}, back));
  const { samples, note } = await ask("group", asked);
  const extreme = extremes(samples);
  const cut = samples.some((sample) => sample.length > (sample.texts?.length ?? 0));
  const key = el("span", { class: "legend" });
  const buttons = Object.keys(COLOURS).map((name) => el("button", { type: "button", onclick: () => colour(name) }, name));
  const boxes = samples.map((sample) => box(sample));
  room.append(el("h1", {}, `Step ${asked.step}, prompt ${asked.uid}${Number(asked.attempt) ? `, attempt ${asked.attempt}` : ""}`),
    el("div", { class: "prompt" }, readable(samples[0].prompt)),
    el("div", { class: "tools" }, labelled("colour by", el("span", { role: "group", "aria-label": "colour by" }, buttons)), key,
      cut ? el("a", { href: address("group", { ...asked, tokens: 0 }) }, "show all tokens") : ""),
    note ? el("p", { class: "note" }, note) : "", el("div", { class: "samples" }, boxes));

  function box(sample) {
    const parts = Object.entries(sample.parts ?? {}).map(([name, value]) => [`· ${name}`, value]);
    const facts = FACTS.filter((name) => sample[name] !== null && sample[name] !== undefined).map((name) => [name, sample[name]]);
    facts.splice(facts.findIndex(([name]) => name === "reward") + 1, 0, ...parts);
    const made = el("article", { class: "sample", tabindex: 0, "aria-label": `sample ${sample.sample}` },
      el("h3", {}, `sample ${sample.sample}${sample.truncated ? ", truncated" : ""}`),
      el("dl", {}, facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, shown(value))])));
    const ids = sample.token_ids ?? [];
    if (!ids.length) return [made, made.append(el("div", { class: "tokens" }, sample.response ?? ""))][0];
    const begin = sample.prompt_length ?? 0;
    const tokens = el("div", { class: "tokens" });
    for (let i = begin; i < ids.length; i++) {
      const given_token = sample.loss_mask && !sample.loss_mask[i];
      const token = el("span", { class: "token" }, sample.texts[i]);
      token.dataset.at = i;
      if (given_token) token.dataset.given = "";
      tokens.append(token);
    }
    tokens.addEventListener("mouseover", (event) => {
      const i = event.target.dataset?.at;
      if (i !== undefined && !event.target.title) event.target.title = numbers(sample, Number(i));
    });
    if (sample.length > ids.length) tokens.append(el("span", { class: "faint" }, ` … ${shown(sample.length - ids.length)} more tokens`));
    made.append(tokens);
    return made;
  }

  function colour(name) {
    by = name;
    localStorage.setItem("colour", name);
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === name)));
    key.replaceChildren(...legend(name, extreme));
    samples.forEach((sample, n) => {
      for (const token of boxes[n].querySelectorAll(".token")) {
        const given_token = "given" in token.dataset;
        const painted = given_token ? null : COLOURS[name](sample, Number(token.dataset.at), extreme);
        token.className = `token ${given_token ? "given" : painted?.[0] ?? ""}`;
        token.style.setProperty("--much", painted ? painted[1].toFixed(3) : 0);
      }
    });
  }

  function move(by_one) {
    at = Math.max(0, Math.min(boxes.length - 1, at + by_one));
    boxes[at].focus();
    boxes[at].scrollIntoView({ inline: "nearest", block: "nearest" });
  }

  colour(by);
  boxes[Math.max(0, Math.min(boxes.length - 1, at))]?.scrollIntoView({ inline: "center", block: "nearest" });
  return { keys: { j: () => move(1), k: () => move(-1), ArrowRight: () => move(1), ArrowLeft: () => move(-1),
    Escape: () => history.back() } };
}

/** What is known of a token, for a tooltip. */
function numbers(sample, i) {
  const known = [...LOGPROBS, "advantages", "versions"].filter((name) => sample[name]?.[i] !== null && sample[name]?.[i] !== undefined);
  return [`token ${i}: ${sample.token_ids[i]}`, ...known.map((name) => `${name} ${shown(sample[name][i])}`)].join("\n");
}

/** A prompt's text, or its messages each with its role. */
function readable(prompt) {
  let messages;
  try {
    messages = JSON.parse(prompt);
  } catch {
    return prompt ?? "";
  }
  if (!Array.isArray(messages) || !messages.every((message) => message && typeof message.role === "string")) return prompt;
  return messages.map((message) => `${message.role}: ${typeof message.content === "string" ? message.content
    : JSON.stringify(message.content)}`).join("\n\n");
}
