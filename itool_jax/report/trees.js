// The tree browser: a list of prompts, the tree of the one chosen, and what is known of one of its nodes.

const PROMPTS = 40;
const treeTexts = new Map();
const keyOf = (entry) => `${entry.phase}/${entry.id}`;

function fillTreeControls() {
  const phases = [...new Set(report.trees.map((entry) => entry.phase))];
  choices("iteration", [["", "all"], ...phases.map((name) => [name, phaseName(name)])], state.iteration);
  choices("kind", kindChoices(new Set(report.trees.flatMap((entry) => entry.kinds))), state.kind);
}

function chosenTrees() {
  const text = (state.find ?? "").toLowerCase();
  return report.trees.filter((entry) =>
    (!state.iteration || entry.phase === state.iteration) && (!state.solved || entry.solved === (state.solved === "yes")) &&
    (!state.kind || entry.kinds.includes(state.kind)) && (!text || `${entry.id}\n${entry.question}`.toLowerCase().includes(text)));
}

/** Whether the model's own steps led to a right response. */
const verdictOf = (entry) => (entry.solved ? "✓ solved" : entry.by_gold ? "✗ solved by the injected gold only" : "✗ not solved");

function drawPicker() {
  for (const id of ["iteration", "solved", "kind"]) byId(id).value = state[id] ?? "";
  if (byId("find").value !== (state.find ?? "")) byId("find").value = state.find ?? "";
  const matching = chosenTrees();
  // The one that is shown stands in the list too.
  const count = Math.max(Number(state.prompts) || PROMPTS, 1 + matching.findIndex((entry) => keyOf(entry) === currentKey()));
  const left = report.trees_left_out ? `; ${number(report.trees_left_out)} more are not included` : "";
  byId("tree-count").textContent = `${number(matching.length)} of ${number(report.trees.length)} trees${left}`;
  byId("tree-list").replaceChildren(...matching.slice(0, count).map((entry) => {
    const key = keyOf(entry);
    const link = make("a", { href: address({ ...state, part: undefined, tree: key, node: undefined, closed: undefined }), "data-tree": key },
      make("span", { className: "question" }, entry.question || entry.id),
      make("span", { className: "meta" }, make("span", {}, verdictOf(entry)),
        make("span", {}, `${entry.pairs} pair${entry.pairs === 1 ? "" : "s"}`), make("span", {}, phaseName(entry.phase))));
    return make("li", {}, link);
  }));
  byId("tree-more").hidden = matching.length <= count;
  markCurrent(currentKey());
}

let scrolledTo;

/** Marks the prompt whose tree is shown; where it is another one, scrolls the list, not the page, to it. */
function markCurrent(key) {
  const stays = key === scrolledTo;
  scrolledTo = key;
  for (const link of document.querySelectorAll("#tree-list a")) {
    if (link.dataset.tree !== key) { link.removeAttribute("aria-current"); continue; }
    link.setAttribute("aria-current", "true");
    const [list, box] = [document.querySelector(".picker"), link.getBoundingClientRect()];
    const frame = list.getBoundingClientRect();
    if (!stays && (box.top < frame.top || box.bottom > frame.bottom)) list.scrollTop += box.top - frame.top - frame.height / 3;
  }
}

/** The tree of the address, else the one with most pairs. */
function currentKey() {
  if (state.tree) return state.tree;
  const best = report.trees.reduce((most, entry) => (most && most.pairs >= entry.pairs ? most : entry), undefined);
  return best && keyOf(best);
}

/** A tree is read when it is looked at: from the page, or from the server that the page came from. */
async function readTree(place) {
  if (!treeTexts.has(place)) {
    const there = report.live ? await (await fetch(`tree?at=${place}`)).text() : byId(`tree-${place}`).textContent;
    treeTexts.set(place, JSON.parse(there));
  }
  return treeTexts.get(place);
}

let treeShown = Promise.resolve();
const showTree = () => { treeShown = drawTree(); };

async function drawTree() {
  const key = currentKey();
  const place = report.trees.findIndex((entry) => keyOf(entry) === key);
  if (place < 0) {
    byId("tree").replaceChildren(make("p", { className: "caption" }, key ? `Tree ${key} is not in this report.` : "No trees yet."));
    return;
  }
  const raw = await readTree(place);
  if (key !== currentKey()) return; // another one was chosen meanwhile
  markCurrent(key);
  const focused = document.activeElement?.closest?.("#tree [data-node]")?.dataset.node;
  const open = [...document.querySelectorAll("#tree details[open][id]")].map((element) => element.id);
  const tree = grow(raw, report.trees[place]);
  const node = state.node in tree.nodes ? Number(state.node) : undefined;
  byId("tree").replaceChildren(...heading(tree), diagram(tree, node), legend(), stepTable(tree, node), ...pairList(tree));
  for (const id of open) if (byId(id)) byId(id).open = true;
  if (focused !== undefined) document.querySelector(`#tree tr[data-node="${node ?? 0}"]`)?.focus({ preventScroll: true });
  performance.mark("tree shown");
}

