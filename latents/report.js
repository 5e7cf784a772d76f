const body = document.querySelector('#index tbody'), rows = [...body.rows], query = document.getElementById('query');
const texts = new Map(rows.map(row => [row, (row.cells[0].textContent + ' ' + row.cells[1].textContent).toLowerCase()]));
let sorted = rows;
// 0: a whole word of the text, 1: the beginning of one, 2: part of one; as match_rank of latents/index.py.
function rank(text, word) {
  const begins = '(?<![\\p{L}\\p{N}_…])' + word.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&');
  const has = pattern => new RegExp(pattern, 'u').test(text);
  return has(begins + '(?![\\p{L}\\p{N}_…])') ? 0 : has(begins) ? 1 : 2;
}
function filter() {
  const words = query.value.toLowerCase().split(/\s+/).filter(word => word);
  let found = 0;
  const ranks = new Map(rows.map(row => {
    row.hidden = !words.every(word => texts.get(row).includes(word));
    found += !row.hidden;
    return [row, row.hidden ? 3 : Math.max(0, ...words.map(word => rank(texts.get(row), word)))];
  }));
  body.append(...[...sorted].sort((a, b) => ranks.get(a) - ranks.get(b)));
  document.getElementById('found').textContent = found.toLocaleString('en') + ' of ' + rows.length.toLocaleString('en');
}
query.addEventListener('input', filter);
document.querySelectorAll('#index th').forEach((head, column) => {
  let direction = column < 2 ? 1 : -1;
  head.addEventListener('click', () => {
    const key = row => row.cells[column].textContent;
    const compare = column === 1 ? (a, b) => key(a).localeCompare(key(b)) : (a, b) => (key(a) || -1) - (key(b) || -1);
    sorted = [...rows].sort((a, b) => direction * compare(a, b));
    direction = -direction;
    filter();
  });
});
filter();
