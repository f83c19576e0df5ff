// The plots: learning curves, parallel coordinates, and any column over any other. They show what the table's filter does.

const redraws = [];
const drawAll = () => redraws.forEach((each) => each());

const LEFT = 58;  // px, for the numbers of the vertical axis
const rankMetric = DATA.metrics[0];
const hueOf = (index, colour) => colour.hues[index % colour.hues.length];
const dashOf = (index) => DASHES[Math.floor(index / 6) % DASHES.length];

// Learning curves -----------------------------------------------------------------------------------------------------

const curves = { name: null, log: false };

function buildCurves() {
  const names = [...new Set(EXPERIMENTS.flatMap((each) => Object.keys(each.epochs)))].filter((name) => name !== 'step');
  if (!names.length) return byId('curves').append(el('p', { class: 'nothing' }, 'No curve of these experiments is in DVC’s cache.'));
  curves.name = ['val_acc', 'val_loss'].find((name) => names.includes(name)) ?? names[0];
  const legend = el('div', { class: 'legend' });
  const redraw = chart(byId('curves'), {
    height: (width) => (width < NARROW ? 260 : 340),
    label: () => `${curves.name} over epochs of ${counted(withCurves(table.shown).length, 'experiment')}`,
    draw: drawCurves,
  });
  byId('curves-tools').append(
    select('curve ', names.map((name) => [name, name]), curves.name, (name) => { curves.name = name; redraw(); }),
    el('label', {}, el('input', { type: 'checkbox', onchange: (event) => { curves.log = event.target.checked; redraw(); } }), ' logarithmic'),
  );
  byId('curves').append(legend);
  redraws.push(() => { redraw(); fillLegend(legend); });
}

/** The experiments whose curves are bold, in the order of their rank. */
const bold = () => EXPERIMENTS.filter((each) => table.ticked.has(each) && each.epochs[curves.name]);

function fillLegend(legend) {
  const colour = colours();
  const ticked = bold();
  const entries = ticked.map((each, index) => {
    const swatch = el('canvas', { width: 44, height: 8, 'aria-hidden': 'true' });
    const context = swatch.getContext('2d');
    Object.assign(context, { strokeStyle: hueOf(index, colour), lineWidth: 5 });
    context.setLineDash(dashOf(index).map((length) => 2 * length));
    line(context, [[0, 4], [44, 4]]);
    return el('button', { onclick: () => openDetails(each) }, swatch, each.name);
  });
  const others = withCurves(table.shown).length - ticked.filter((each) => table.shown.includes(each)).length;
  const rest = others ? el('span', { class: 'quiet' }, `${ticked.length ? 'faint: ' : ''}${counted(others, 'other experiment')}`) : null;
  legend.replaceChildren(...entries, ...(rest ? [rest] : []));
}

function drawCurves(context, width, height, colour, pointed) {
  const box = { left: LEFT, right: width - 12, top: 26, bottom: height - 42 };
  const ticked = bold();
  const faint = withCurves(table.shown).filter((each) => !table.ticked.has(each) && each.epochs[curves.name]);
  const all = [...faint, ...ticked];
  const epochs = all.flatMap((each) => each.epochs.step.map((step) => step + 1));
  const values = all.flatMap((each) => each.epochs[curves.name]);
  const x = scaleOf(epochs.length ? epochs : [1, 2], box.left + 6, box.right - 6, { mayBeLog: false });
  x.ticks = x.ticks.filter(Number.isInteger);
  const y = scaleOf(values, box.bottom - 4, box.top + 4, { isLog: curves.log });
  drawAxes(context, box, x, y, ['epoch', curves.name], colour);
  const targets = [];
  const draw = (each, stroke, lineWidth, dash = []) => {
    const points = [];
    each.epochs[curves.name].forEach((value, index) => {
      if (!isThere(value)) return;
      const step = each.epochs.step[index] + 1;
      points.push([x.at(step), y.at(value)]);
      targets.push({ x: x.at(step), y: y.at(value), experiment: each, text: `epoch ${step}: ${fixed(value)}` });
    });
    Object.assign(context, { strokeStyle: stroke, fillStyle: stroke, lineWidth });
    context.setLineDash(dash);
    line(context, points);
    context.setLineDash([]);
    if (lineWidth > 1 || points.length === 1) for (const [a, b] of points.length < 40 ? points : points.slice(-1)) mark(context, 0, a, b, lineWidth > 1 ? 2.6 : 1.6);
  };
  context.globalAlpha = Math.min(1, Math.max(0.3, 40 / faint.length));
  for (const each of faint) draw(each, colour.faint, 1);
  context.globalAlpha = 1;
  [...ticked.entries()].reverse().forEach(([index, each]) => draw(each, hueOf(index, colour), 2, dashOf(index)));
  if (pointed && all.includes(pointed)) {
    const index = ticked.indexOf(pointed);
    draw(pointed, index < 0 ? colour.text : hueOf(index, colour), 3.5);
  }
  return targets;
}

