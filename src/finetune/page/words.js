// Numbers and values in words; elements of the page. Nothing here knows the page's parts.

const DATA = JSON.parse(document.getElementById('data').textContent);
const EXPERIMENTS = DATA.experiments.map((each, rank) => ({
  settings: [], metrics: [], epochs: {}, command: [], changed: [], read: [], made: {}, missing: [], pictures: [],
  revision: '', baseline: '', created: '', ...each, rank,
}));
const LOWER_IS_BETTER = /loss|ece|seconds|size|epochs/;

const byId = (id) => document.getElementById(id);

/** An element with attributes (onclick and so on among them), and children: elements, or text that stays text. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((each) => each !== null && each !== undefined));
  return made;
}

/** A name that may break behind its dots and underscores. */
function breakable(name) {
  return name.split(/(?<=[._])/).flatMap((part) => [part, el('wbr')]).slice(0, -1);
}

/** A <select> of [value, text] pairs. */
function select(label, choices, chosen, onchange) {
  const options = choices.map(([value, text]) => el('option', { value, selected: value === chosen }, text));
  return el('label', {}, el('span', {}, label), el('select', { onchange: (event) => onchange(event.target.value) }, options));
}

function written(value) {
  if (value === null || value === undefined) return '–';
  if (Array.isArray(value)) return `[${value.map(written).join(', ')}]`;
  return typeof value === 'number' ? number(value) : String(value);
}

/** A setting with all of its digits. */
function exact(value) {
  return typeof value === 'number' ? String(value) : written(value);
}

/** A number with four digits that count, and no more zeros than needed. */
function number(value) {
  if (Number.isInteger(value)) return String(value);
  return String(Number(value.toPrecision(4)));
}

/** Whether a text means the value: as the table writes it, or as the number that it is. */
function isWritten(value, text) {
  if (typeof value !== 'number') return written(value).toLowerCase() === text;
  return value === Number(text) || number(value) === text || fixed(value) === text;
}

function fixed(value) {
  if (value === null || value === undefined) return '–';
  return Math.abs(value) >= 1000 ? value.toPrecision(4) : value.toFixed(4);
}

function seconds(value) {
  if (value === null || value === undefined) return '–';
  if (value < 100) return `${value.toFixed(1)} s`;
  return value < 6000 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

function bytes(value) {
  if (value === null || value === undefined) return '–';
  const power = Math.min(3, Math.floor(Math.log10(Math.max(1, value)) / 3));
  const scaled = value / 1000 ** power;
  return `${scaled < 10 && power ? scaled.toFixed(1) : Math.round(scaled)} ${['B', 'kB', 'MB', 'GB'][power]}`;
}

function date(iso) {
  return iso ? iso.slice(0, 16).replace('T', ' ') : '';
}

function counted(count, what) {
  return `${count} ${what}${count === 1 ? '' : 's'}`;
}

/** A number with so many decimals; a tie goes to the even digit, as in Python. */
function decimals(value, digits) {
  const isTie = Math.abs(value * 2 ** (digits + 1)) % 2 === 1;
  return (isTie ? 2 * Math.round(value * 10 ** digits / 2) / 10 ** digits : value).toFixed(digits);
}

/** 'p = 0.27', with two digits that count. */
function pValue(p) {
  if (p < 1e-4) return 'p < 0.0001';
  const clean = Number(p.toPrecision(12));  // 0.125, and not the next number to it
  return `p = ${Number(decimals(clean, 1 - Math.floor(Math.log10(clean))))}`;
}

const differ = (value) => new Set(EXPERIMENTS.map(value)).size > 1;

// Columns -------------------------------------------------------------------------------------------------------------

const COLUMNS = [
  ...DATA.params.map((name, index) => ({ name, kind: 'setting', of: (each) => each.settings[index], show: written })),
  ...DATA.metrics.map((name, index) => ({ name, kind: 'metric', of: (each) => each.metrics[index], show: fixed })),
  ...(EXPERIMENTS.some((each) => each.continues) ? [{ name: 'continues', kind: 'cost', of: (each) => each.continues, show: written }] : []),
  ...(differ((each) => each.baseline) ? [{ name: 'commit', kind: 'cost', of: (each) => each.baseline.slice(0, 7) || null, show: written }] : []),
  { name: 'epochs', kind: 'cost', of: (each) => each.epochs.step?.length, show: written },
  { name: 'seconds', kind: 'cost', of: (each) => each.seconds, show: seconds },
  { name: 'size', kind: 'cost', of: (each) => each.size, show: bytes },
];
const columnOf = (name) => COLUMNS.find((column) => column.name === name);
const isThere = (value) => value !== null && value !== undefined;
const isNumeric = (column) => EXPERIMENTS.every((each) => !isThere(column.of(each)) || typeof column.of(each) === 'number');

/** Order two values: numbers by size, all else by text, what is not there last whatever the direction. */
function ordered(one, other, direction) {
  if (!isThere(one) || !isThere(other)) return isThere(other) - isThere(one);
  if (typeof one === 'number' && typeof other === 'number') return direction * (one - other);
  return direction * written(one).localeCompare(written(other), 'en', { numeric: true });
}

/** A test of experiments for a filter's text: words, name=value, name>number. */
function filterOf(text) {
  const tests = text.trim().split(/\s+/).filter(Boolean).map((word) => {
    const [, name, sign, limit] = word.match(/^([\w.]+)(<=|>=|<|>|=)(.+)$/) ?? [];
    const column = name && columnOf(name);
    if (column && sign === '=') return (each) => isThere(column.of(each)) && isWritten(column.of(each), limit.toLowerCase());
    if (column && !Number.isNaN(Number(limit))) {
      const compare = { '<': (a, b) => a < b, '>': (a, b) => a > b, '<=': (a, b) => a <= b, '>=': (a, b) => a >= b }[sign];
      return (each) => isThere(column.of(each)) && compare(column.of(each), Number(limit));
    }
    return (each) => searched(each).includes(word.toLowerCase());
  });
  return (each) => tests.every((test) => test(each));
}

function searched(experiment) {
  experiment.text ??= [experiment.name, experiment.state, experiment.revision.slice(0, 7), experiment.continues ?? '',
    ...COLUMNS.filter((column) => column.kind === 'setting').map((column) => `${column.name}=${written(column.of(experiment))}`),
  ].join(' ').toLowerCase();
  return experiment.text;
}
