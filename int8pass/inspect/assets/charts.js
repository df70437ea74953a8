"use strict";
// Charts as Vega-Lite specifications. The library is unpacked when the first chart is wanted.

async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

let vegaReady = null;

function vega() {
  vegaReady ??= unpack("vega").then((code) => import(URL.createObjectURL(new Blob([code], { type: "text/javascript" }))))
    .then(() => window.vegaEmbed);
  return vegaReady;
}

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(); }

function theme() {
  const [text, dim, line] = ["text", "dim", "line"].map(colour);
  return {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: line },
    axis: { labelColor: dim, titleColor: text, gridColor: line, domainColor: line, tickColor: line },
    legend: { labelColor: text, titleColor: text, labelLimit: 480 }, title: { color: text, anchor: "start", fontSize: 13 },
    mark: { color: colour("accent") }, text: { color: text },
  };
}

const drawn = new Map(); // figure id → [spec maker, view], for a change of theme

async function chart(id, spec) {
  const figure = byId(id);
  drawn.get(id)?.view?.finalize();
  if (!spec) {
    figure.replaceChildren();
    drawn.delete(id);
    return;
  }
  const embed = await vega();
  const made = spec();
  const result = await embed(figure, { $schema: "https://vega.github.io/schema/vega-lite/v6.json", ...made },
    { actions: false, renderer: "svg", config: theme(), mode: "vega-lite" });
  drawn.set(id, { spec, view: result });
}

async function redraw() { for (const [id, { spec }] of [...drawn]) await chart(id, spec); }

const SIZE = { width: "container", height: 240, autosize: { type: "fit-x", contains: "padding" } };

function channelChart(title, before, after, pool, marked) {
  return () => {
    const positive = [...before, ...after].filter((v) => v > 0);
    const floor = positive.length ? positive.reduce((a, b) => Math.min(a, b)) : 1e-6;
    const ceiling = positive.length ? positive.reduce((a, b) => Math.max(a, b)) : 1;
    const values = [];
    [["before smoothing", before], ["after smoothing", after]].forEach(([series, found]) => found.forEach((v, i) =>
      values.push({ channel: i * pool, value: Math.max(v, floor), floor: floor / 2, series })));
    const scale = { type: "log", domain: [floor / 2, ceiling * 2], nice: false };
    const x = { field: "channel", type: "quantitative", scale: { nice: false, domainMin: 0, domainMax: before.length * pool } };
    const color = { field: "series", type: "nominal", title: null, sort: null, legend: { orient: "bottom" },
      scale: { domain: ["before smoothing", "after smoothing"], range: [colour("bad"), colour("accent")] } };
    const tooltip = [{ field: "channel" }, { field: "value", format: ".3g" }, { field: "series" }];
    const rules = marked.map((channel) => ({ channel: Math.floor(channel / pool) * pool, floor: floor / 2 }));
    return {
      ...SIZE, title, layer: [
        ...(rules.length ? [{ data: { values: rules }, mark: { type: "rule", color: colour("fair"), opacity: 0.4, strokeWidth: 2 }, encoding: { x } }] : []),
        { data: { values: values.filter((row) => row.series === "after smoothing") }, mark: { type: "rule", strokeWidth: 1, opacity: 0.6 },
          encoding: { x, y: { field: "floor", type: "quantitative", scale, title: "max (log)" }, y2: { field: "value" }, color, tooltip } },
        { data: { values: values.filter((row) => row.series === "before smoothing") }, mark: { type: "point", filled: true, size: 7, opacity: 1 },
          encoding: { x, y: { field: "value", type: "quantitative", scale }, color, tooltip } },
      ],
    };
  };
}

