// The leaderboard: sorts, filters, and shows the epochs of an experiment under its row.

const SHOWN_FIRST = ['eval.acc', 'val_acc', 'val_loss', 'eval.f1', 'eval.auroc', 'eval.ece', 'test.acc'];
const MOST_SETTINGS = 8;  // columns that are there without asking

const table = {
  sortedBy: null,  // a column, or null: as ranked
  direction: 1,
  columns: new Set(COLUMNS.filter(shownAtFirst).map((column) => column.name)),
  rows: new Map(),  // experiment → its <tr>
  shown: EXPERIMENTS,  // that pass the filter, in the table's order
  ticked: new Set(),
};

function shownAtFirst(column) {
  if (column.kind === 'setting') return DATA.params.indexOf(column.name) < MOST_SETTINGS;
  if (column.name === 'epochs') return !DATA.params.includes('num_epochs');
  if (column.name === 'val_acc') return EXPERIMENTS.some((each) => column.of(each) !== columnOf('eval.acc')?.of(each));
  return column.kind === 'cost' || SHOWN_FIRST.includes(column.name);
}

const visibleColumns = () => COLUMNS.filter((column) => table.columns.has(column.name));

function buildTable() {
  const opened = EXPERIMENTS.filter((each) => table.rows.get(each)?.epochs);
  const columns = visibleColumns();
  const head = el('tr', {}, headerCell(null, 'experiment'), columns.map((column) => headerCell(column, column.name)));
  const body = el('tbody');
  byId('leaderboard').replaceChildren(
    el('table', { class: 'board' }, el('caption', { class: 'hidden' }, 'Experiments, the best first'), el('thead', {}, head), body),
  );
  table.rows = new Map(EXPERIMENTS.map((each) => [each, row(each, columns)]));
  fillTable();
  for (const each of opened) toggleEpochs(each, table.rows.get(each).querySelector('.twist'));
}

function headerCell(column, name) {
  const numeric = column && isNumeric(column);
  const button = el('button', { onclick: () => sortBy(column) }, breakable(name));
  return el('th', { scope: 'col', class: [numeric ? 'number' : '', column?.kind ?? 'name'].join(' '), 'data-name': name }, button);
}

function sortBy(column) {
  const best = column && LOWER_IS_BETTER.test(column.name) ? 1 : -1;
  const first = !column || column.kind === 'setting' ? 1 : best;
  const again = table.sortedBy === (column ?? 'name');
  table.direction = again ? -table.direction : first;
  table.sortedBy = column ?? 'name';
  fillTable();
}

/** Put the rows into the table's order, those that pass the filter, and have the charts follow. */
function fillTable() {
  const passes = filterOf(byId('filter').value);
  const { sortedBy, direction } = table;
  const value = sortedBy === 'name' ? (each) => each.name : sortedBy?.of;
  table.shown = EXPERIMENTS.filter(passes);
  if (value) table.shown.sort((one, other) => ordered(value(one), value(other), direction) || one.rank - other.rank);
  const body = byId('leaderboard').querySelector('tbody');
  body.replaceChildren(...table.shown.flatMap((each) => [table.rows.get(each), table.rows.get(each).epochs].filter(Boolean)));
  if (!table.shown.length) body.append(el('tr', {}, el('td', { colspan: 99, class: 'nothing' }, 'No experiment is like that.')));
  for (const cell of byId('leaderboard').querySelectorAll('thead th')) {
    const sorted = (sortedBy?.name ?? (sortedBy === 'name' ? 'experiment' : null)) === cell.dataset.name;
    if (sorted) cell.setAttribute('aria-sort', direction > 0 ? 'ascending' : 'descending');
    else cell.removeAttribute('aria-sort');
  }
  const [shown, all] = [table.shown.length, EXPERIMENTS.length];
  byId('count').textContent = shown === all ? counted(all, 'experiment') : `${shown} of ${counted(all, 'experiment')}`;
  drawAll();
}

function row(experiment, columns) {
  const name = experiment.name;
  const tick = el('input', {
    type: 'checkbox', 'aria-label': `Curve of ${name}`, title: 'bold among the curves', checked: table.ticked.has(experiment),
    onchange: (event) => { setTicked(experiment, event.target.checked); drawAll(); },
  });
  const twist = el('button', {
    class: 'twist', 'aria-expanded': 'false', 'aria-label': `Epochs of ${name}`, disabled: !experiment.epochs.step,
    onclick: (event) => toggleEpochs(experiment, event.currentTarget),
  });
  const open = el('button', { class: 'open', onclick: () => openDetails(experiment), title: name }, name);
  const cells = columns.map((column) => {
    const value = column.of(experiment);
    const numeric = typeof value === 'number' || !isThere(value);
    return el('td', { class: [numeric ? 'number' : '', column.kind, isThere(value) ? '' : 'none'].join(' ') }, column.show(value));
  });
  return el('tr', { class: experiment.state }, el('th', { scope: 'row', class: 'name' },
    el('div', {}, tick, twist, open, badge(experiment))), cells);
}

