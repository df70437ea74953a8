"use strict";
// The page: facts → tables, charts and graph, each filled when its tab is first opened.

let facts = null;

const level = (value) => value === null || value === undefined ? "" : value >= facts.levels[0] ? "good" : value >= facts.levels[1] ? "fair" : "bad";
const pair = (values) => values === null ? null : `${short(values[0])} → ${short(values[1])}`;
const opened = new Set();

function siteLink(name) {
  if (!name) return document.createTextNode("");
  return make("a", { href: "#site", onclick: (event) => { event.preventDefault(); showSite(name); openTab("site"); } }, name);
}

/* From what ran to the graph: the first of its nodes in the last stage. */
function nodesLink(row) {
  const name = row.nodes.at(-1);
  if (!name) return "–";
  const go = (event) => { event.preventDefault(); openTab("graph"); showNode(name); };
  return make("a", { href: "#graph", onclick: go, title: row.nodes.join(", ") }, row.nodes.length === 1 ? name : `${row.nodes.length} nodes`);
}

function fillOverview() {
  const before = facts.sites.reduce((sum, s) => sum + s.bytes[0], 0), after = facts.sites.reduce((sum, s) => sum + s.bytes[1], 0);
  const taken = facts.sites.reduce((sum, s) => sum + s.linears.length, 0);
  byId("summary").textContent = [facts.recipe, `${taken} linears in ${facts.sites.length} sites, ${facts.refused.length} not taken`,
    before ? `${(before / 1e6).toFixed(1)} → ${(after / 1e6).toFixed(1)} MB` : "",
    facts.output_sqnr === null ? "" : `output ${decibels(facts.output_sqnr)} dB`].filter(Boolean).join(" · ");
  byId("settings").lastElementChild.append(...Object.entries(facts.settings).flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)]));
  const measured = (title, value, extra = {}) => ({ title, kind: "number", value, show: (s) => decibels(value(s)), level: (s) => level(value(s)), worstFirst: true, ...extra });
  const columns = [
    { title: "site", value: (s) => s.order, show: (s) => siteLink(s.name) },
    { title: "pattern", value: (s) => s.producer },
    { title: "K×N", kind: "number", value: (s) => s.shape[0] * s.shape[1], show: (s) => `${s.shape[1]}×${s.shape[0]}` },
    { title: "scheme", value: (s) => s.scheme },
    { title: "smoothing", value: (s) => s.smoothing, show: (s) => ["folded", "multiply", ""].includes(s.smoothing) ? s.smoothing + (s.alpha === null ? "" : ` α=${s.alpha}`) : "no" },
    { title: "columns", kind: "number", value: (s) => s.columns },
    { title: "absmax", kind: "number", value: (s) => s.absmax && s.absmax[0], show: (s) => pair(s.absmax) },
    { title: "max/median", kind: "number", value: (s) => s.spread && s.spread[0], show: (s) => pair(s.spread) },
    measured("W dB", (s) => s.errors.weight),
    measured("naive", (s) => s.errors.naive), measured("smoothed", (s) => s.errors.smoothed), measured("final dB", (s) => s.errors.final),
    measured("cumulative", (s) => s.errors.cumulative), measured("alone", (s) => s.errors.alone),
    { title: "MB", kind: "number", value: (s) => s.bytes[0], show: (s) => `${(s.bytes[0] / 1e6).toFixed(2)} → ${(s.bytes[1] / 1e6).toFixed(2)}` },
    { title: "ms", kind: "number", value: (s) => s.seconds && s.seconds[1], show: (s) => s.seconds && `${(s.seconds[0] * 1e3).toFixed(2)} → ${(s.seconds[1] * 1e3).toFixed(2)}` },
    { title: "implementation", value: (s) => s.implementations.join(" ") },
  ].filter((c) => ["site", "pattern"].includes(c.title) || facts.sites.some((s) => ![null, undefined, "", 0].includes(c.value(s))));
  table(byId("sites-table"), columns, facts.sites, { label: "sites", filter: { title: "patterns", value: (s) => s.producer } });
  if (facts.refused.length) table(byId("refused-table"), [
    { title: "linear", value: (r) => r.linear }, { title: "reason", kind: "text", value: (r) => r.reason },
    { title: "source", kind: "text", value: (r) => r.source, show: (r) => make("code", {}, r.source) },
  ], facts.refused, { label: "linears not taken", filter: { title: "reasons", value: (r) => r.reason } });
  else byId("refused-table").append(make("p", { class: "empty" }, "every linear was taken"));
  if (facts.breaks.length) byId("breaks").append(make("h2", {}, "Graph breaks"), make("ul", {}, ...facts.breaks.map((b) => make("li", {}, b))));
  if (facts.override) {
    const copy = make("button", { type: "button", onclick: async () => { await navigator.clipboard.writeText(facts.override); copy.textContent = "Copied"; } }, "Copy");
    byId("override").append(make("h2", {}, "An override for the five worst sites"), copy, make("pre", {}, facts.override));
  }
}

