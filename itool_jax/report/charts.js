// Charts, each with the numbers it shows in a table below it.

let charts = [];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const POINTS = ["circle", "rect", "triangle", "rectRot", "star", "cross"];

/** Draws an interval over each bar of data sets with `whiskers`, and a mark at `middles` where they are given. */
const whiskers = {
  id: "whiskers",
  afterDatasetsDraw(chart) {
    const { ctx, scales } = chart;
    chart.data.datasets.forEach((set, n) => {
      if (!set.whiskers || !chart.isDatasetVisible(n)) return;
      chart.getDatasetMeta(n).data.forEach((bar, i) => {
        if (!set.whiskers[i]) return;
        const [low, high] = set.whiskers[i].map((value) => scales.y.getPixelForValue(value));
        ctx.save();
        const arm = Math.min(4, bar.width / 3);
        ctx.beginPath();
        for (const y of [low, high]) { ctx.moveTo(bar.x - arm, y); ctx.lineTo(bar.x + arm, y); }
        ctx.moveTo(bar.x, low);
        ctx.lineTo(bar.x, high);
        // A rim of the page's colour keeps the line visible on a bar of its own colour.
        for (const [shade, width] of [["paper", 2.75], ["ink", 1.25]]) {
          ctx.strokeStyle = ctx.fillStyle = colour(shade);
          ctx.lineWidth = width;
          ctx.stroke();
        }
        if (set.middles?.[i] != null) {
          ctx.beginPath();
          ctx.arc(bar.x, scales.y.getPixelForValue(set.middles[i]), 3.5, 0, 7);
          ctx.fill();
        }
        ctx.restore();
      });
    });
  },
};

/** The colour of a phase: grey for the base, then one hue from faint to strong, so that order shows without colour vision. */
function phaseColour(phase, phases) {
  if (phase === "base") return colour("base");
  const trained = phases.filter((name) => name !== "base");
  const share = trained.length < 2 ? 1 : trained.indexOf(phase) / (trained.length - 1);
  const [a, b] = ["ramp-a", "ramp-b"].map((name) => colour(name).match(/\w\w/g).map((part) => parseInt(part, 16)));
  return `rgb(${a.map((value, n) => Math.round(value + share * (b[n] - value))).join(" ")})`;
}

/** A figure with caption, chart and table. */
function figure(id, title, note, config, head, rows, whole = false) {
  const canvas = make("canvas", { role: "img", "aria-label": `${title}. ${note} The numbers are in the table below.` });
  const element = make("figure", { id, className: whole ? "whole" : "" },
    make("figcaption", {}, make("strong", {}, title), make("span", {}, note)),
    make("div", { className: "plot" }, canvas),
    folded(`${id}-table`, "Numbers", table(head, rows, { caption: title })));
  return { element, draw: () => charts.push(new Chart(canvas, { plugins: [whiskers], ...config })) };
}

function options({ x = {}, y = {}, legend = true, stacked = false, tooltip = {} } = {}) {
  const axis = (own) => ({ stacked, border: { display: false }, ...own, ticks: { color: colour("soft"), ...own.ticks },
    title: { display: Boolean(own.text), text: own.text, color: colour("soft") } });
  return {
    animation: false, responsive: true, maintainAspectRatio: false, interaction: { mode: "index", intersect: false },
    scales: { x: axis({ grid: { display: false }, ...x }), y: axis({ grid: { color: colour("line") }, ...y, ticks: { maxTicksLimit: 6, ...y.ticks } }) },
    plugins: {
      legend: { display: legend, align: "start", labels: { color: colour("ink"), usePointStyle: true, boxHeight: 8, padding: 14 } },
      tooltip: { callbacks: tooltip },
    },
  };
}

function drawAccuracy() {
  const { split, limit, comparisons, phases } = report.evaluation;
  const count = phases.at(-1)?.n?.overall;
  byId("accuracy-lead").textContent = phases.length
    ? `Exact answers on the ${split} part, ${limit ? `the first ${limit} samples` : "all samples"} (n = ${count}), decoded greedily. ` +
      "Intervals are 95 % Wilson score intervals of each single accuracy; phases are compared sample by sample below."
    : "No phase has been evaluated yet.";
  byId("comparisons").replaceChildren(...comparisons.map((row) => make("li", {},
    make("strong", {}, phaseName(row.phase)), ` against ${phaseName(row.against)}: ${row.text}`,
    (row.regressions ?? []).map((line) => make("div", { className: "lower" }, `lower: ${line}`)))));
  if (!comparisons.length) byId("comparisons").replaceChildren(make("li", {}, "Nothing to compare yet."));
  byId("benchmarks").replaceChildren(...benchmarkTables());
}

