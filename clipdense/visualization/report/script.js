for (const heading of document.querySelectorAll("th")) {
  heading.addEventListener("click", () => {
    const column = heading.cellIndex, body = heading.closest("table").tBodies[0];
    const rising = heading.getAttribute("aria-sort") === "descending";
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.key;
    const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    const rows = [...body.rows].sort((first, second) => {
      const a = key(first), b = key(second);
      if (a === "" || b === "") return (a === "") - (b === "");
      return rising ? compare(a, b) : compare(b, a);
    });
    body.append(...rows);
  });
}
