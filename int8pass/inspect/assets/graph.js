"use strict";
// The graph: modules that open and close, chains of nodes as one box, quantize/dequantize as badges on edges.
// Layout by dagre; everything that can be clicked can be reached and pressed with the keyboard.

const HIDDEN = new Set(["constant", "getitem", "dequantize_weight", "dequantize_weight_groups"]);
const isPair = (op) => /^(quantize|dequantize|outlier_split)/.test(op) && !op.startsWith("dequantize_weight");
const ROW = 18, LETTER = 7.3, FAN = 8;

const view = { stage: null, open: new Set([""]), chosen: null, box: null, graph: null };
const models = new Map(); // stage → model

function nodesOf(stage) {
  const index = Object.fromEntries(facts.node_fields.map((name, i) => [name, i]));
  return stage.nodes.map((row) => Object.fromEntries(facts.node_fields.map((name) => [name, row[index[name]]])));
}

/* Nodes to show, edges between them through what is hidden, and the tree of modules. */
function modelOf(stage) {
  const nodes = nodesOf(stage), byName = new Map(nodes.map((n) => [n.name, n]));
  const constant = new Set(), weights = new Map();
  for (const node of nodes) {
    if (node.op === "constant" || (node.inputs.length && node.inputs.every((i) => constant.has(i)))) constant.add(node.name);
  }
  const hidden = (n) => HIDDEN.has(n.op) || isPair(n.op) || constant.has(n.name);
  const memo = new Map();
  function origins(name) { // visible producers of a value, and the site of a quantize on the way
    if (memo.has(name)) return memo.get(name);
    const node = byName.get(name);
    let found = [];
    if (!node || constant.has(name)) found = [];
    else if (!hidden(node)) found = [[name, ""]];
    else found = node.inputs.flatMap(origins).map(([from, site]) => [from, isPair(node.op) ? node.site || "?" : site]);
    memo.set(name, found);
    return found;
  }
  const edges = new Map();
  for (const node of nodes) {
    if (hidden(node)) continue;
    for (const input of node.inputs) for (const [from, site] of origins(input)) {
      const key = `${from}\n${node.name}`;
      if (!edges.has(key) || site) edges.set(key, { from, to: node.name, site });
    }
    weights.set(node.name, node.inputs.filter((i) => constant.has(i)));
  }
  const shown = nodes.filter((n) => !hidden(n));
  const groups = new Map([["", { path: "", parent: null, sites: new Set(), count: 0 }]]);
  for (const node of shown) {
    node.groups = groupsOf(node.module);
    let parent = "";
    for (const path of node.groups) {
      if (!groups.has(path)) groups.set(path, { path, parent, sites: new Set(), count: 0 });
      parent = path;
    }
    for (const path of ["", ...node.groups]) {
      groups.get(path).count += 1;
      if (node.site) groups.get(path).sites.add(node.site);
    }
  }
  return { nodes, byName, shown, edges: [...edges.values()], groups, weights, hidden };
}

/* "model.layers.0.mlp" → ["model", "model.layers.0", "model.layers.0.mlp"]: a number belongs to the list it counts. */
function groupsOf(module) {
  const groups = [];
  let path = "";
  for (const part of module ? module.split(".") : []) {
    path = path ? `${path}.${part}` : part;
    if (/^\d+$/.test(part) && groups.length) groups[groups.length - 1] = path;
    else groups.push(path);
  }
  return groups;
}

const sqnrOf = (name) => facts.sites.find((s) => s.name === name)?.errors.final ?? facts.sites.find((s) => s.name === name)?.errors.weight ?? null;