/** The nodes as objects with their children, pairs and depth. */
function grow(raw, entry) {
  const names = ["parent", "text", "visits", "q", "value", "prior", "outcome", "confidence", "terminal", "gold", "sampled"];
  const nodes = raw.nodes.map((row, id) => ({ id, ...Object.fromEntries(names.map((name, n) => [name, row[n]])), children: [], marks: [], end: raw.ends[id] }));
  for (const node of nodes.slice(1)) {
    node.depth = (nodes[node.parent].depth ?? 0) + 1;
    nodes[node.parent].children.push(node);
  }
  nodes[0].depth = 0;
  const pairs = raw.pairs.map(([at, chosen, rejected, qChosen, qRejected], n) => ({ n: n + 1, at, chosen, rejected, qChosen, qRejected }));
  for (const pair of pairs) {
    nodes[pair.chosen]?.marks.push(["good", `▲ chosen ${pair.n}`]);
    nodes[pair.rejected]?.marks.push(["bad", `▼ rejected ${pair.n}`]);
  }
  return { ...raw, entry, nodes, pairs };
}

const stepText = (node) => (node.id ? node.text : "(the prompt)");

function heading(tree) {
  const { entry } = tree;
  return [
    make("h3", {}, tree.question || entry.id),
    make("div", { className: "meta" }, make("span", { className: `tag ${entry.solved ? "good" : "bad"}` }, verdictOf(entry)),
      entry.kinds.map((kind) => make("span", { className: "tag", title: report.kinds[kind] }, kind)), make("span", { className: "id" }, keyOf(entry))),
    block("Gold", tree.gold),
    folded("tree-prompt", "Prompt", make("div", {}, conversation(tree.messages))), toolList(tree.tools, "tree-tools"),
  ];
}

// The diagram. It repeats what the table below says, which is what keyboards and screen readers use. -----------------

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function diagram(tree, selected) {
  const leaves = tree.nodes.filter((node) => !node.children.length).length;
  const depth = Math.max(...tree.nodes.map((node) => node.depth));
  const room = Math.max(240, (byId("tree").clientWidth || 700) - 4);
  const wide = Math.max(22, Math.min(120, room / leaves));
  const [width, tall] = [Math.max(leaves * wide, 120), 74];
  let next = 0;
  const spread = (node) => {
    node.children.forEach(spread);
    const ends = node.children.map((child) => child.x);
    node.x = ends.length ? (ends[0] + ends.at(-1)) / 2 : (next++ + 0.5) * wide;
    node.y = 26 + node.depth * tall;
  };
  spread(tree.nodes[0]);
  const picture = svg("svg", { width, height: 58 + depth * tall, viewBox: `0 0 ${width} ${58 + depth * tall}`, "aria-hidden": "true" });
  for (const gold of [false, true]) for (const node of tree.nodes.slice(1).filter((other) => other.gold === gold)) {
    const up = tree.nodes[node.parent];
    picture.append(svg("path", { class: `edge${gold ? " gold" : ""}`, "stroke-width": Math.min(6, 1.5 + node.visits * 0.6),
      d: `M${up.x} ${up.y}C${up.x} ${up.y + tall / 2} ${node.x} ${node.y - tall / 2} ${node.x} ${node.y}` }));
  }
  const most = Math.max(0.5, ...tree.nodes.map((node) => Math.abs(node.q ?? 0)));
  for (const node of tree.nodes) picture.append(...diagramNode(node, most, node.id === selected, wide));
  return make("div", { className: "diagram" }, picture);
}

function diagramNode(node, most, selected, wide) {
  const size = Math.min(wide / 2 - 2, (node.terminal ? 8 : 6) + 1.6 * Math.sqrt(node.visits ?? 0));
  const fill = node.id ? mix((node.q ?? 0) / most) : colour("three");
  const at = { cx: node.x, cy: node.y, r: size };
  const shape = node.terminal
    ? svg("rect", { class: "node", x: node.x - size, y: node.y - size, width: 2 * size, height: 2 * size, rx: 2, fill })
    : svg("circle", { class: "node", ...at, fill });
  shape.addEventListener("click", () => choose(node.id));
  shape.append(svg("title", {}, `${node.id}: ${stepText(node).slice(0, 200)}\nN ${node.visits}, Q ${number(node.q)}`));
  const looks = [...new Set(node.marks.map(([look]) => look))];
  return [shape, selected && svg("circle", { class: "ring", ...at, r: size + 4 + (node.terminal ? size * 0.4 : 0) }),
    node.terminal && svg("text", { class: "verdict", x: node.x, y: node.y }, node.end === null ? "✓" : "✗"),
    ...looks.map((look, n) => svg("text", node.children.length
      ? { class: look, x: node.x + size + 4 + 11 * n, y: node.y + 4 } : { class: `${look} below`, x: node.x + 11 * n, y: node.y + size + 14 },
    look === "good" ? "▲" : "▼"))].filter(Boolean);
}

