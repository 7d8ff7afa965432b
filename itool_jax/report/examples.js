// Answers to held-out questions at two phases.

const PAGE = 20;

/** Puts choices into a select and keeps what is chosen. */
function choices(id, values, chosen) {
  byId(id).replaceChildren(...values.map(([value, text]) => make("option", { value }, text)));
  byId(id).value = chosen ?? "";
}

const kindChoices = (kinds) => [["", "any"], ...Object.keys(report.kinds).filter((kind) => kinds.has(kind)).map((kind) => [kind, kind])];

/** The two phases to compare: those of the address, else the warm-up and the last one. */
function comparedPhases() {
  const { phases } = report.examples;
  const known = (name) => (phases.includes(name) ? name : undefined);
  const to = known(state.to) ?? phases.at(-1);
  return [known(state.from) ?? (to !== "warmup" ? known("warmup") : undefined) ?? phases[0], to];
}

function fillExampleControls() {
  const { phases, samples } = report.examples;
  const kinds = new Set(samples.flatMap((row) => Object.values(row.answers).map((answer) => answer.kind)).filter(Boolean));
  const [from, to] = comparedPhases();
  choices("from", phases.map((name) => [name, phaseName(name)]), from);
  choices("to", phases.map((name) => [name, phaseName(name)]), to);
  choices("error", kindChoices(kinds), state.error);
}

function changeOf(before, after) {
  if (before.kind === null) return after.kind === null ? "right" : "regressed";
  return after.kind === null ? "fixed" : "wrong";
}

function chosenExamples() {
  const [from, to] = comparedPhases();
  const text = (state.text ?? "").toLowerCase();
  const wanted = state.change || "";
  return report.examples.samples.filter((row) => {
    const [before, after] = [row.answers[from], row.answers[to]];
    if (!before || !after) return false;
    const change = changeOf(before, after);
    if (wanted !== "all" && (wanted ? change !== wanted : !["fixed", "regressed"].includes(change))) return false;
    if (state.error && before.kind !== state.error && after.kind !== state.error) return false;
    return !text || [row.id, row.question, row.gold, before.response, after.response].some((part) => part.toLowerCase().includes(text));
  });
}

const TAGS = { fixed: ["good", "✓ fixed"], regressed: ["bad", "✗ regressed"], wrong: ["", "✗ wrong"], right: ["", "✓ right"] };

function drawExamples() {
  const [from, to] = comparedPhases();
  byId("from").value = from ?? "";
  byId("to").value = to ?? "";
  for (const id of ["change", "error"]) byId(id).value = state[id] ?? "";
  if (byId("text").value !== (state.text ?? "")) byId("text").value = state.text ?? "";
  const matching = chosenExamples();
  // One that an address points to is shown wherever it stands.
  const at = matching.findIndex((row) => row.id === state.example);
  const count = Math.max(Number(state.examples) || PAGE, at + 1);
  const left = report.examples.left_out ? `; ${number(report.examples.left_out)} more are not included` : "";
  byId("example-count").textContent = `${number(matching.length)} of ${number(report.examples.samples.length)} samples${left}`;
  byId("example-list").replaceChildren(...matching.slice(0, count).map((row) => exampleCard(row, from, to)));
  byId("example-more").hidden = matching.length <= count;
}

function exampleCard(row, from, to) {
  const [before, after] = [row.answers[from], row.answers[to]];
  const open = state.example === row.id;
  const [look, word] = TAGS[changeOf(before, after)];
  const head = make("button", { type: "button", className: "head", id: `sample-${row.id}`, "aria-expanded": String(open) },
    make("span", { className: `tag ${look}` }, word), make("span", { className: "question" }, row.question || row.id),
    (after.kind ?? before.kind) && make("span", { className: "id" }, after.kind ?? before.kind));
  head.addEventListener("click", () => { go({ example: open ? undefined : row.id, part: "examples" }); byId(head.id)?.focus(); });
  return make("li", {}, head, open && make("div", { className: "body" },
    make("div", { className: "id" }, row.id), conversation(row.messages), toolList(row.tools, `tools-${row.id}`),
    block("Gold", row.gold),
    make("div", { className: "two" },
      block(phaseName(from), before.response, before.kind, row.gold), block(phaseName(to), after.response, after.kind, row.gold))));
}

/** A labelled text; where it is compared, what differs is marked and its kind of error named. */
function block(label, text, kind, gold) {
  const verdict = kind === undefined ? null : kind === null ? make("span", { className: "tag good" }, "✓ right") : make("span", { className: "tag bad", title: report.kinds[kind] }, `✗ ${kind}`);
  return make("div", { className: "block" }, make("div", { className: "caption" }, label, verdict),
    make("pre", {}, kind ? marked(text, gold) : text || "(empty)"));
}

/** The text with what is between the beginning and the end that it shares with the gold marked, in whole words. */
function marked(text, gold) {
  let [start, end] = [0, 0];
  while (start < Math.min(text.length, gold.length) && text[start] === gold[start]) start += 1;
  while (end < Math.min(text.length, gold.length) - start && text.at(-1 - end) === gold.at(-1 - end)) end += 1;
  const inWord = (at) => at > 0 && at < text.length && /\w/.test(text[at]) && /\w/.test(text[at - 1]);
  while (inWord(start)) start -= 1;
  while (end > 0 && inWord(text.length - end)) end -= 1;
  const middle = text.slice(start, text.length - end);
  return [text.slice(0, start), make("mark", {}, middle || "…"), text.slice(text.length - end)].filter((part) => part !== "");
}

function conversation(messages) {
  return make("div", { className: "talk" }, messages.map((message) =>
    make("div", { className: "block" }, make("div", { className: "role" }, message.role), make("pre", {}, message.content || "(empty)"))));
}

function toolList(place, id) {
  const tools = report.tool_lists[place] ?? [];
  if (!tools.length) return make("p", { className: "caption" }, "No tools were offered.");
  const rows = tools.map((tool) => [make("code", {}, shown(tool.name)), shown(tool.description ?? ""), make("code", {}, parameters(tool))]);
  return folded(id, `${tools.length} tool${tools.length > 1 ? "s" : ""}`, table(["tool", "description", "parameters"], rows, { numeric: false }));
}

function parameters(tool) {
  const { properties, required = [] } = tool.parameters ?? {};
  if (!properties || typeof properties !== "object") return "";
  return Object.entries(properties).map(([name, schema]) =>
    `${name}${Array.isArray(required) && required.includes(name) ? "" : "?"}: ${Array.isArray(schema?.enum) ? schema.enum.map(shown).join(" | ") : shown(schema?.type ?? "any")}`).join(", ");
}

/** Controls change the state; typing waits until the reader pauses. */
function listenToControls(form, names, reset) {
  let waiting;
  byId(form).addEventListener("submit", (event) => event.preventDefault());
  for (const name of names) {
    // Leaving a field is a change to the browser, but none to us where typing was seen already.
    const change = () => { if (byId(name).value !== (state[name] ?? "")) go({ [name]: byId(name).value, ...reset }, { keep: false }); };
    byId(name).addEventListener("change", change);
    if (byId(name).type === "search") byId(name).addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(change, 150); });
  }
}

function listenToExamples() {
  listenToControls("example-controls", ["from", "to", "change", "error", "text"], { examples: undefined });
  byId("example-more").addEventListener("click", () => go({ examples: String((Number(state.examples) || PAGE) + PAGE) }, { keep: false }));
}
