"use strict";
// What all parts of the page share: the report, elements made without HTML texts, and the state in the page's address.

let report = JSON.parse(document.getElementById("report").textContent);
const byId = (id) => document.getElementById(id);
const PARTS = ["overview", "accuracy", "training", "search", "examples", "trees"];

/** An element with properties, attributes (`aria-…`, `data-…`, role) and children; texts become text nodes. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.includes("-") || name === "role" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
const number = (value, digits = 2) =>
  value === null || value === undefined ? "–" : (Number.isInteger(value) ? value.toLocaleString("en") : short(value, digits)).replace(/^-/, "−");

/** Enough digits to tell a small number from nothing. */
function short(value, digits) {
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(1);
  return value.toFixed(size < 0.01 ? Math.max(digits, 4) : digits);
}

const phaseName = (phase) => phase.replace("iteration_", "iteration ");
const shown = (value) => (value === null ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value));

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(0)} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** A table of rows of texts; all but the first column stand to the right where they are numbers. */
function table(head, rows, { numeric = true, caption } = {}) {
  const side = (n) => (numeric && n > 0 ? "number" : "");
  const cells = (row) => row.map((cell, n) => make("td", { className: side(n) }, cell));
  return make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": caption ?? head.join(", ") },
    make("table", {},
      make("thead", {}, make("tr", {}, head.map((text, n) => make("th", { scope: "col", className: side(n) }, text)))),
      make("tbody", {}, rows.map((row) => make("tr", {}, cells(row))))));
}

/** A part that opens; `id` keeps it open when the page is drawn again. */
function folded(id, title, content) {
  return make("details", { id }, make("summary", {}, title), content);
}

// State: all that a reader has chosen is in the address, as #part or #name=value&name=value. ------------------------

let state = {};

function readAddress() {
  const values = {};
  for (const piece of location.hash.slice(1).split("&").filter(Boolean)) {
    const [name, ...rest] = piece.split("=");
    let value = rest.join("=");
    try { value = decodeURIComponent(value); } catch { /* it is taken as it stands */ }
    if (rest.length) values[name] = value;
    else values.part = PARTS.includes(name) ? name : undefined;
  }
  if (values.tree && !values.part) values.part = "trees";
  else if (values.example && !values.part) values.part = "examples";
  return values;
}

function address(values) {
  const write = (text) => encodeURIComponent(text).replaceAll("%2F", "/");
  const pairs = Object.entries(values).filter(([name, value]) => name !== "part" && value !== undefined && value !== "");
  const implied = values.tree ? "trees" : values.example ? "examples" : undefined;
  const part = values.part && values.part !== implied ? [values.part] : [];
  return "#" + [...part, ...pairs.map(([name, value]) => `${name}=${write(value)}`)].join("&");
}

/** Changes the state; `undefined` or "" takes a value out. A step that the browser's "back" undoes, where `keep`. */
function go(changes, { keep = true } = {}) {
  state = { ...state, ...changes };
  history[keep ? "pushState" : "replaceState"](null, "", address(state));
  drawFor(Object.keys(changes));
}

const DRAWN_BY = [
  [["from", "to", "change", "error", "text", "example", "examples"], () => drawExamples()],
  [["iteration", "solved", "kind", "find", "prompts"], () => drawPicker()],
  [["tree", "node", "closed"], () => showTree()],
  [["theme"], () => drawTheme()],
  [["part"], () => drawNavigation()],
];

function drawFor(names) {
  for (const [own, draw] of DRAWN_BY) if (own.some((name) => names.includes(name))) draw();
}

function followAddress() {
  const before = state;
  state = readAddress();
  drawFor([...Object.keys(before), ...Object.keys(state)].filter((name) => before[name] !== state[name]));
  scrollToPart();
}

async function scrollToPart() {
  if (!state.part) return;
  byId(state.part).scrollIntoView();
  await treeShown;
  if (state.part === "trees" && state.node) document.querySelector('#tree tr[aria-selected="true"]')?.scrollIntoView({ block: "center" });
}

function drawNavigation() {
  for (const link of document.querySelectorAll(".bar nav a")) {
    const current = link.hash === `#${state.part ?? "overview"}`;
    if (!current) { link.removeAttribute("aria-current"); continue; }
    link.setAttribute("aria-current", "true");
    link.parentElement.scrollLeft = link.offsetLeft - link.parentElement.offsetLeft - 60; // where the bar is narrow
  }
}