let current = null;

function showSite(name) {
  current = facts.sites.findIndex((s) => s.name === name);
  byId("site-choice").value = name;
  if (opened.has("site")) drawSite();
}

function drawSite() {
  const site = facts.sites[current ?? 0];
  if (!site) return;
  current = facts.sites.indexOf(site);
  byId("site-choice").value = site.name;
  const shown = {
    linears: site.linears.join(", "), scheme: site.scheme, "smoothed channels": site.smoothed_channels,
    smoothing: site.smoothing || "none", "absmax before → after": pair(site.absmax), "max/median before → after": pair(site.spread),
    "local SQNR, naive → smoothed → final": site.errors.final === null ? null : [site.errors.naive, site.errors.smoothed, site.errors.final].map(decibels).join(" → ") + " dB",
    "could be": site.fixes.map(([change, sqnr]) => `${change}: ${decibels(sqnr)} dB`).join(", ") || null,
    source: site.source || null,
  };
  byId("site-facts").replaceChildren(make("dl", {}, ...Object.entries(shown).filter(([, v]) => v !== null)
    .flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, String(v))])));
  const c = site.channels;
  const above = new Set(c ? c.above.filter(([, share]) => share >= 0.06).map(([channel]) => channel) : []);
  const marked = site.outlier_columns.length ? site.outlier_columns : [...above];
  const what = site.outlier_columns.length ? "yellow: outlier columns" : "yellow: |x| ≥ 6 for 6% of tokens or more";
  chart("chart-x", c && c.x_before.length ? channelChart(`|X| by channel; ${what}`, c.x_before, c.x_after, c.pool, marked) : null);
  chart("chart-w", c ? channelChart("|W| by input channel", c.w_before, c.w_after, c.pool, marked) : null);
  chart("chart-alpha", alphaChart(site));
  chart("chart-histogram", histogramChart(site.histogram));
  chart("chart-codes", codesChart(site.histogram));
}

function fillSite() {
  byId("site-choice").append(...facts.sites.map((s) => make("option", { value: s.name }, s.name)));
  byId("site-choice").addEventListener("change", (event) => showSite(event.target.value));
  const move = (by) => () => showSite(facts.sites[(current + by + facts.sites.length) % facts.sites.length].name);
  byId("site-before").addEventListener("click", move(-1));
  byId("site-after").addEventListener("click", move(1));
  drawSite();
}

function fillDepth() {
  const spec = depthChart(facts.sites);
  if (!spec) byId("chart-depth").append(make("p", { class: "empty" }, "not measured: inspect with data (--text FILE, or data=[...])"));
  else { chart("chart-depth", spec); chart("chart-alone", aloneChart(facts.sites)); }
}

