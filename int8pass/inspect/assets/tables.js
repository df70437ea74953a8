"use strict";
// Small helpers, and tables that sort, search and filter.

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const byId = (id) => document.getElementById(id);

function decibels(value) { return value === null || value === undefined ? "–" : value.toFixed(1); }

function short(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

/* columns: {title, value(row), show(row) -> text or node, kind: "number" | "text" | "name" | "", level(row) -> class}
   options: {filter: {title, value(row)}, label} */
function table(parent, columns, rows, options = {}) {
  let sorted = { column: -1, down: false };
  const search = make("input", { type: "search", placeholder: "search", "aria-label": `search ${options.label}` });
  const count = make("span", { class: "hint" });
  const bar = make("div", { class: "bar" }, search);
  let choice = null;
  if (options.filter) {
    const values = [...new Set(rows.map(options.filter.value))].filter(Boolean).sort();
    choice = make("select", { "aria-label": `filter by ${options.filter.title}` },
      make("option", { value: "" }, `all: ${options.filter.title}`), ...values.map((v) => make("option", { value: v }, v)));
    choice.addEventListener("change", fill);
    bar.append(choice);
  }
  bar.append(count);
  const body = make("tbody");
  const heads = columns.map((column, i) => make("th", { scope: "col", "aria-sort": "none", class: column.kind || null },
    make("button", { type: "button", onclick: () => sort(i) }, column.title)));
  const text = new Map(rows.map((row) => [row, columns.map((c) => plain(c.show ? c.show(row) : c.value(row))).join(" ").toLowerCase()]));

  function plain(value) { return value instanceof Node ? value.textContent : String(value ?? ""); }

  function sort(i) {
    sorted = { column: i, down: sorted.column === i ? !sorted.down : columns[i].kind === "number" && !columns[i].worstFirst };
    heads.forEach((head, k) => {
      head.setAttribute("aria-sort", k !== i ? "none" : sorted.down ? "descending" : "ascending");
      head.firstChild.textContent = columns[k].title + (k !== i ? "" : sorted.down ? " ▾" : " ▴");
    });
    fill();
  }

  function fill() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = rows.filter((row) => wanted.every((word) => text.get(row).includes(word)));
    if (choice && choice.value) shown = shown.filter((row) => options.filter.value(row) === choice.value);
    if (sorted.column >= 0) {
      const value = columns[sorted.column].value;
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || x === undefined) return 1; // what was not measured comes last either way
        if (y === null || y === undefined) return -1;
        return (x < y ? -1 : x > y ? 1 : 0) * (sorted.down ? -1 : 1);
      };
      shown = [...shown].sort(compare);
    }
    body.replaceChildren(...shown.map((row) => make("tr", {}, ...columns.map((column) => {
      const level = column.level ? column.level(row) : "";
      const shownValue = column.show ? column.show(row) : column.value(row);
      const title = column.kind === "name" && !(shownValue instanceof Node) ? String(shownValue ?? "") : null;
      return make("td", { class: `${column.kind || ""} ${level}`.trim() || null, title }, shownValue ?? "–");
    }))));
    count.textContent = shown.length === rows.length ? `${rows.length}` : `${shown.length} of ${rows.length}`;
  }

  search.addEventListener("input", fill);
  parent.replaceChildren(bar, make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": options.label },
    make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body)));
  fill();
  return { sort };
}
