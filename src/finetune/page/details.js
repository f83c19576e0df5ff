// One experiment in full, and what differs between two.

function openDetails(experiment) {
  const dialog = byId('details');
  const other = EXPERIMENTS.find((each) => each !== experiment && each.state === 'finished');
  const parts = [
    el('div', { class: 'heading' },
      el('h2', { id: 'details-title', tabindex: '-1' }, experiment.name, ' ', badge(experiment)),
      el('button', { class: 'close', 'aria-label': 'Close', onclick: () => dialog.close() }, '×')),
    facts(experiment),
    ...experiment.missing.map((text) => el('p', { class: 'warning' }, text)),
    ...reproduce(experiment),
    ...pictures(experiment),
    ...(other ? changesIn(experiment, other) : []),
    ...settingsOf(experiment),
  ];
  dialog.replaceChildren(...parts.filter(Boolean));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  byId('details-title').focus();
}

function facts(experiment) {
  const parent = EXPERIMENTS.find((each) => each.name === experiment.continues);
  const line = lineage(experiment);
  const facts = [
    ...DATA.metrics.map((name, index) => [name, experiment.metrics[index], fixed]),
    ['epochs', experiment.epochs.step?.length, written],
    ['seconds of training', experiment.seconds, seconds],
    ['model', experiment.size, bytes],
    ['finished', date(experiment.created) || null, String],
    ['git', experiment.revision.slice(0, 7) || null, String],
  ].filter(([, value]) => isThere(value));
  const entries = facts.map(([name, value, show]) => el('div', {}, el('dt', {}, name), el('dd', {}, show(value))));
  if (experiment.continues) {
    const link = parent ? el('button', { class: 'open', onclick: () => openDetails(parent) }, parent.name) : experiment.continues;
    entries.push(el('div', { class: 'wide' }, el('dt', {}, 'continues'), el('dd', {}, link, line.length > 1 ? ` (${line.join(' ← ')})` : '')));
  }
  return el('dl', { class: 'facts' }, entries);
}

/** The names of an experiment's ancestors, the nearest first, as far as they are in the report. */
function lineage(experiment) {
  const names = [];
  for (let each = experiment; each?.continues && !names.includes(each.continues);) {
    names.push(each.continues);
    each = EXPERIMENTS.find((other) => other.name === names.at(-1));
  }
  return names;
}

function reproduce(experiment) {
  if (!experiment.command.length) return [];
  const text = experiment.command.join('\n');
  const copy = el('button', {
    onclick: async () => {
      try {
        await navigator.clipboard.writeText(text);
        copy.textContent = 'copied';
      } catch {  // not allowed to a page that was opened as a file, in some browsers
        getSelection().selectAllChildren(code);
        copy.textContent = 'selected';
      }
      setTimeout(() => { copy.textContent = 'copy'; }, 2000);
    },
  }, 'copy');
  const code = el('code', {}, text);
  const again = experiment.state === 'finished' ? 'Run it again' : 'Run it';
  return [
    el('div', { class: 'heading' }, el('h3', {}, again), copy),
    el('pre', { tabindex: '0' }, code),
    el('p', { class: 'quiet' }, 'Where params.yaml is as committed: ', el('code', {}, 'git status'), ' tells.'),
  ];
}

function pictures(experiment) {
  if (experiment.pictures.length) {
    const shown = experiment.pictures.map(({ name, src }) => {
      const title = name.replaceAll('_', ' ');
      const fit = ({ target }) => target.parentElement.classList.toggle('wide', target.naturalWidth > 600);  // a sheet of many
      return el('figure', {}, el('img', { src, alt: `${title} of ${experiment.name}`, onload: fit }), el('figcaption', {}, title));
    });
    return [el('h3', {}, 'Pictures'), el('div', { class: 'pictures' }, shown)];
  }
  if (!experiment.leftOut) return [];
  return [el('h3', {}, 'Pictures'), el('p', { class: 'quiet' },
    `They are left out, to keep this file small. The best experiments have theirs; so has a report of this one alone: `,
    el('code', {}, `python src/report.py ${experiment.name}`))];
}

function settingsOf(experiment) {
  const values = { ...DATA.common };
  DATA.params.forEach((name, index) => { values[name] = experiment.settings[index]; });
  const rows = Object.keys(values).filter((name) => isThere(values[name]))
    .map((name) => el('tr', { class: DATA.params.includes(name) ? 'differs' : '' }, el('th', { scope: 'row' }, name), el('td', {}, written(values[name]))));
  if (!rows.length) return [];
  return [el('details', {}, el('summary', {}, 'All settings'), el('p', { class: 'quiet' }, 'Bold: not the same in all experiments here.'),
    el('table', { class: 'inner settings' }, el('tbody', {}, rows)))];
}