/* What is visible now: boxes (closed modules and chains of nodes), edges between them, frames of open modules. */
function visible(model) {
  const place = new Map(), boxes = new Map(), frames = new Set();
  for (const node of model.shown) {
    const closed = node.groups.find((path) => !view.open.has(path));
    const home = closed ?? `\n${node.name}`;
    place.set(node.name, home);
    const parents = closed ? node.groups.slice(0, node.groups.indexOf(closed)) : node.groups;
    parents.forEach((path) => frames.add(path));
    if (!boxes.has(home)) boxes.set(home, { id: home, module: closed ?? null, parent: parents.at(-1) ?? "", rows: [] });
    if (!closed) boxes.get(home).rows.push(node);
  }
  const lifted = new Map();
  for (const edge of model.edges) {
    const [from, to] = [place.get(edge.from), place.get(edge.to)];
    if (from === to) continue;
    const key = `${from}\r${to}`;
    const known = lifted.get(key) ?? { from, to, sites: new Set() };
    if (edge.site) known.sites.add(edge.site);
    lifted.set(key, known);
  }
  let edges = [...lifted.values()];
  const out = new Map();
  edges.forEach((e) => out.set(e.from, (out.get(e.from) ?? 0) + 1));
  const fans = new Set([...out].filter(([, n]) => n > FAN).map(([id]) => id));
  fans.forEach((id) => { boxes.get(id).fan = out.get(id); });
  edges = edges.filter((e) => !fans.has(e.from) || e.sites.size);
  chain(boxes, edges);
  return { boxes: [...boxes.values()], edges: downward([...boxes.keys()], edges.filter((e) => !e.gone)), frames: [...frames] };
}

/* Modules may feed each other; the layout wants no cycle, so what runs upwards is drawn as part of the way down. */
function downward(ids, edges) {
  const order = new Map(ids.map((id, i) => [id, i])), found = new Map();
  for (const edge of edges) {
    const up = order.get(edge.from) > order.get(edge.to), [from, to] = up ? [edge.to, edge.from] : [edge.from, edge.to];
    const known = found.get(`${from}\r${to}`) ?? { from, to, sites: new Set() };
    edge.sites.forEach((site) => known.sites.add(site));
    found.set(`${from}\r${to}`, known);
  }
  return [...found.values()].filter((e) => e.from !== e.to);
}

/* a → b becomes one box when a feeds b alone and b reads a alone, in one module, with nothing on the edge. */
function chain(boxes, edges) {
  const from = new Map(), to = new Map();
  for (const edge of edges) {
    from.set(edge.from, [...(from.get(edge.from) ?? []), edge]);
    to.set(edge.to, [...(to.get(edge.to) ?? []), edge]);
  }
  for (const edge of edges) {
    const [a, b] = [boxes.get(edge.from), boxes.get(edge.to)];
    const joins = a && b && a !== b && !a.module && !b.module && a.parent === b.parent && !edge.sites.size && !a.fan
      && from.get(edge.from).length === 1 && to.get(edge.to).length === 1;
    if (!joins) continue;
    edge.gone = true;
    a.rows.push(...b.rows);
    boxes.delete(b.id);
    a.fan ??= b.fan;
    const onward = from.get(b.id) ?? [];
    onward.forEach((e) => { e.from = a.id; });
    from.set(a.id, onward);
  }
}

const labelOf = (node) => `${node.op}${node.shape ? `  ${node.shape.length > 28 ? node.shape.slice(0, 27) + "…" : node.shape}` : ""}`;

function sizeOf(box) {
  const lines = box.module ? [moduleTitle(box), moduleNote(box)] : box.rows.map(labelOf);
  box.lines = lines;
  if (box.fan) lines.push(`→ ${box.fan} readers`);
  return { width: Math.max(60, ...lines.map((l) => l.length * LETTER + 18)), height: lines.length * ROW + 8 };
}

const moduleTitle = (box) => `▸ ${box.parent && box.module.startsWith(`${box.parent}.`) ? box.module.slice(box.parent.length + 1) : box.module}`;

function moduleNote(box) {
  const group = view.graph.groups.get(box.module), worst = [...group.sites].map(sqnrOf).filter((v) => v !== null);
  const error = worst.length ? `, worst ${decibels(Math.min(...worst))} dB` : "";
  return `${group.count} node${group.count === 1 ? "" : "s"}${group.sites.size ? `, ${group.sites.size} sites` : ""}${error}`;
}

