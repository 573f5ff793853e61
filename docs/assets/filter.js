// A table of the class "filtered": a choice of values above each column of few values, and a count of the rows shown.
function withFilters(table) {
  const rows = [...table.tBodies[0].rows];
  const chosen = new Map();
  const count = document.createElement("p");
  table.before(count);
  const show = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = [...chosen].some(([column, value]) => value && row.cells[column].textContent !== value);
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const values = [...new Set(rows.map((row) => row.cells[column].textContent))];
    if (values.length > 20) return;
    values.sort((a, b) => (isNaN(a - b) ? a.localeCompare(b) : a - b));
    const choice = document.createElement("select");
    choice.setAttribute("aria-label", head.textContent);
    for (const value of ["", ...values]) choice.add(new Option(value || "all", value));
    choice.addEventListener("change", () => { chosen.set(column, choice.value); show(); });
    head.append(choice);
  });
  show();
}
document.querySelectorAll("table.filtered").forEach(withFilters);