function benchmarkTables() {
  return [...new Set(report.benchmarks.map((row) => row.benchmark))].flatMap((name) => {
    const rows = report.benchmarks.filter((row) => row.benchmark === name);
    const lines = rows.flatMap((row) => Object.entries({ ...row.accuracy, ...row.columns }).filter(([, value]) => value !== null)
      .map(([category, value]) => [category, phaseName(row.phase), percent(value),
        interval(row.interval?.[category] ?? row.column_interval?.[category]), number(row.n?.[category])]));
    return [make("h3", {}, `Benchmark ${name}`), table(["category", "phase", "correct", "95 % interval", "n"], lines)];
  });
}

function accuracyFigure() {
  const { phases, categories } = report.evaluation;
  const names = phases.map((row) => row.phase);
  const datasets = phases.map((row) => ({
    label: phaseName(row.phase), data: categories.map((name) => 100 * row.accuracy[name]),
    whiskers: categories.map((name) => row.interval[name]?.map((value) => 100 * value)),
    backgroundColor: phaseColour(row.phase, names), categoryPercentage: 0.78, barPercentage: 0.88, borderRadius: 2,
  }));
  const rows = categories.flatMap((category) => phases.map((row) =>
    [`${category}, ${phaseName(row.phase)}`, percent(row.accuracy[category]), interval(row.interval[category]), number(row.n[category])]));
  return figure("accuracy-figure", "Exact answers by category", "Percent; error bars are 95 % intervals.", {
    type: "bar", data: { labels: categories.map((name) => name.replace("_", " ")), datasets },
    options: options({ y: { min: 0, max: 100 }, tooltip: { label: (item) =>
      `${item.dataset.label}: ${item.raw.toFixed(1)} % [${item.dataset.whiskers[item.dataIndex]?.map((value) => value.toFixed(1)).join(", ")}]` } }),
  }, ["category, phase", "correct", "95 % interval", "n"], rows);
}

/** A curve over steps for each training that has the quantity. */
function curveFigure(id, title, note, name, belongs) {
  const trainings = report.training.filter((row) => belongs(row) && row.curves[name]);
  if (!trainings.length) return null;
  const names = trainings.map((row) => row.phase);
  const shade = (phase) => (names.length > 1 ? phaseColour(phase, names) : colour("one"));
  const datasets = trainings.map((row, n) => ({
    label: phaseName(row.phase), data: row.steps.map((step, i) => ({ x: step, y: row.curves[name][i] })),
    borderColor: shade(row.phase), backgroundColor: shade(row.phase), borderWidth: trainings.length > 1 ? 2 : 1.5,
    pointRadius: row.steps.length > 40 ? 0 : 3, pointStyle: POINTS[n % POINTS.length], borderDash: n % 2 ? [6, 3] : [],
  }));
  const rows = trainings.flatMap((row) => {
    const values = row.curves[name].filter((value) => value !== null);
    return [[phaseName(row.phase), number(row.n_steps), ...[values[0], Math.min(...values), Math.max(...values), values.at(-1)].map((value) => number(value, 4))]];
  });
  return figure(id, title, note, {
    type: "line", data: { datasets },
    options: options({ x: { type: "linear", text: "step", ticks: { precision: 0 } }, legend: trainings.length > 1 }),
  }, ["phase", "steps", "first", "lowest", "highest", "last"], rows);
}

const isWarmup = (row) => row.phase === "warmup";
const isPreference = (row) => !isWarmup(row);

function trainingFigures() {
  const setting = (name) => report.settings.find((row) => row.name === name)?.value;
  const [title, note] = setting("preference.control") ? ["Loss of the control", "Mean negative log-likelihood per token."]
    : [`Loss of preference training (${setting("preference.loss") ?? "–"})`, "Mean over the pairs of a batch."];
  return [
    curveFigure("loss-sft", "Loss of the warm-up", "Mean negative log-likelihood per token.", "loss", isWarmup),
    curveFigure("loss-preference", title, note, "loss", isPreference),
    curveFigure("margin", "Reward margin", "How much more the policy prefers the chosen step than the reference does.", "reward_margin", isPreference),
    curveFigure("reward-accuracy", "Pairs in the right order", "Share whose chosen step has the higher reward.", "reward_accuracy", isPreference),
  ];
}