function draw() {
  view.graph = models.get(view.stage) ?? modelOf(view.stage);
  models.set(view.stage, view.graph);
  const { boxes, edges, frames } = visible(view.graph);
  let nodes = boxes.map((box) => ({ v: box.id, ...sizeOf(box), parent: box.parent || undefined, box }));
  for (const path of frames) nodes.push({ v: path, width: 0, height: 0, parent: view.graph.groups.get(path).parent || undefined, frame: path });
  const linked = () => edges.map((edge) => {
    const badge = edge.sites.size ? badgeOf(edge.sites) : null;
    return { v: edge.from, w: edge.to, minlen: 1, weight: 1, width: badge ? badge.text.length * 6.6 + 10 : 0, height: badge ? 16 : 0,
      labeloffset: 4, labelpos: "r", badge };
  });
  const layout = { nodesep: 18, ranksep: 34 };
  if (nodes.length > 800) layout.ranker = "longest-path";
  let links = linked();
  try {
    dagre.layout(nodes, links, layout, {});
  } catch { // some nestings are more than dagre can do: the same boxes without frames
    nodes = boxes.map((box) => ({ v: box.id, ...sizeOf(box), box }));
    links = linked();
    dagre.layout(nodes, links, layout, {});
  }
  paint(nodes, links);
}

function badgeOf(sites) {
  const names = [...sites], values = names.map(sqnrOf).filter((v) => v !== null);
  const worst = values.length ? Math.min(...values) : null;
  return { names, text: worst === null ? "Q/DQ" : `Q/DQ ${decibels(worst)} dB`, level: level(worst) || "none" };
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function pressable(attributes, action) {
  return { ...attributes, tabindex: "0", role: "button",
    onclick: (event) => { event.stopPropagation(); if (!drag.moved) action(); },
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); action(); } } };
}

function paint(nodes, links) {
  const root = svg("g", { id: "scene" });
  const depth = (n) => groupsOf(n.frame).length;
  for (const node of nodes.filter((n) => n.frame !== undefined).sort((a, b) => depth(a) - depth(b))) {
    const [x, y] = [node.x - node.width / 2, node.y - node.height / 2];
    root.append(svg("g", pressable({ class: "frame", "data-module": node.frame, "aria-label": `close module ${node.frame}`, transform: `translate(${x},${y})` }, () => close(node.frame)),
      svg("rect", { width: node.width, height: node.height, rx: 8 }), svg("text", { x: 8, y: 13 }, `▾ ${node.frame}`)));
  }
  for (const link of links) {
    const points = link.points ?? [];
    root.append(svg("path", { class: "edge", d: curve(points), "marker-end": "url(#arrow)" }));
  }
  for (const node of nodes.filter((n) => n.box)) root.append(paintBox(node));
  for (const link of links.filter((l) => l.badge)) {
    const { badge } = link, width = badge.text.length * 6.6 + 10;
    const middle = link.x !== undefined ? link : link.points[Math.floor(link.points.length / 2)];
    root.append(svg("g", pressable({ class: `badge ${badge.level}`, "aria-label": `${badge.text}: ${badge.names.join(", ")}`, transform: `translate(${middle.x - width / 2},${middle.y - 8})` },
      () => describeSites(badge.names)), svg("rect", { width, height: 16, rx: 8 }), svg("text", { x: 5, y: 12 }, badge.text)));
  }
  const arrow = svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, svg("path", { d: "M0 0 L8 4 L0 8 z", fill: "currentColor" }));
  const canvas = svg("svg", { role: "group", "aria-label": `graph, ${view.stage.name}` }, svg("defs", {}, arrow), root);
  byId("canvas").replaceChildren(canvas);
  const xs = nodes.flatMap((n) => [n.x - n.width / 2, n.x + n.width / 2]), ys = nodes.flatMap((n) => [n.y - n.height / 2, n.y + n.height / 2]);
  const low = (v) => v.reduce((a, b) => Math.min(a, b), Infinity), high = (v) => v.reduce((a, b) => Math.max(a, b), -Infinity);
  view.bounds = nodes.length ? [low(xs) - 10, low(ys) - 10, high(xs) - low(xs) + 20, high(ys) - low(ys) + 20] : [0, 0, 100, 100];
  view.positions = new Map(nodes.map((n) => [n.v, n]));
  if (!view.box || !anythingIn(view.box)) fit(); else setBox(view.box);
}

