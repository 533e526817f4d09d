"use strict";
// Sorts a table by a click on a column's head: up, down, as it was. The order is kept in the address,
// #sort=recipes,4 or #sort=recipes,4,down (columns counted from 1), so that a link shows what its sender saw.

function compare(a, b) {
  if (a === "" || b === "") return 0; // the caller has put those last
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
}

function sortTable(table, column, direction) {
  const body = table.querySelector("tbody.free");
  const heads = table.tHead.rows[0].cells;
  if (!body || !heads[column]) return;
  const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
  const rows = Array.from(body.rows);
  rows.sort((a, b) => {
    const places = a.dataset.place - b.dataset.place;
    if (direction === "none") return places;
    const [x, y] = [key(a), key(b)];
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1;
    return (direction === "descending" ? -1 : 1) * compare(x, y) || places;
  });
  body.append(...rows);
  Array.from(heads).forEach((head, i) => head.setAttribute("aria-sort", i === column ? direction : "none"));
}

function fromAddress() {
  const match = /^#sort=([\w-]+),(\d+)(,down)?$/.exec(location.hash);
  const table = match && document.getElementById(match[1]);
  if (!table || table.tagName !== "TABLE") return;
  sortTable(table, Number(match[2]) - 1, match[3] ? "descending" : "ascending");
  table.scrollIntoView();
}

document.querySelectorAll("table.sortable").forEach((table) => {
  Array.from(table.querySelector("tbody.free").rows).forEach((row, place) => (row.dataset.place = place));
  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      sortTable(table, column, next);
      const order = { ascending: "", descending: ",down" }[next];
      const address = order === undefined ? "#" + table.id : `#sort=${table.id},${column + 1}${order}`;
      history.replaceState(null, "", address);
    });
  });
});
window.addEventListener("hashchange", fromAddress);
fromAddress();
