"use strict";
document.documentElement.classList.add("js");
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// ---- tables: click on a heading to sort, the best first
const key = (row, column, kind) => {
  const cell = row.cells[column];
  if (kind === "text") return cell.textContent;
  const value = parseFloat(cell.dataset.v);
  return Number.isNaN(value) ? null : value;
};

function sort(heading, direction) {
  const body = heading.closest("table").tBodies[0];
  const kind = heading.dataset.kind;
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...body.rows].map((row) => [key(row, heading.cellIndex, kind), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (kind === "text" ? a.localeCompare(b) : a - b);
  });
  body.append(...rows.map(([, row]) => row));
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction);
}

const first = (heading) =>
  heading.dataset.kind === "text" || "lowFirst" in heading.dataset ? "ascending" : "descending";
const opposite = { ascending: "descending", descending: "ascending" };
for (const heading of all("th[data-kind]"))
  heading.querySelector("button").addEventListener("click", () =>
    sort(heading, opposite[heading.getAttribute("aria-sort")] ?? first(heading)));

// ---- one metric at a time, and only the scorers looked for
const metric = document.getElementById("metric");
function show() {
  document.body.dataset.metric = metric.value;
  for (const table of all("table.scores")) {
    const heading = table.querySelector(`th.m.${metric.value}`);
    if (heading) sort(heading, first(heading));
  }
}
metric.addEventListener("change", show);
show();

const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  for (const item of all("[data-scorer]")) item.hidden = !item.dataset.scorer.toLowerCase().includes(wanted);
});

// ---- tabs
for (const list of all("[role=tablist]")) {
  const tabs = all("[role=tab]", list);
  const panel = (tab) => document.getElementById(tab.getAttribute("aria-controls"));
  const select = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === chosen);
      tab.tabIndex = tab === chosen ? 0 : -1;
      panel(tab).hidden = tab !== chosen;
    }
  };
  tabs.forEach((tab, i) => {
    panel(tab).setAttribute("role", "tabpanel");
    panel(tab).setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", ({ key }) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      select(next);
      next.focus();
    });
  });
  if (tabs.length) select(tabs[0]);
}
