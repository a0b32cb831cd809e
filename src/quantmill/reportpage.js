"use strict";
// The page is complete without this: it adds moving between cells, sorting, a filter, a download.
(function () {
  document.querySelectorAll("table.map").forEach(function (map) {
    const readout = map.closest("figure").querySelector(".readout");
    const rows = Array.from(map.tBodies[0].rows, function (row) { return Array.from(row.cells).slice(1); });
    let row = 0, column = 0;
    function tell(cell) { readout.textContent = cell.title || cell.getAttribute("aria-label") || ""; }
    function go(r, c) {
      if (!rows[r] || !rows[r][c]) return;
      rows[row][column].tabIndex = -1;
      row = r; column = c;
      rows[r][c].tabIndex = 0;
      rows[r][c].focus();
    }
    rows.flat().forEach(function (cell) {
      cell.tabIndex = -1;
      cell.addEventListener("mouseenter", function () { tell(cell); });
      cell.addEventListener("focus", function () { tell(cell); });
    });
    if (rows[0] && rows[0][0]) rows[0][0].tabIndex = 0;
    map.addEventListener("keydown", function (event) {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      go(row + step[0], column + step[1]);
    });
  });
  document.querySelectorAll("table.every").forEach(function (table) {
    const body = table.tBodies[0];
    Array.from(table.tHead.rows[0].cells).forEach(function (head, index) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", function () {
        const up = head.getAttribute("aria-sort") !== "ascending";
        Array.from(head.parentNode.cells).forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = Array.from(body.rows, function (row, at) { return [row.cells[index].dataset.v, row, at]; });
        rows.sort(function (a, b) {
          const order = a[0] === undefined || b[0] === undefined || isNaN(a[0]) || isNaN(b[0])
            ? String(a[0]).localeCompare(String(b[0]), "en", { numeric: true }) : a[0] - b[0];
          return (up ? order : -order) || a[2] - b[2];
        });
        body.append.apply(body, rows.map(function (row) { return row[1]; }));
      });
    });
    const tools = document.createElement("div"), filter = document.createElement("input");
    tools.className = "tools";
    filter.type = "search";
    filter.placeholder = "Filter by name, format or reason";
    filter.setAttribute("aria-label", filter.placeholder);
    filter.addEventListener("input", function () {
      const wanted = filter.value.toLowerCase();
      Array.from(body.rows).forEach(function (row) { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
    });
    tools.append(filter);
    table.closest(".scroll").before(tools);
  });
  const save = document.createElement("button");
  save.type = "button";
  save.textContent = "Save the data as JSON";
  save.addEventListener("click", function () {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("report").textContent], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 1000);
  });
  document.querySelector("footer").append(save);
})();