function fillOutliers() {
  const seen = facts.sites.filter((s) => s.channels && s.channels.x_before.length);
  if (!seen.length) {
    byId("outlier-note").textContent = "not measured: inspect with data (--text FILE, or data=[...])";
    return;
  }
  const widths = [...new Set(seen.map((s) => s.shape[1]))];
  byId("width-choice").append(...widths.map((w) => make("option", { value: w }, `${w} channels`)));
  const order = new Map(facts.sites.map((s) => [s.name, s.order]));
  const draw = () => {
    const width = Number(byId("width-choice").value), sites = seen.filter((s) => s.shape[1] === width);
    const channels = new Map();
    for (const site of sites) for (const [channel, share] of site.channels.above) {
      const row = channels.get(channel) ?? { channel, sites: 0, most: 0, sum: 0 };
      row.sites += 1; row.sum += share; row.most = Math.max(row.most, share);
      channels.set(channel, row);
    }
    const rows = [...channels.values()].map((r) => ({ ...r, layers: r.sites / sites.length, tokens: r.sum / sites.length }));
    const emergent = rows.filter((r) => r.layers >= 0.25 && r.tokens >= 0.06);
    byId("outlier-note").textContent = `${rows.length} of ${width} channels reach |x| ≥ 6 somewhere in these ${sites.length} sites; `
      + `${emergent.length} do so in at least 25% of the sites and for at least 6% of the tokens (LLM.int8(), section 4.1).`;
    chart("chart-outliers", outlierChart(sites, width, order));
    table(byId("outlier-table"), [
      { title: "channel", kind: "number", value: (r) => r.channel },
      { title: "share of sites", kind: "number", value: (r) => r.layers, show: (r) => `${(100 * r.layers).toFixed(1)}%` },
      { title: "share of tokens", kind: "number", value: (r) => r.tokens, show: (r) => `${(100 * r.tokens).toFixed(1)}%` },
      { title: "most in one site", kind: "number", value: (r) => r.most, show: (r) => `${(100 * r.most).toFixed(1)}%` },
    ], rows, { label: "outlier channels" }).sort(1);
  };
  byId("width-choice").addEventListener("change", draw);
  draw();
}

function fillRuntime() {
  byId("runtime-note").textContent = facts.runtime.length ? facts.runtime_note : "not measured: inspect with data (--text FILE, or data=[...])";
  if (!facts.runtime.length) return;
  chart("chart-runtime", runtimeChart(facts.runtime));
  table(byId("runtime-table"), [
    { title: "name", kind: "name", value: (r) => r.name }, { title: "op", kind: "name", value: (r) => r.op }, { title: "implementation", value: (r) => r.implementation },
    { title: "calls", kind: "number", value: (r) => r.calls },
    { title: "ms", kind: "number", value: (r) => r.seconds, show: (r) => (r.seconds * 1e3).toFixed(3) },
    { title: "kB of constants", kind: "number", value: (r) => r.bytes, show: (r) => r.bytes ? (r.bytes / 1e3).toFixed(0) : "–" },
    { title: "nodes", kind: "name", value: (r) => r.nodes.length, show: (r) => nodesLink(r) },
    { title: "site", value: (r) => r.site, show: (r) => siteLink(r.site) },
  ], facts.runtime, { label: "what ran", filter: { title: "implementations", value: (r) => r.implementation } });
}

function fillSchemes() {
  const original = Number(facts.settings["seconds, original"] ?? 0);
  if (!facts.schemes.length) {
    byId("schemes-table").append(make("p", { class: "empty" }, "not measured: inspect with data (--text FILE, or data=[...])"));
    return;
  }
  chart("chart-schemes", schemesChart(facts.schemes, original));
  table(byId("schemes-table"), [
    { title: "scheme", value: (p) => p.name },
    { title: "output dB", kind: "number", value: (p) => p.sqnr, show: (p) => decibels(p.sqnr), level: (p) => level(p.sqnr) },
    { title: "ms, node by node", kind: "number", value: (p) => p.seconds, show: (p) => (p.seconds * 1e3).toFixed(1) },
    { title: "of original", kind: "number", value: (p) => p.seconds / original, show: (p) => (p.seconds / original).toFixed(2) },
    { title: "MB of weights", kind: "number", value: (p) => p.bytes, show: (p) => (p.bytes / 1e6).toFixed(1) },
  ], facts.schemes, { label: "schemes" });
}

const FILL = { overview: fillOverview, graph: () => fillGraph(), site: fillSite, depth: fillDepth, outliers: fillOutliers, runtime: fillRuntime, schemes: fillSchemes };

function openTab(name) {
  for (const tab of byId("tabs").children) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (!opened.has(name)) { opened.add(name); FILL[name](); }
  else if (name === "site") drawSite();
}

async function start() {
  facts = JSON.parse(await unpack("facts"));
  facts.sites.forEach((site, i) => { site.order = i; });
  const tabs = [...byId("tabs").children];
  tabs.forEach((tab) => tab.addEventListener("click", () => openTab(tab.getAttribute("aria-controls"))));
  byId("tabs").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = tabs[(tabs.indexOf(document.activeElement) + by + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
  byId("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  openTab(facts.first_stage ? "graph" : "overview");
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start();