function alphaChart(site) {
  if (!site.curve.length) return null;
  return () => {
    const values = site.curve.map(([alpha, sqnr]) => ({ alpha, sqnr }));
    const marks = [];
    if (site.errors.naive !== null) marks.push({ sqnr: site.errors.naive, name: "no smoothing" });
    if (site.errors.final !== null) marks.push({ sqnr: site.errors.final, name: "this recipe" });
    const y = { field: "sqnr", type: "quantitative", title: "SQNR, dB", scale: { zero: false } };
    return {
      ...SIZE, title: "Error against α, without outlier columns", layer: [
        { data: { values }, mark: { type: "line", point: true, strokeWidth: 2 },
          encoding: { x: { field: "alpha", type: "quantitative", title: "α" }, y,
            tooltip: [{ field: "alpha" }, { field: "sqnr", title: "dB" }] } },
        { data: { values: marks }, layer: [
          { mark: { type: "rule", strokeDash: [5, 4] }, encoding: { y, color: { field: "name", type: "nominal", title: null,
            legend: { orient: "bottom" }, scale: { domain: ["no smoothing", "this recipe"], range: [colour("bad"), colour("good")] } } } },
        ] },
      ],
    };
  };
}

function histogramChart(histogram) {
  if (!histogram) return null;
  return () => {
    const step = 2 * histogram.bound / histogram.counts.length;
    const values = histogram.counts.map((count, i) => ({ from: -histogram.bound + i * step, to: -histogram.bound + (i + 1) * step, floor: 0.5, count }))
      .filter((row) => row.count);
    const clip = histogram.clip ? histogram.clip.map((at) => ({ at })) : [];
    return {
      ...SIZE, title: "Quantizer input; red: mean clip range", layer: [
        { data: { values }, mark: { type: "rect" }, encoding: {
          x: { field: "from", type: "quantitative", title: "value" }, x2: { field: "to" },
          y: { field: "floor", type: "quantitative", title: "count (log)", scale: { type: "log" } }, y2: { field: "count" },
          tooltip: [{ field: "from", format: ".3g" }, { field: "to", format: ".3g" }, { field: "count" }] } },
        ...(clip.length ? [{ data: { values: clip }, mark: { type: "rule", color: colour("bad"), strokeWidth: 2 },
          encoding: { x: { field: "at", type: "quantitative" }, tooltip: [{ field: "at", title: "clip", format: ".4g" }] } }] : []),
      ],
    };
  };
}

function codesChart(histogram) {
  if (!histogram || !histogram.codes.length) return null;
  return () => {
    const total = histogram.codes.reduce((a, b) => a + b, 0);
    const used = histogram.codes.filter((n) => n > 0).length;
    const values = histogram.codes.map((count, i) => ({ code: i - 128, floor: 1e-8, share: count / total })).filter((row) => row.share);
    return {
      ...SIZE, title: `Codes in use: ${used} of 256`, data: { values }, mark: { type: "rule", color: colour("accent"), strokeWidth: 1.3 }, encoding: {
        x: { field: "code", type: "quantitative", scale: { domain: [-128, 127], nice: false } },
        y: { field: "floor", type: "quantitative", title: "share (log)", scale: { type: "log", domainMin: 1e-8 } }, y2: { field: "share" },
        tooltip: [{ field: "code" }, { field: "share", format: ".2%" }] },
    };
  };
}

function depthChart(sites) {
  const series = [["cumulative", "cumulative"], ["final", "this site alone, its own output"], ["naive", "the same without smoothing and columns"]];
  const values = sites.flatMap((site, i) => series.filter(([key]) => site.errors[key] !== null)
    .map(([key, name]) => ({ order: i, site: site.name, sqnr: site.errors[key], name })));
  if (!values.length) return null;
  return () => ({
    ...SIZE, height: 320, title: "Error of every site, in the order of the model", data: { values },
    mark: { type: "line", point: { size: 18 }, strokeWidth: 1.5 }, encoding: {
      x: { field: "order", type: "quantitative", title: "site" },
      y: { field: "sqnr", type: "quantitative", title: "SQNR, dB", scale: { zero: false } },
      color: { field: "name", type: "nominal", title: null, sort: null, legend: { orient: "bottom" },
        scale: { domain: series.map((s) => s[1]), range: [colour("bad"), colour("accent"), colour("mark")] } },
      tooltip: [{ field: "site" }, { field: "sqnr", title: "dB" }, { field: "name" }] },
  });
}