/** From the negative to the positive colour through a grey. */
function mix(share) {
  const parse = (name) => colour(name).match(/\w\w/g).map((part) => parseInt(part, 16));
  const [zero, end] = [parse("zero"), parse(share < 0 ? "minus" : "plus")];
  const weight = Math.min(1, 0.15 + Math.abs(share) * 0.85);
  return `rgb(${zero.map((value, n) => Math.round(value + weight * (end[n] - value))).join(" ")})`;
}

function legend() {
  const item = (mark, text) => make("span", {}, mark, text);
  return make("div", { className: "legend" }, item(make("i", { className: "plus" }), "Q above 0"), item(make("i", { className: "minus" }), "Q below 0"),
    item(make("i", { className: "line" }), "gold path"), item("", "larger: more visits"), item("", "▢ end of a response, ✓ right, ✗ wrong"), item("", "▲ chosen, ▼ rejected"));
}

// The table of steps, a tree grid: arrows move and fold, Enter chooses. ------------------------------------------------

const COLUMNS = [
  ["N", "visits", (node) => number(node.visits)], ["Q", "value", (node) => (node.id ? number(node.q) : "–")], ["P", "prior", (node) => (node.id ? number(node.prior) : "–")],
  ["O", "outcome", (node) => (node.terminal ? number(node.outcome) : "–")], ["C", "confidence", (node) => (node.id ? number(node.confidence) : "–")],
];

const closedNodes = () => new Set((state.closed ?? "").split(",").filter(Boolean).map(Number));

function stepTable(tree, selected) {
  const closed = closedNodes();
  const rows = [];
  const walk = (node) => {
    rows.push(stepRow(node, node.id === selected, closed.has(node.id)));
    if (node.id === selected) rows.push(detail(tree, node));
    if (!closed.has(node.id)) node.children.forEach(walk);
  };
  walk(tree.nodes[0]);
  if (!rows.some((row) => row.tabIndex === 0)) rows[0].tabIndex = 0;
  const head = make("tr", { role: "row" }, make("th", { scope: "col" }, "Step"),
    COLUMNS.map(([name, title]) => make("th", { scope: "col", className: "number", title }, make("abbr", { title }, name))));
  const grid = make("table", { className: "steps", role: "treegrid", "aria-label": "Steps of the search tree; arrow keys move, Enter shows a step" },
    make("thead", {}, head), make("tbody", {}, rows));
  grid.addEventListener("keydown", (event) => moveInTable(event, tree));
  return grid;
}

function stepRow(node, selected, closed) {
  const turn = make("button", { type: "button", className: "turn", tabIndex: -1, "aria-hidden": "true" }, node.children.length ? (closed ? "▸" : "▾") : "");
  if (node.children.length) turn.addEventListener("click", (event) => { event.stopPropagation(); fold(node.id, !closed); });
  const verdict = !node.terminal ? null : node.end === null ? ["good", "✓ right"] : ["bad", `✗ ${node.end ?? "wrong"}`];
  const tags = [node.gold && node.id ? ["gold", "gold"] : null, node.sampled ? null : ["gold", "injected"], verdict, ...node.marks].filter(Boolean);
  const step = make("td", { className: "step", role: "gridcell" },
    make("div", { className: "line" }, turn, make("pre", {}, stepText(node))),
    make("div", { className: "tags" }, tags.map(([look, text]) => make("span", { className: `tag ${look}` }, text))));
  step.style.setProperty("--level", node.depth);
  const row = make("tr", { role: "row", tabIndex: selected ? 0 : -1, "data-node": node.id, "aria-level": node.depth + 1, "aria-selected": String(selected),
    "aria-expanded": node.children.length ? String(!closed) : undefined },
  step, COLUMNS.map(([name, , value]) => make("td", { className: "number", role: "gridcell", "data-label": name }, value(node))));
  row.addEventListener("click", () => { row.focus({ preventScroll: true }); choose(node.id); });
  return row;
}

const choose = (id) => go({ tree: currentKey(), node: String(id), part: "trees" }, { keep: state.node !== String(id) });

