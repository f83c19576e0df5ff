// The page begins.

function buildHeader() {
  const states = {};
  for (const each of EXPERIMENTS) states[each.state] = (states[each.state] ?? 0) + 1;
  const numbers = ['finished', 'running', 'queued', 'failed'].filter((state) => states[state]).map((state) => `${states[state]} ${state}`);
  byId('project').textContent = DATA.project;
  document.title = `${DATA.project}: experiments`;
  byId('about').textContent = `Experiments ${DATA.scope}: ${numbers.join(', ')}. Made ${date(DATA.made)}.`;
  const best = EXPERIMENTS[0];
  if (!best?.metrics.some(isThere)) return;
  const compared = EXPERIMENTS.filter((each) => each.equal !== undefined);
  const equal = compared.filter((each) => each.equal).length;
  const said = !compared.length ? '' : equal
    ? `${counted(equal, 'other')} of ${compared.length} can’t be told from it on these ${best.n} pictures: marked ≈ best.`
    : `All ${compared.length} others are shown to be worse on these ${best.n} pictures.`;
  const figures = [
    ...DATA.metrics.filter((name) => SHOWN_FIRST.includes(name)).slice(0, 4).map((name) => [name, fixed(columnOf(name).of(best))]),
    ['training', seconds(best.seconds)],
    ['model', bytes(best.size)],
  ].filter(([, value]) => value !== '–');
  byId('best').append(el('div', { class: 'card' },
    el('div', {}, el('p', { class: 'quiet' }, 'Best'), el('button', { class: 'open title', onclick: () => openDetails(best) }, best.name),
      said ? el('p', { class: 'quiet' }, said) : null),
    el('dl', {}, figures.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value))))));
}

buildHeader();
buildTools();
table.ticked = new Set(withCurves(EXPERIMENTS).slice(0, 5));
buildTable();
buildCurves();
buildParallel();
buildScatter();
buildCompare();
drawAll();
byId('details').addEventListener('click', (event) => { if (event.target === byId('details')) byId('details').close(); });
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawAll);