/** Links to parts keep the rest of the state. */
function followLink(event) {
  const link = event.target.closest?.('a[href^="#"]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const part = link.getAttribute("href").slice(1);
  if (!PARTS.includes(part)) return;
  event.preventDefault();
  go({ part });
  scrollToPart();
  byId(part).focus({ preventScroll: true });
}

/** Which part the reader has scrolled to is marked in the bar. */
function followScroll() {
  const visible = new Map();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) visible.set(entry.target.id, entry.isIntersecting);
    const part = PARTS.find((name) => visible.get(name));
    if (part && part !== state.part) { state.part = part; drawNavigation(); }
  }, { rootMargin: "-25% 0px -70% 0px" });
  for (const part of PARTS) watcher.observe(byId(part));
}

// Light and dark. ----------------------------------------------------------------------------------------------------

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const THEMES = { "": "Theme: system", light: "Theme: light", dark: "Theme: dark" };
let printing = false;

function drawTheme() {
  const theme = state.theme in THEMES ? state.theme : "";
  const dark = !printing && (theme === "dark" || (theme !== "light" && systemDark.matches));
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-label", THEMES[theme ?? ""]);
  byId("theme").replaceChildren("◐ ", make("span", {}, THEMES[theme ?? ""]));
  drawCharts();
  showTree();
}

function nextTheme() {
  const names = Object.keys(THEMES);
  go({ theme: names[(names.indexOf(state.theme ?? "") + 1) % names.length] }, { keep: false });
}

// Overview. ----------------------------------------------------------------------------------------------------------

function drawOverview() {
  byId("title").textContent = byId("bar-title").textContent = report.title;
  document.title = `${report.title} · report`;
  drawStatus();
  drawHeadline();
  const session = report.environment?.sessions?.at(-1) ?? {};
  const setting = Object.fromEntries(report.settings.map((row) => [row.name, row.value]));
  const parts = Object.entries(report.card?.parts ?? {});
  const seconds = report.stages.reduce((sum, row) => sum + (row.stage === "reference" ? 0 : row.seconds ?? 0), 0); // a part of dpo
  const devices = Object.entries(session.devices ?? {}).map(([kind, count]) => `${count} × ${kind}`).join(", ");
  const facts = [
    ["Model", shown(setting.model ?? "–")], ["Data", shown(setting.data ?? "–")],
    ["Samples, " + parts.map(([name]) => name).join(" / "), parts.map(([, row]) => number(row.samples)).join(" / ")],
    ["Iterations", `${report.phases.filter((name) => name.startsWith("iteration_")).length} of ${shown(setting.iterations ?? "–")}`],
    ["Trees", number(report.searches.reduce((sum, row) => sum + row.trees, 0))],
    ["Preference pairs", number(report.searches.reduce((sum, row) => sum + row.pairs, 0))],
    ["Time in finished stages", duration(seconds)], ["Devices", devices || "–"],
  ];
  byId("facts").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  const differing = report.settings.filter((row) => row.differs);
  const row = (item) => [make("code", {}, item.name), make("code", {}, shown(item.value)), make("code", {}, shown(item.default))];
  byId("settings").replaceChildren(...differing.map((item) => make("div", {},
    make("dt", {}, item.name), make("dd", {}, shown(item.value), make("small", {}, `default ${shown(item.default)}`)))));
  fill("all-settings", table(["setting", "value", "default"], report.settings.map(row), { numeric: false }));
  drawEnvironment();
  drawCard();
  const lines = report.log.lines.map((line) => [new Date(1000 * line.time).toLocaleTimeString(), shown(line.stage ?? ""), shown(line.text ?? "")]);
  fill("log", table(["time", "stage", "message"], lines, { numeric: false }));
}

const fill = (id, content) => byId(id).lastElementChild.replaceChildren(content);

function drawStatus() {
  const finished = report.summary?.finished === true;
  const last = report.log.lines.at(-1);
  const now = last ? `${shown(report.log.stage ?? "")}: ${shown(last.text)}` : "nothing logged yet";
  const when = report.log.time ? new Date(1000 * report.log.time).toLocaleString() : "";
  const text = finished ? `Finished, ${when}` : `${report.live ? "Running" : "Not finished"}, ${when}. ${now}`;
  byId("status").replaceChildren(make("span", { className: `dot${report.live && !finished ? " live" : ""}` }), text);
  byId("fault").hidden = !report.error;
  byId("fault").textContent = report.error ? `This page is older than the run directory: ${report.error}` : "";
}