/* False when a view shows no box: the graph became another one, or smaller. */
function anythingIn([x, y, width, height]) {
  return [...view.positions.values()].some((n) => n.box && n.x + n.width / 2 > x && n.x - n.width / 2 < x + width
    && n.y + n.height / 2 > y && n.y - n.height / 2 < y + height);
}

function paintBox(node) {
  const { box } = node, [x, y] = [node.x - node.width / 2, node.y - node.height / 2];
  const frame = svg("rect", { width: node.width, height: node.height, rx: 5 });
  const at = { transform: `translate(${x},${y})` };
  const lines = box.lines.map((line, i) => svg("text", { x: 9, y: 17 + i * ROW }, line));
  if (box.module) {
    const group = view.graph.groups.get(box.module);
    return svg("g", pressable({ ...at, class: `box module ${group.sites.size ? "site" : ""}`, "data-module": box.module, "aria-label": `open module ${box.module}` }, () => open(box.module)), frame, ...lines);
  }
  const rows = box.rows.map((row, i) => svg("g", pressable({ class: `row ${view.chosen === row.name ? "chosen" : ""}`, "data-node": row.name, "aria-label": `${row.op} ${row.name}` }, () => choose(row.name)),
    svg("rect", { x: 1, y: 4 + i * ROW, width: node.width - 2, height: ROW, rx: 3 }), lines[i]));
  return svg("g", { ...at, class: `box ${box.rows.some((r) => r.site) ? "site" : ""}` }, frame, ...rows, ...lines.slice(rows.length));
}

function curve(points) {
  if (!points.length) return "";
  let path = `M${points[0].x},${points[0].y}`;
  for (let i = 1; i < points.length; i++) {
    const [p, q] = [points[i - 1], points[i]], middle = (p.y + q.y) / 2;
    path += ` C${p.x},${middle} ${q.x},${middle} ${q.x},${q.y}`;
  }
  return path;
}

function open(path) {
  view.open.add(path);
  keepInView(path);
}

function close(path) {
  for (const other of [...view.open]) if (other === path || other.startsWith(`${path}.`)) view.open.delete(other);
  keepInView(path);
}

/* Redraw without moving what was pressed; the keyboard's focus stays on it. */
function keepInView(path) {
  const before = view.positions?.get(path), box = view.box;
  draw();
  const after = view.positions.get(path);
  if (before && after && box) {
    const shift = [after.x - before.x, (after.y - after.height / 2) - (before.y - before.height / 2)];
    const moved = [box[0] + shift[0], box[1] + shift[1], box[2], box[3]];
    if (anythingIn(moved)) setBox(moved);
    else fit();
  }
  byId("canvas").querySelector(`[data-module="${CSS.escape(path)}"]`)?.focus({ preventScroll: true });
}

function choose(name) {
  view.chosen = name;
  byId("canvas").querySelectorAll(".row.chosen").forEach((row) => row.classList.remove("chosen"));
  byId("canvas").querySelector(`[data-node="${CSS.escape(name)}"]`)?.classList.add("chosen");
  const model = view.graph, node = model.byName.get(name);
  const link = (other) => make("a", { href: "#graph", onclick: (event) => { event.preventDefault(); reveal(other); } }, other);
  const readers = model.nodes.filter((n) => n.inputs.includes(name)).map((n) => n.name);
  const list = (names) => { const span = make("span"); names.forEach((n, i) => span.append(i ? ", " : "", link(n))); return span; };
  const shown = { op: node.op, shape: node.shape, module: node.module || "–", source: node.source < 0 ? "unknown" : facts.sources[node.source],
    inputs: list(node.inputs), readers: list(readers), site: siteLink(node.site), "SQNR": node.site ? `${decibels(sqnrOf(node.site))} dB` : "–",
    implementation: node.implementation || "–", ...ranOf(view.stage.name, name) };
  const parts = [make("h3", {}, name), make("dl", {}, ...Object.entries(shown).flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)]))];
  parts.push(make("h4", {}, `Before (captured), ${node.module || "top level"}`), make("pre", {}, codeOf("captured", node, view.stage.graph)));
  parts.push(make("h4", {}, `Here (${view.stage.name})`), make("pre", {}, codeOf(view.stage.name, node, view.stage.graph)));
  if (view.stage.name !== "fused") parts.push(make("h4", {}, "After (fused)"), make("pre", {}, codeOf("fused", node, view.stage.graph)));
  byId("details").replaceChildren(...parts);
}