function perplexityFigure() {
  const boxes = report.perplexity.flatMap((row) => [
    [`all, ${phaseName(row.phase)}`, row.all], [`before, ${phaseName(row.phase)}`, row.before], [`after, ${phaseName(row.phase)}`, row.after]].filter(([, box]) => box));
  if (!boxes.length) return null;
  const shades = { all: colour("three"), before: colour("six"), after: colour("one") };
  const most = Math.max(...boxes.map(([, box]) => box.p90));
  return figure("perplexity-figure", "Perplexity of the gold answers", "Whole replay buffer at each iteration, and the searched samples before and after the iteration. Boxes span the middle 50 %, lines the middle 80 %; dots are medians.", {
    type: "bar",
    data: { labels: boxes.map(([name]) => name.split(", ")), datasets: [{
      label: "middle half", data: boxes.map(([, box]) => [box.p25, box.p75]), whiskers: boxes.map(([, box]) => [box.p10, box.p90]),
      middles: boxes.map(([, box]) => box.p50), minBarLength: 2, maxBarThickness: 46, borderSkipped: false, borderRadius: 2,
      backgroundColor: boxes.map(([name]) => shades[name.split(",")[0]]) }] },
    options: options({ legend: false, y: { type: most > 10 ? "logarithmic" : "linear", min: 1, suggestedMax: most, ticks: { callback: (value) => number(value, 1), maxTicksLimit: 7 } },
      tooltip: { label: (item) => `median ${number(boxes[item.dataIndex][1].p50)}, middle half from ${item.raw.map((value) => number(value)).join(" to ")}` } }),
  }, ["samples", "10 %", "25 %", "median", "75 %", "90 %", "mean", "n"],
  boxes.map(([name, box]) => [name, ...["p10", "p25", "p50", "p75", "p90", "mean"].map((key) => number(box[key])), number(box.n)]), true);
}

/** Bars over phases; `parts` are [label, colour, value of a row], `extra` columns of the table alone. */
function barFigure(id, title, note, rows, parts, { stacked = true, written = number, text, unit = 1, extra = [] } = {}) {
  if (!rows.length) return null;
  const datasets = parts.map(([label, shade, value]) => ({ label, data: rows.map((row) => value(row) / unit), backgroundColor: colour(shade), maxBarThickness: 64 }))
    .filter((set) => set.data.some(Boolean));
  return figure(id, title, note, {
    type: "bar", data: { labels: rows.map((row) => phaseName(row.phase)), datasets },
    options: options({ stacked, y: { text }, tooltip: { label: (item) => `${item.dataset.label}: ${written(unit * (item.raw ?? 0))}` } }),
  }, ["phase", ...parts.map(([label]) => label), ...extra.map(([label]) => label)],
  rows.map((row) => [phaseName(row.phase), ...parts.map(([, , value]) => written(value(row) ?? 0)), ...extra.map(([, value]) => value(row))]));
}

function searchFigures() {
  const mean = (row, key) => number(row.pairs ? row[key] / row.pairs : null, 1);
  const verdict = (name) => (row) => row.verdicts[name] ?? 0;
  const trees = barFigure("verdicts", "Results of the searches", "Trees by the outcomes of their finished responses.", report.searches,
    [["right and wrong", "one", verdict("mixed")], ["all right", "five", verdict("right")], ["all wrong", "two", verdict("wrong")], ["none finished", "three", verdict("none")]],
    { extra: [["nodes", (row) => number(row.nodes)], ["trees without pairs", (row) => number(row.trees_without_pairs)]] });
  const gaps = report.searches.length ? figure("gaps", "Gap in Q within pairs", "Pairs by the gap in Q between the chosen and the rejected step.", {
    type: "bar",
    data: { labels: report.searches[0].gaps.map((row, n, all) => (n + 1 < all.length ? `${row.from}–${all[n + 1].from}` : `${row.from}+`)), datasets: report.searches.map((row) => ({
      label: phaseName(row.phase), data: row.gaps.map((gap) => gap.n), backgroundColor: phaseColour(row.phase, ["base", ...report.searches.map((other) => other.phase)]) })) },
    options: options({ x: { text: "gap in Q" }, y: { ticks: { precision: 0 } } }),
  }, ["phase", "pairs", "median gap", "at the first step", "chosen is gold", "mean chosen tokens", "mean rejected tokens"],
  report.searches.map((row) => [phaseName(row.phase), number(row.pairs), number(row.median_gap), number(row.first_step), number(row.chosen_is_gold), mean(row, "chosen_tokens"), mean(row, "rejected_tokens")])) : null;
  return [abilityFigure(), perplexityFigure(), trees, gaps, timeFigure(), tokenFigure()];
}