function drawHeadline() {
  const rows = report.evaluation.phases;
  const figure = (row) => make("div", {},
    make("div", { className: "figure" }, (100 * row.accuracy.overall).toFixed(1), make("small", {}, "%")),
    make("div", { className: "label" }, make("strong", {}, phaseName(row.phase)), make("div", {}, `95 %: ${interval(row.interval.overall)}`)));
  const first = rows.filter((row) => ["base", "warmup"].includes(row.phase));
  const ends = rows.length ? [...new Set([...first, rows.at(-1)])].filter((row) => row.accuracy.overall != null) : [];
  byId("headline").replaceChildren(...ends.map(figure));
}

const interval = (bounds) => (bounds ? bounds.map((value) => (100 * value).toFixed(1)).join("–") : "–");

function drawEnvironment() {
  const rows = (report.environment?.sessions ?? []).flatMap((session, n) =>
    Object.entries(session).map(([name, value]) => [n ? `${name} (session ${n + 1})` : name,
      name === "time" ? new Date(1000 * value).toLocaleString() : value && typeof value === "object"
        ? Object.entries(value).map(([key, item]) => `${key} ${shown(item)}`).join(", ") || "none" : shown(value)]));
  fill("environment", rows.length ? table(["name", "value"], rows, { numeric: false }) : make("p", {}, "Not recorded."));
}

function drawCard() {
  if (!report.card) { fill("card", make("p", {}, "The data has not been prepared yet.")); return; }
  const { parts = {}, overlap_with_train: overlap = {}, ...rest } = report.card;
  const names = [...new Set(Object.values(parts).flatMap(Object.keys))];
  const rows = Object.entries(parts).map(([part, counts]) => [part, ...names.map((name) => number(counts[name]))]);
  const shared = Object.entries(overlap).map(([part, row]) => [part, number(row.questions), number(row.near_questions), number(row.samples_with_a_known_tool), number(row.samples)]);
  const left = Object.entries(rest).filter(([, value]) => typeof value !== "object").map(([name, value]) => `${name.replaceAll("_", " ")}: ${shown(value)}`);
  fill("card", make("div", {}, make("p", {}, left.join(", ")),
    table(["part", ...names.map((name) => name.replaceAll("_", " "))], rows),
    table(["overlap with train", "questions", "near duplicates", "samples with a tool seen in training", "of samples"], shared)));
}

// Start, and follow a run that goes on. --------------------------------------------------------------------------------

function drawAll() {
  drawOverview();
  drawAccuracy();
  fillExampleControls();
  fillTreeControls();
  drawExamples();
  drawPicker();
  drawTheme();
  drawNavigation();
}

/** Draws everything again with newer numbers; what is open, chosen, focused and scrolled to stays. */
function renew(newer) {
  const open = [...document.querySelectorAll("details[open][id]")].map((element) => element.id);
  const [focused, x, y] = [document.activeElement?.id, scrollX, scrollY];
  report = newer;
  treeTexts.clear();
  drawAll();
  for (const id of open) if (byId(id)) byId(id).open = true;
  if (focused && byId(focused) !== document.activeElement) byId(focused)?.focus({ preventScroll: true });
  scrollTo({ left: x, top: y, behavior: "instant" });
}

async function follow() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 2000));
    try {
      const answer = await fetch(`report.json?have=${report.stamp}`);
      if (answer.status === 200) renew(await answer.json());
      if (!report.error) byId("fault").hidden = true;
    } catch {
      byId("fault").textContent = "The report server has stopped, so this page no longer updates. Restart --stage=report --watch.";
      byId("fault").hidden = false;
    }
  }
}

function start() {
  addEventListener("error", (event) => {
    byId("fault").textContent = `Error in this page: ${event.message}`;
    byId("fault").hidden = false;
  });
  state = readAddress();
  drawAll();
  addEventListener("popstate", followAddress);
  document.addEventListener("click", followLink);
  byId("theme").addEventListener("click", nextTheme);
  systemDark.addEventListener("change", drawTheme);
  for (const [name, value] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(name, () => { printing = value; drawTheme(); });
  }
  listenToExamples();
  listenToTrees();
  scrollToPart();
  followScroll();
  if (report.live) follow();
}