/** What is to be said of an experiment in a word, or null. */
function badge(experiment) {
  if (experiment.state !== 'finished') return el('span', { class: `badge ${experiment.state}` }, experiment.state);
  if (!experiment.rank && experiment.metrics.some(isThere)) return el('span', { class: 'badge best' }, 'best');
  if (!experiment.equal) return null;
  const why = 'On these pictures it can’t be told from the best: its lead may be chance.';
  return el('span', { class: 'badge equal', title: why }, '≈ best');
}

function setTicked(experiment, isTicked) {
  if (isTicked) table.ticked.add(experiment);
  else table.ticked.delete(experiment);
  const box = table.rows.get(experiment)?.querySelector('input');
  if (box) box.checked = isTicked;
}

function tickOnly(experiments) {
  for (const each of EXPERIMENTS) setTicked(each, experiments.includes(each));
  drawAll();
}

function toggleEpochs(experiment, button) {
  const row = table.rows.get(experiment);
  const isOpen = button.getAttribute('aria-expanded') === 'true';
  button.setAttribute('aria-expanded', String(!isOpen));
  row.epochs?.remove();
  row.epochs = isOpen ? null : el('tr', { class: 'epochs' }, el('td', { colspan: 99 }, epochsTable(experiment)));
  if (row.epochs) row.after(row.epochs);
}

const EPOCH_COLUMNS = ['step', 'loss', 'acc', 'val_loss', 'val_acc', 'lr', 'training_time'];

function epochsTable(experiment) {
  const names = Object.keys(experiment.epochs);
  const columns = [...EPOCH_COLUMNS.filter((name) => names.includes(name)), ...names.filter((name) => !EPOCH_COLUMNS.includes(name))];
  const shows = { step: written, lr: number, training_time: seconds };
  const best = bestEpoch(experiment);
  const rows = experiment.epochs.step.map((_, index) => el('tr', { class: index === best ? 'best' : '' }, columns.map((name) => {
    const value = experiment.epochs[name][index];
    return el('td', { class: 'number' }, isThere(value) ? (shows[name] ?? fixed)(value) : '–');
  })));  // bold: the epoch with the highest val_acc
  return el('table', { class: 'inner' }, el('caption', { class: 'hidden' }, `Epochs of ${experiment.name}`),
    el('thead', {}, el('tr', {}, columns.map((name) => el('th', { scope: 'col', class: 'number' }, name)))), el('tbody', {}, rows));
}

/** The index of the epoch with the highest val_acc, the first of them. */
function bestEpoch(experiment) {
  const values = experiment.epochs.val_acc ?? [];
  return values.indexOf(Math.max(...values.filter(isThere)));
}

function buildTools() {
  byId('filter').addEventListener('input', fillTable);
  byId('columns').querySelector('.choices').append(...COLUMNS.map((column) => el('label', {}, el('input', {
    type: 'checkbox', checked: table.columns.has(column.name),
    onchange: (event) => {
      if (event.target.checked) table.columns.add(column.name);
      else table.columns.delete(column.name);
      buildTable();
    },
  }), ' ', column.name)));
  const groups = [
    ['the best five', () => withCurves(EXPERIMENTS).slice(0, 5)],
    ['the best and its equals', () => withCurves(EXPERIMENTS).filter((each) => !each.rank || each.equal)],
    ['all that the filter shows', () => withCurves(table.shown)],
    ['none', () => []],
  ];
  byId('ticks').querySelector('.choices').append(...groups.map(([text, chosen]) => el('button', {
    onclick: () => { tickOnly(chosen()); byId('ticks').open = false; byId('ticks').querySelector('summary').focus(); },
  }, text)));
  for (const menu of document.querySelectorAll('.menu')) {
    menu.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') { menu.open = false; menu.querySelector('summary').focus(); }
    });
    document.addEventListener('click', (event) => { if (!menu.contains(event.target)) menu.open = false; });
  }
}

const withCurves = (experiments) => experiments.filter((each) => each.epochs.step);