function aloneChart(sites) {
  const values = sites.map((site, i) => ({ order: i, site: site.name, pattern: site.producer, sqnr: site.errors.alone }))
    .filter((row) => row.sqnr !== null);
  if (!values.length) return null;
  return () => ({
    ...SIZE, height: 280, title: "Error of the model's output when one site alone is quantized (high bars hurt)",
    data: { values }, transform: [{ calculate: "pow(10, -datum.sqnr / 20)", as: "relative" }],
    mark: { type: "bar", width: { band: 0.8 } }, encoding: {
      x: { field: "order", type: "ordinal", title: "site", axis: { labelOverlap: true, labelAngle: 0 } },
      y: { field: "relative", type: "quantitative", title: "relative error", axis: { format: "%" } },
      color: { field: "pattern", type: "nominal", title: null, legend: { orient: "bottom" } },
      tooltip: [{ field: "site" }, { field: "sqnr", title: "dB" }, { field: "relative", format: ".3%" }] },
  });
}

function outlierChart(sites, width, order) {
  const values = sites.flatMap((site) => site.channels.above.map(([channel, share]) =>
    ({ channel, share, site: site.name, order: order.get(site.name) })));
  if (!values.length) return null;
  return () => ({
    ...SIZE, height: Math.max(220, Math.min(560, sites.length * 6)), title: "Tokens with |x| ≥ 6, by site and channel", data: { values },
    mark: { type: "square", size: 26, opacity: 0.9 }, encoding: {
      x: { field: "channel", type: "quantitative", scale: { domain: [0, width], nice: false } },
      y: { field: "order", type: "quantitative", title: "site, in the order of the model", scale: { reverse: true, nice: false } },
      color: { field: "share", type: "quantitative", title: "share of tokens", scale: { scheme: "goldorange", domain: [0, 1] }, legend: { format: "%" } },
      tooltip: [{ field: "site" }, { field: "channel" }, { field: "share", format: ".1%" }] },
  });
}

function runtimeChart(rows) {
  const values = rows.slice(0, 25).map((row) => ({ name: row.site ? `${row.op}  ${row.site}` : row.name, id: row.name, op: row.op, ms: row.seconds * 1e3, what: row.implementation, site: row.site }));
  return () => ({
    ...SIZE, height: Math.max(60, 17 * values.length), title: "The slowest", data: { values }, mark: "bar", encoding: {
      y: { field: "name", type: "nominal", sort: null, title: null, axis: { labelLimit: 380 } },
      x: { field: "ms", type: "quantitative", title: "milliseconds" },
      color: { field: "what", type: "nominal", title: null, legend: { orient: "bottom", columns: 4 } },
      tooltip: [{ field: "id", title: "name" }, { field: "op" }, { field: "ms", format: ".3f" }, { field: "what" }, { field: "site" }] },
  });
}

function schemesChart(points, original) {
  if (!points.length) return null;
  const values = points.map((p) => ({ name: p.name, sqnr: p.sqnr, ms: p.seconds * 1e3, mb: p.bytes / 1e6 }));
  return () => ({
    ...SIZE, height: 340, title: "Error against time: up and left is better; dashed: the original's time", layer: [
      { data: { values: original ? [{ ms: original * 1e3 }] : [] }, mark: { type: "rule", strokeDash: [5, 4], color: colour("mark") },
        encoding: { x: { field: "ms", type: "quantitative" } } },
      { data: { values }, mark: { type: "point", filled: true, size: 110 }, encoding: {
        x: { field: "ms", type: "quantitative", title: "milliseconds, node by node", scale: { zero: false } },
        y: { field: "sqnr", type: "quantitative", title: "output SQNR, dB", scale: { zero: false } },
        tooltip: [{ field: "name" }, { field: "sqnr", title: "dB" }, { field: "ms", format: ".1f" }, { field: "mb", title: "MB", format: ".1f" }] } },
      { data: { values }, mark: { type: "text", align: "left", dx: 9, dy: 1, color: colour("text") }, encoding: {
        x: { field: "ms", type: "quantitative" }, y: { field: "sqnr", type: "quantitative" }, text: { field: "name" } } },
    ],
  });
}