// Parallel coordinates ------------------------------------------------------------------------------------------------

const parallel = { metric: rankMetric };

function buildParallel() {
  if (!DATA.metrics.length) return;
  const redraw = chart(byId('parallel'), {
    height: 376,
    leastWidth: () => parallelAxes().length * 84 + 60,
    label: () => `Settings that differ and ${parallel.metric}, a line for each of ${counted(table.shown.length, 'experiment')}`,
    draw: drawParallel,
  });
  byId('parallel-tools').append(select('result ', DATA.metrics.map((name) => [name, name]), parallel.metric, (name) => {
    parallel.metric = name;
    redraw();
  }));
  redraws.push(redraw);
}

/** The settings that differ among the experiments shown, and the result. */
function parallelAxes() {
  const shown = table.shown.filter((each) => isThere(columnOf(parallel.metric).of(each)));
  const differs = (column) => new Set(shown.map((each) => exact(column.of(each)))).size > 1;
  return [...COLUMNS.filter((column) => column.kind === 'setting' && differs(column)), columnOf(parallel.metric)];
}

function drawParallel(context, width, height, colour, pointed) {
  const axes = parallelAxes();
  const result = axes.at(-1);
  const shown = table.shown.filter((each) => isThere(result.of(each)));
  const [top, bottom, left, right] = [44, height - 22, 78, width - 44];
  const scales = axes.map((axis) => scaleOf(shown.map(axis.of), bottom, top));
  const place = (index) => (axes.length > 1 ? left + ((right - left) * index) / (axes.length - 1) : width / 2);
  const lowerIsBetter = LOWER_IS_BETTER.test(result.name);
  const worstFirst = [...shown].sort((one, other) => ordered(result.of(one), result.of(other), lowerIsBetter ? -1 : 1));
  const targets = [];
  const pointsOf = (each) => axes.flatMap((axis, index) => (isThere(axis.of(each)) ? [[place(index), scales[index].at(axis.of(each))]] : []));
  const draw = (each, stroke, lineWidth) => {
    Object.assign(context, { strokeStyle: stroke, lineWidth });
    context.beginPath();
    pointsOf(each).forEach(([x, y], index, points) => {
      if (!index) return context.moveTo(x, y);
      const [before, height] = points[index - 1];
      const middle = (before + x) / 2;
      context.bezierCurveTo(middle, height, middle, y, x, y);
    });
    context.stroke();
  };
  context.globalAlpha = shown.length > 100 ? 0.5 : 1;
  worstFirst.forEach((each, index) => {
    draw(each, between(colour.low, colour.high, worstFirst.length > 1 ? index / (worstFirst.length - 1) : 1), shown.length > 100 ? 1 : 1.6);
    for (const [x, y] of pointsOf(each)) targets.push({ x, y, experiment: each, text: described(each, axes) });
  });
  context.globalAlpha = 1;
  if (worstFirst.length) draw(worstFirst.at(-1), colour.strong, 2.6);
  if (pointed && shown.includes(pointed)) draw(pointed, colour.text, 3);
  axes.forEach((axis, index) => drawParallelAxis(context, axis, scales[index], place(index), index === axes.length - 1, { top, bottom, colour }));
  return targets;
}

function drawParallelAxis(context, axis, scale, x, isLast, { top, bottom, colour }) {
  Object.assign(context, { strokeStyle: colour.quiet, lineWidth: 1, textBaseline: 'middle' });
  line(context, [[x + 0.5, top - 6], [x + 0.5, bottom + 6]]);
  context.textAlign = isLast ? 'left' : 'right';
  for (const tick of apart(scale, (!isLast && scale.few) || scale.ticks, 13)) {
    const text = shortened(context, scale.text(tick), isLast ? 38 : 66);
    const at = isLast ? x + 6 : x - 6;
    Object.assign(context, { strokeStyle: colour.surface, lineWidth: 4, fillStyle: colour.quiet });
    const start = Math.max(at, isLast ? 0 : context.measureText(text).width + 2);
    context.strokeText(text, start, scale.at(tick));
    context.fillText(text, start, scale.at(tick));
  }
  context.textAlign = 'center';
  context.fillStyle = colour.text;
  const parts = axis.name.split(/(?<=\.)/);
  const half = Math.max(...parts.map((part) => context.measureText(part).width)) / 2;
  const middle = Math.min(Math.max(x, half + 2), context.canvas.clientWidth - half - 2);
  parts.forEach((part, index) => context.fillText(part, middle, top - 22 + (index - parts.length + 1) * 14));
}