/* What the profiler saw of a node of the fused graph. */
function ranOf(stage, name) {
  const row = stage === "fused" ? facts.runtime.find((r) => r.nodes.includes(name)) : null;
  if (!row) return {};
  const each = `${(row.seconds / row.calls * 1e3).toFixed(3)} ms${row.calls > 1 ? `, mean of ${row.calls} calls` : ""}`;
  return { ran: `${row.name}: ${each}${row.nodes.length > 1 ? `, with ${row.nodes.length - 1} other nodes` : ""}`,
    constants: row.bytes ? `${(row.bytes / 1e3).toFixed(0)} kB` : "none" };
}

/* A node of the fused graph, from another tab. */
function showNode(name) {
  const index = facts.stages.findIndex((s) => s.name === "fused" && nodesOf(s).some((n) => n.name === name));
  if (index < 0) return;
  byId(`stage-${index}`).checked = true;
  setStage(facts.stages[index]);
  reveal(name);
}

/* The lines of a stage that belong to the module of a node (for a node without one, its own line). */
function codeOf(name, node, graph) {
  const stage = facts.stages.find((s) => s.name === name && s.graph === graph);
  if (!stage) return "not recorded";
  const model = models.get(stage) ?? modelOf(stage);
  models.set(stage, model);
  const lines = model.nodes.filter((n) => (node.module ? n.module === node.module : n.name === node.name)
    && !["constant", "input"].includes(n.op)).map((n) => n.code);
  return lines.length > 60 ? [...lines.slice(0, 60), `… ${lines.length - 60} more`].join("\n") : lines.join("\n") || "nothing: it went into another module's nodes";
}

function describeSites(names) {
  byId("details").replaceChildren(make("h3", {}, "Quantize / dequantize"), ...names.map((name) => {
    const site = facts.sites.find((s) => s.name === name);
    if (!site) return make("p", {}, name);
    const e = site.errors;
    return make("dl", {}, ...Object.entries({ site: siteLink(name), scheme: site.scheme, "outlier columns": site.columns, smoothing: site.smoothing || "none",
      "local SQNR": `${decibels(e.naive)} → ${decibels(e.smoothed)} → ${decibels(e.final)} dB`, cumulative: `${decibels(e.cumulative)} dB`, weights: `${decibels(e.weight)} dB`,
    }).flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)]));
  }));
}

/* Open the modules around a node and bring it to the middle. */
function reveal(name) {
  const model = view.graph;
  let node = model.byName.get(name);
  if (!node) return;
  if (model.hidden(node)) { choose(name); return; }
  node.groups.forEach((path) => view.open.add(path));
  draw();
  const row = byId("canvas").querySelector(`[data-node="${CSS.escape(name)}"]`);
  const at = view.positions.get(`\n${name}`) ?? [...view.positions.values()].find((n) => n.box?.rows.some((r) => r.name === name));
  if (at) setBox([at.x - 450, at.y - 320, 900, 640]);
  choose(name);
  row?.focus({ preventScroll: true });
}

function setBox(box) {
  view.box = box;
  byId("canvas").firstChild.setAttribute("viewBox", box.join(" "));
}

function fit() {
  const [x, y, width, height] = view.bounds, canvas = byId("canvas");
  const least = canvas.clientWidth || 900; // do not shrink text below reading size: show the top instead
  const tall = height / Math.max(1, canvas.clientHeight || 600), wide = width / least;
  const scale = Math.min(Math.max(tall, wide, 0.6), 1.6);
  const shown = least * scale, top = [...view.positions.values()].filter((n) => n.box).sort((a, b) => a.y - b.y)[0];
  // Where not all has room: where the graph begins.
  const left = shown >= width || !top ? x + width / 2 - shown / 2 : Math.min(Math.max(top.x - shown / 2, x), x + width - shown);
  setBox([left, y, shown, (canvas.clientHeight || 600) * scale]);
}

function zoom(factor, at = null) {
  const [x, y, w, h] = view.box, [cx, cy] = at ?? [x + w / 2, y + h / 2];
  setBox([cx - (cx - x) * factor, cy - (cy - y) * factor, w * factor, h * factor]);
}

