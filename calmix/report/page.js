"use strict";
// Tabs: without this script every section is shown, one below the other.
const tabs = [...document.querySelectorAll("[role=tab]")];
function show(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
}
for (const [at, tab] of tabs.entries()) {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(at + step + tabs.length) % tabs.length];
    show(next);
    next.focus();
  });
}
if (tabs.length) {
  document.querySelector("[role=tablist]").hidden = false;
  show(tabs.find((tab) => tab.dataset.first !== undefined) ?? tabs[0]);
}

// Tables: a click sorts by that column, a second one the other way round; empty cells stay last.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const table = head.closest("table");
    const number = head.classList.contains("number");
    const first = number ? "descending" : "ascending";
    const other = number ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const each of table.querySelectorAll("th[aria-sort]")) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const key = (row) => row.cells[head.cellIndex].dataset.v ?? "";
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (number ? Number(x) - Number(y) : x.localeCompare(y));
    });
    table.tBodies[0].append(...rows);
  });
}

// What goes on to the right of its box fades out there, until scrolled to its end.
for (const box of document.querySelectorAll(".scroll")) {
  const mark = () =>
    box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  box.addEventListener("scroll", mark, { passive: true });
  new ResizeObserver(mark).observe(box);
}

// A filter hides what is the same everywhere; without this script all is shown.
for (const box of document.querySelectorAll("input[data-differ]")) {
  const alike = document.querySelectorAll(`#${box.dataset.differ} [data-same]`);
  const mark = () => alike.forEach((each) => { each.hidden = box.checked; });
  box.addEventListener("change", mark);
  box.closest("label").hidden = false;
  mark();
}
