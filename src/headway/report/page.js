"use strict";
(() => {
  const table = document.getElementById("census");
  if (!table) return;
  const bodies = [...table.tBodies];  // one for each site: its row and its details stay together
  const heads = [...table.tHead.rows[0].cells];

  const value = (body, column) => body.rows[0].cells[column].dataset.value ?? "";
  const compare = (column, numeric) => (one, other) => {
    const [a, b] = [value(one, column), value(other, column)];
    if (!numeric) return a.localeCompare(b, undefined, { numeric: true });
    if (a === "" || b === "") return (a === "") - (b === "");  // what was not measured goes last
    return Number(a) - Number(b);
  };

  const sort = (column) => {
    const head = heads[column];
    const down = head.getAttribute("aria-sort") === "ascending";
    const numeric = head.dataset.numeric !== undefined;
    const by = compare(column, numeric);
    const ordered = [...bodies].sort((a, b) => {
      const unknown = numeric && (value(a, column) === "" || value(b, column) === "");
      return down && !unknown ? by(b, a) : by(a, b);
    });
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.append(...ordered);
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(column)));

  const box = document.getElementById("filter");
  const count = document.getElementById("count");
  const filter = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const body of bodies) {
      const hit = words.every((word) => body.dataset.find.includes(word));
      body.hidden = !hit;
      shown += hit;
    }
    count.textContent = words.length ? `${shown} of ${bodies.length} sites` : "";
  };
  box.addEventListener("input", filter);
  document.getElementById("tools").hidden = false;  // without scripts there is nothing to filter by
  filter();
})();