function fold(id, close) {
  const closed = closedNodes();
  if (close) closed.add(id);
  else closed.delete(id);
  go({ tree: currentKey(), closed: [...closed].join(",") }, { keep: false });
}

function moveInTable(event, tree) {
  const row = event.target.closest("tr[data-node]");
  if (!row || event.ctrlKey || event.metaKey || event.altKey) return;
  const rows = [...row.parentElement.querySelectorAll("tr[data-node]")];
  const node = tree.nodes[Number(row.dataset.node)];
  const open = row.getAttribute("aria-expanded") === "true";
  const to = { ArrowDown: rows[rows.indexOf(row) + 1], ArrowUp: rows[rows.indexOf(row) - 1], Home: rows[0], End: rows.at(-1) }[event.key];
  const near = (id) => rows.find((other) => Number(other.dataset.node) === id);
  if (to) focusRow(to);
  else if (event.key === "ArrowRight" && node.children.length) { if (open) focusRow(near(node.children[0].id)); else refold(node.id, false); }
  else if (event.key === "ArrowLeft") { if (open) refold(node.id, true); else if (node.id) focusRow(near(node.parent)); }
  else if (event.key === "Enter" || event.key === " ") choose(node.id);
  else return;
  event.preventDefault();
}

function focusRow(row) {
  for (const other of row.parentElement.querySelectorAll("tr[data-node]")) other.tabIndex = -1;
  row.tabIndex = 0;
  row.focus();
}

function refold(id, close) {
  state.node = String(id); // so that the focus returns to this row
  fold(id, close);
}

// One node, and the pairs. ---------------------------------------------------------------------------------------------

/** A row below the one chosen, with all that is known of it. */
function detail(tree, node) {
  const path = [];
  for (let at = node; at.id; at = tree.nodes[at.parent]) path.unshift(at);
  const text = path.map((step, n) => (n === path.length - 1 ? make("mark", {}, step.text) : step.text));
  const measures = [
    ["N", number(node.visits), "visits"],
    ["Q", number(node.q, 3), "value of the step: its reward plus what follows"],
    ["V", number(node.value, 3), "mean value of the steps that follow"],
    ["Prior", number(node.prior, 3), "how likely the step is under the policy"],
    ["O", node.terminal ? number(node.outcome, 2) : "–", "outcome of a finished response: +1 right, −1 wrong"],
    ["C", number(node.confidence, 3), "how likely the policy believes the response so far to be right"],
  ];
  const response = node.id ? make("div", { className: "block" }, make("div", { className: "caption" }, "Response so far, last step highlighted"), make("pre", {}, text)) : null;
  const values = make("dl", { className: "measures" }, measures.map(([name, value, meaning]) => make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, meaning)))));
  return make("tr", { className: "detail", role: "row" }, make("td", { colSpan: 6, role: "gridcell" },
    make("div", { className: "caption" }, `Node ${node.id}, depth ${node.depth}`), response, values));
}

function pairList(tree) {
  if (!tree.pairs.length) return [make("h4", {}, "Pairs"), make("p", { className: "caption" }, "This tree yielded no pairs.")];
  const button = (id, label) => {
    const link = make("button", { type: "button", className: "link" }, label);
    link.addEventListener("click", () => choose(id));
    return link;
  };
  const side = (label, id, q) => make("div", { className: "block" }, make("div", { className: "caption" }, button(id, `${label}, node ${id}`), `Q ${number(q)}`),
    make("pre", {}, tree.nodes[id] ? stepText(tree.nodes[id]) : "(not in the tree)"));
  return [make("h4", {}, "Pairs"), make("ol", { className: "cards" }, tree.pairs.map((pair) => make("li", {}, make("div", { className: "body" },
    make("div", { className: "caption" }, `Pair ${pair.n}, after `, button(pair.at, `node ${pair.at}`)),
    make("div", { className: "two" }, side("▲ chosen", pair.chosen, pair.qChosen), side("▼ rejected", pair.rejected, pair.qRejected))))))];
}

function listenToTrees() {
  listenToControls("tree-controls", ["iteration", "solved", "kind", "find"], { prompts: undefined });
  byId("tree-more").addEventListener("click", () => go({ prompts: String((Number(state.prompts) || PROMPTS) + PROMPTS) }, { keep: false }));
  byId("tree-list").addEventListener("click", (event) => {
    const link = event.target.closest("a[data-tree]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    go({ tree: link.dataset.tree, node: undefined, closed: undefined, part: "trees" });
    if (getComputedStyle(byId("tree").parentElement).gridTemplateColumns.split(" ").length === 1) byId("tree").scrollIntoView();
  });
}

start();