const drag = { from: null, moved: false };

function bindCanvas() {
  const canvas = byId("canvas"), unit = () => view.box[2] / canvas.clientWidth;
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const frame = canvas.getBoundingClientRect();
    zoom(Math.exp(Math.sign(event.deltaY) * 0.15), [view.box[0] + (event.clientX - frame.left) * unit(), view.box[1] + (event.clientY - frame.top) * unit()]);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { drag.from = [event.clientX, event.clientY, ...view.box]; drag.moved = false; });
  addEventListener("pointermove", (event) => {
    if (!drag.from) return;
    const [dx, dy] = [event.clientX - drag.from[0], event.clientY - drag.from[1]];
    if (Math.abs(dx) + Math.abs(dy) < 4) return;
    drag.moved = true;
    setBox([drag.from[2] - dx * unit(), drag.from[3] - dy * unit(), view.box[2], view.box[3]]);
  });
  addEventListener("pointerup", () => { drag.from = null; setTimeout(() => { drag.moved = false; }); });
  canvas.addEventListener("keydown", (event) => {
    const step = view.box[2] / 10, [x, y, w, h] = view.box;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) { event.preventDefault(); setBox([x + moves[event.key][0], y + moves[event.key][1], w, h]); }
    else if (event.key === "+") zoom(0.8);
    else if (event.key === "-") zoom(1.25);
  });
}

function setStage(stage) {
  view.stage = stage;
  draw();
  byId("found").replaceChildren(...view.graph.shown.slice(0, 4000).map((n) => make("option", { value: n.name }, `${n.op} ${n.module}`)));
  if (view.chosen && view.graph.byName.has(view.chosen)) reveal(view.chosen);
}

function find(text) {
  const model = view.graph, wanted = text.toLowerCase();
  if (!wanted) return;
  const hit = model.byName.get(text) ?? model.shown.find((n) => n.module.toLowerCase() === wanted)
    ?? model.shown.find((n) => `${n.name} ${n.op} ${n.module}`.toLowerCase().includes(wanted));
  if (hit) reveal(hit.name);
}

/* Open modules until there is something to see, but not a wall of it. */
function openFirst(model) {
  view.open = new Set([""]);
  for (let round = 0; round < 4; round++) {
    const closed = new Set(model.shown.map((n) => n.groups.find((path) => !view.open.has(path))).filter(Boolean));
    if (closed.size > 3) break;
    closed.forEach((path) => view.open.add(path));
  }
}

function fillGraph() {
  if (!facts.stages.length) { byId("canvas").append(make("p", { class: "empty" }, "no graph was recorded")); return; }
  const many = facts.graphs > 1;
  facts.stages.forEach((stage, i) => {
    const input = make("input", { type: "radio", name: "stage", value: String(i), id: `stage-${i}`, onchange: () => setStage(stage) });
    byId("stages").append(make("label", { for: `stage-${i}` }, input, ` ${stage.name}${many ? ` (graph ${stage.graph + 1})` : ""}`));
  });
  const wanted = facts.stages.findIndex((s) => s.name === facts.first_stage);
  const first = wanted >= 0 ? wanted : Math.max(0, facts.stages.findIndex((s) => s.name === "quantized"));
  byId(`stage-${first}`).checked = true;
  models.set(facts.stages[first], modelOf(facts.stages[first]));
  openFirst(models.get(facts.stages[first]));
  bindCanvas();
  setStage(facts.stages[first]);
  byId("find").addEventListener("change", (event) => find(event.target.value));
  byId("expand").addEventListener("click", () => {
    const closed = new Set(view.graph.shown.map((n) => n.groups.find((path) => !view.open.has(path))).filter(Boolean));
    closed.forEach((path) => view.open.add(path));
    view.box = null;
    draw();
  });
  byId("collapse").addEventListener("click", () => { openFirst(view.graph); view.box = null; draw(); });
  byId("zoom-in").addEventListener("click", () => zoom(0.8));
  byId("zoom-out").addEventListener("click", () => zoom(1.25));
  byId("fit").addEventListener("click", fit);
}