/** What the policy can do with the searched prompts, what the search made of them, and what training changed. */
function abilityFigure() {
  const percent = (value) => (value == null ? "–" : `${number(100 * value, 1)} %`);
  const judged = (row) => row.self_evaluation ?? {}, held = (row) => row.held_out ?? {};
  const rows = report.iterations;
  return barFigure("ability", "Policy accuracy on the searched prompts", "Share answered correctly by greedy decoding, by one sample, and by any of K samples. The table adds the results of the search, the quality of self-evaluation, and the effect of training.", rows,
    [["greedy", "three", (row) => row.greedy ?? 0], ["one sample", "two", (row) => row.pass_at_1 ?? 0], [`any of ${rows[0]?.k ?? "K"}`, "one", (row) => row.pass_at_k ?? 0]],
    { stacked: false, written: percent, extra: [
      ["prompts", (row) => number(row.prompts)], ["solved by own steps", (row) => number(row.solved)], ["solved by gold only", (row) => number(row.solved_by_gold)],
      ["pairs", (row) => number(row.pairs)], ["chosen is gold", (row) => number(row.chosen_is_gold)], ["chosen is injected", (row) => number(row.chosen_injected)],
      ["invalid pairs", (row) => number(row.invalid_pairs)], ["AUC of self-evaluation", (row) => number(judged(row).auc, 2)],
      ["calibration error", (row) => number(judged(row).calibration_error, 2)], ["flipped by reversed letters", (row) => percent(judged(row).flipped)],
      ["held-out pairs", (row) => number(held(row).pairs)], ["margin before", (row) => number(held(row).margin_before, 2)], ["margin after", (row) => number(held(row).margin_after, 2)],
      ["pairs in order before", (row) => percent(held(row).accuracy_before)], ["pairs in order after", (row) => percent(held(row).accuracy_after)],
      ["validation answers changed", (row) => percent(row.changed)], ["almost no effect", (row) => (row.hardly_trained ? "yes" : "no")]] });
}

function timeFigure() {
  const kinds = [["warmup", "one"], ["score", "three"], ["search", "two"], ["reference", "four"], ["dpo", "five"], ["evaluate", "six"]];
  const rows = report.phases.map((phase) => ({ phase, ...Object.fromEntries(report.stages.filter((row) => row.phase === phase).map((row) => [row.stage, row.seconds])) }));
  // The reference's log-probabilities are computed inside of dpo.
  const seconds = (kind) => (row) => (kind === "dpo" ? Math.max(0, (row.dpo ?? 0) - (row.reference ?? 0)) : row[kind] ?? 0);
  const most = Math.max(0, ...rows.map((row) => kinds.reduce((sum, [kind]) => sum + seconds(kind)(row), 0)));
  const [text, unit] = most < 120 ? ["seconds", 1] : most < 7200 ? ["minutes", 60] : ["hours", 3600];
  return barFigure("time", "Time", "Finished stages only.", rows, kinds.map(([kind, shade]) => [kind, shade, seconds(kind)]), { written: duration, text, unit });
}

function tokenFigure() {
  const rows = report.searches.map((row) => ({ ...row,
    search: report.stages.find((stage) => stage.phase === row.phase && stage.stage === "search") ?? {},
    scored: report.perplexity.find((other) => other.phase === row.phase)?.tokens ?? 0 }));
  return barFigure("tokens", "Tokens", "Response tokens scored for perplexity, generated by the search, and in pairs.", rows, [
    ["scored", "three", (row) => row.scored], ["generated in search", "two", (row) => row.search.generated_tokens ?? 0],
    ["in pairs", "one", (row) => row.chosen_tokens + row.rejected_tokens]],
  { stacked: false, extra: [["generated per second", (row) => number((row.search.generated_tokens ?? 0) / Math.max(row.search.seconds ?? 0, 1e-9), 0)]] });
}

function kindsFigure() {
  const { phases, kinds } = report.examples;
  const names = Object.keys(report.kinds).filter((kind) => phases.some((phase) => kinds[phase][kind]));
  if (!names.length) return null;
  return figure("kinds-figure", "Kinds of error", "Wrong answers by kind of error and phase.", {
    type: "bar",
    data: { labels: names, datasets: phases.map((phase) => ({ label: phaseName(phase), data: names.map((kind) => kinds[phase][kind] ?? 0),
      backgroundColor: phaseColour(phase, phases), categoryPercentage: 0.78, barPercentage: 0.88, borderRadius: 2 })) },
    options: options({ y: { ticks: { precision: 0 } } }),
  }, ["kind", ...phases.map(phaseName), "meaning"], names.map((kind) => [kind, ...phases.map((phase) => number(kinds[phase][kind] ?? 0)), report.kinds[kind]]));
}

function drawCharts() {
  for (const chart of charts) chart.destroy();
  charts = [];
  const open = [...document.querySelectorAll("figure details[open]")].map((element) => element.id);
  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  const places = {
    "accuracy-chart": report.evaluation.phases.length ? [accuracyFigure()] : [], "training-charts": trainingFigures(),
    "search-charts": searchFigures(), "kinds-chart": [kindsFigure()],
  };
  for (const [id, figures] of Object.entries(places)) {
    const there = figures.filter(Boolean);
    byId(id).replaceChildren(...(there.length ? there.map(({ element }) => element) : [make("p", { className: "caption" }, "Nothing to show yet.")]));
    for (const { draw } of there) draw();
  }
  for (const id of open) if (byId(id)) byId(id).open = true;
}
