// Tables with "data-sortable": a click on a heading sorts, a field above filters by the first column.
document$.subscribe(() => {
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    if (table.dataset.ready) continue;
    table.dataset.ready = "yes";
    const body = table.tBodies[0];
    const filter = document.createElement("input");
    filter.type = "search";
    filter.className = "table-filter";
    filter.placeholder = filter.ariaLabel = "Filter by name, such as resnet";
    filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      for (const row of body.rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    });
    (table.closest(".md-typeset__scrollwrap") || table).before(filter);

    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const ascending = heading.ariaSort !== "ascending";
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.ariaSort = ascending ? "ascending" : "descending";
        body.append(...[...body.rows].sort((a, b) => compare(text(a), text(b), ascending)));
      });
      const text = (row) => row.cells[column].textContent;
    });
  }
});

// Numbers by value, words by letters, empty cells last in both directions.
function compare(a, b, ascending) {
  if (!a || !b) return !a - !b;
  const [x, y] = [a, b].map((text) => Number(text.replaceAll(",", "")));
  const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  return ascending ? order : -order;
}
