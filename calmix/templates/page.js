"use strict";
// A click on a column's head sorts the table by it, a second click reverses it; empty cells last.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const table = head.closest("table");
    const number = head.classList.contains("number");
    const orders = number ? ["descending", "ascending"] : ["ascending", "descending"];
    const order = orders.find((one) => one !== head.getAttribute("aria-sort"));
    for (const each of table.querySelectorAll("th[aria-sort]")) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const key = (row) => {
      const text = row.cells[head.cellIndex].textContent.trim();
      return number ? parseFloat(text.replace("−", "-").replace(/[,<]/g, "")) : text;
    };
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (!number) return sign * x.localeCompare(y);
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);
    });
    table.tBodies[0].append(...rows);
  });
}
// A table that is wider than the page says so; in a closed box it has no width yet.
const widths = new ResizeObserver((tables) => {
  for (const { target } of tables) {
    target.classList.toggle("wide", target.scrollWidth > target.clientWidth);
  }
});
for (const each of document.querySelectorAll(".scroll")) widths.observe(each);