const described = (each, axes) => axes.filter((axis) => isThere(axis.of(each))).map((axis) => `${axis.name} ${axis.show(axis.of(each))}`).join(', ');

// Any column over any other -------------------------------------------------------------------------------------------

const scatter = { x: 'seconds', y: rankMetric, by: '' };

function buildScatter() {
  if (!DATA.metrics.length) return;
  const names = COLUMNS.map((column) => [column.name, column.name]);
  const numeric = DATA.params.filter((name) => isNumeric(columnOf(name)));
  scatter.x = numeric.includes('lr') ? 'lr' : 'seconds';
  scatter.by = DATA.params.find((name) => !isNumeric(columnOf(name))) ?? '';
  const legend = el('div', { class: 'legend' });
  const redraw = chart(byId('scatter'), {
    height: 330,
    label: () => `${scatter.y} over ${scatter.x}, a point for each of ${counted(table.shown.length, 'experiment')}`,
    draw: (...all) => drawScatter(legend, ...all),
  });
  byId('scatter').append(legend);
  const choose = (key) => (name) => { scatter[key] = name; redraw(); };
  byId('scatter-tools').append(
    select('x ', names, scatter.x, choose('x')),
    select('y ', names, scatter.y, choose('y')),
    select('colour ', [['', 'none'], ...names], scatter.by, choose('by')),
  );
  redraws.push(redraw);
}

function drawScatter(legend, context, width, height, colour, pointed) {
  const [across, up, by] = [scatter.x, scatter.y, scatter.by].map(columnOf);
  const shown = table.shown.filter((each) => isThere(across.of(each)) && isThere(up.of(each)));
  const box = { left: up.kind === 'setting' && !isNumeric(up) ? 100 : LEFT, right: width - 12, top: 26, bottom: height - 42 };
  const x = scaleOf(shown.map(across.of), box.left + 12, box.right - 12);
  const y = scaleOf(shown.map(up.of), box.bottom - 10, box.top + 10);
  drawAxes(context, box, x, y, [across.name, up.name], colour);
  const look = looks(by, shown, colour);
  const targets = [...shown].reverse().map((each) => {
    const { fill, shape } = look.of(each);
    const [a, b] = [x.at(across.of(each)), y.at(up.of(each))];
    context.globalAlpha = shown.length > 60 ? 0.65 : 0.85;
    context.fillStyle = fill;
    mark(context, shape, a, b, each === pointed ? 7 : 4.5);
    return { x: a, y: b, experiment: each, text: described(each, [...new Set([across, up, by])].filter(Boolean)) };
  });
  context.globalAlpha = 1;
  const entries = look.entries.map(([text, fill, shape]) => {
    const swatch = el('canvas', { width: 20, height: 20, class: 'point', 'aria-hidden': 'true' });
    const inside = swatch.getContext('2d');
    inside.fillStyle = fill;
    mark(inside, shape, 10, 10, 8);
    return el('span', {}, swatch, text);
  });
  legend.replaceChildren(...entries);
  return targets;
}

/** How points look by a column: its values' hues and shapes, or from faint to strong where they are many numbers. */
function looks(by, shown, colour) {
  if (!by) return { of: () => ({ fill: colour.hues[0], shape: 0 }), entries: [] };
  const values = [...new Set(shown.map((each) => written(by.of(each))))].sort((a, b) => a.localeCompare(b, 'en', { numeric: true }));
  if (isNumeric(by) && values.length > 6) {
    const scale = scaleOf(shown.map(by.of), 0, 1);
    const fill = (value) => between(colour.low, colour.high, isThere(value) ? scale.at(value) : 0);
    return { of: (each) => ({ fill: fill(by.of(each)), shape: 0 }), entries: scale.ticks.map((tick) => [by.show(tick), fill(tick), 0]) };
  }
  const look = (value) => ({ fill: hueOf(values.indexOf(value), colour), shape: values.indexOf(value) });
  const entries = values.slice(0, 12).map((value) => [value, look(value).fill, look(value).shape]);
  return { of: (each) => look(written(by.of(each))), entries };
}