function changesIn(experiment, first) {
  const holder = el('div', {}, difference(first, experiment));
  const others = EXPERIMENTS.map((each, index) => [String(index), each.name]).filter(([index]) => EXPERIMENTS[index] !== experiment);
  const chosen = select('', others, String(first.rank), (index) => holder.replaceChildren(difference(EXPERIMENTS[index], experiment)));
  chosen.querySelector('select').setAttribute('aria-label', 'What is different from');
  return [el('div', { class: 'heading' }, el('h3', {}, 'What is different from '), chosen), holder];
}

// Two experiments -----------------------------------------------------------------------------------------------------

const pair = [];

function buildCompare() {
  if (EXPERIMENTS.length < 2) { byId('compare').hidden = true; return; }
  pair.push(EXPERIMENTS[0], EXPERIMENTS[1]);
  const choices = EXPERIMENTS.map((each, index) => [String(index), each.name]);
  const fill = () => byId('compared').replaceChildren(difference(...pair));
  const choose = (at) => (index) => { pair[at] = EXPERIMENTS[index]; fill(); };
  const selects = [select('', choices, '0', choose(0)), select('and ', choices, '1', choose(1))];
  selects.forEach((each, index) => each.querySelector('select').setAttribute('aria-label', ['first experiment', 'second experiment'][index]));
  byId('compare-tools').append(...selects);
  fill();
}

/** What differs between two experiments: results in words and numbers, settings, data and code. */
function difference(first, second) {
  if (first === second) return el('p', { class: 'quiet' }, 'Two different ones, please.');
  const parts = [];
  if (first.state === 'finished' && second.state === 'finished') {
    parts.push(el('div', { class: 'verdicts' }, verdicts(first, second).map(({ title, lines, left }) => el('div', {},
      title ? el('p', { class: 'quiet' }, title) : null, el('p', { class: 'says' }, lines.join('\n')),
      left?.length ? el('p', { class: 'quiet' }, `Not compared, as the other side lacks their seed or fold: ${left.slice(0, 5).join(', ')}${left.length > 5 ? ', …' : '.'}`) : null))));
  }
  const rows = [
    ...COLUMNS.filter((column) => column.kind === 'setting').filter((column) => exact(column.of(first)) !== exact(column.of(second)))
      .map((column) => [column, exact(column.of(first)), exact(column.of(second))]),
    ...COLUMNS.filter((column) => column.kind !== 'setting').filter((column) => isThere(column.of(first)) || isThere(column.of(second)))
      .map((column) => [column, column.show(column.of(first)), column.show(column.of(second))]),
  ];
  const body = rows.map(([column, one, other]) => el('tr', { class: column.kind },
    el('th', { scope: 'row' }, column.name), el('td', {}, one), el('td', {}, other)));
  const heads = ['', first.name, second.name].map((text) => el(text ? 'th' : 'td', text ? { scope: 'col' } : {}, text));
  parts.push(el('div', { class: 'scroll' }, el('table', { class: 'inner two' }, el('thead', {}, el('tr', {}, heads)), el('tbody', {}, body))));
  const areSame = rows.every(([column]) => column.kind !== 'setting');
  parts.push(el('div', {}, areSame ? el('p', {}, 'Their settings are the same.') : null,
    first.read.length && second.read.length ? inputs(first, second) : null));
  return el('div', { class: 'difference' }, parts);
}

/** What the stages read that is not the same: code and data, by the digests in dvc.lock. */
function inputs(first, second) {
  const files = (experiment) => Object.assign({}, ...experiment.read.flatMap((index) => Object.values(DATA.sets[index])));
  const [one, other] = [files(first), files(second)];
  const different = [...new Set([...Object.keys(one), ...Object.keys(other)])].filter((path) => one[path] !== other[path]).sort();
  const code = different.filter((path) => path.startsWith('src/'));
  const data = different.filter((path) => !path.startsWith('src/'));
  const isSame = (path) => first.made[path] && first.made[path] === second.made[path];
  const lines = [];
  if (code.length) lines.push(['Code differs: ', code.join(', ')]);
  else lines.push(['Code is the same.']);
  if (data.length) lines.push(['What was read differs: ', data.join(', ')]);
  if (first.made['data/prepared'] && second.made['data/prepared']) {
    lines.push([isSame('data/prepared') ? 'The prepared pictures are the same, to the bit.' : 'The prepared pictures are others.']);
  }
  if (isSame('models/model.safetensors')) lines.push(['The trained models are the same, to the bit.']);
  return lines.map(([text, ...paths]) => el('p', {}, text, ...paths.map((path) => el('code', {}, path))));
}
