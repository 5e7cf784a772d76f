const body = document.querySelector('#index tbody'), rows = [...body.rows], query = document.getElementById('query');
const texts = rows.map(row => (row.cells[0].textContent + ' ' + row.cells[1].textContent).toLowerCase());
function filter() {
  const words = query.value.toLowerCase().split(/\s+/);
  let found = 0;
  rows.forEach((row, i) => { row.hidden = !words.every(word => texts[i].includes(word)); found += !row.hidden; });
  document.getElementById('found').textContent = found.toLocaleString('en') + ' of ' + rows.length.toLocaleString('en');
}
query.addEventListener('input', filter);
document.querySelectorAll('#index th').forEach((head, column) => {
  let direction = column < 2 ? 1 : -1;
  head.addEventListener('click', () => {
    const key = row => row.cells[column].textContent;
    const compare = column === 1 ? (a, b) => key(a).localeCompare(key(b)) : (a, b) => (key(a) || -1) - (key(b) || -1);
    body.append(...[...rows].sort((a, b) => direction * compare(a, b)));
    direction = -direction;
  });
});
filter();
