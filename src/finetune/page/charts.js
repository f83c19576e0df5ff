// What charts are made of: a canvas that follows its holder's size, scales, axes, colours, and what the pointer is at.

const NARROW = 520;  // px

/** Colours of the page as it is now, light or dark; hues by Okabe and Ito, which the colour-blind can tell apart. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    text: get('text'), quiet: get('quiet'), line: get('line'), surface: get('surface'), faint: get('faint'), strong: get('strong'),
    low: get('low'), high: get('high'),
    hues: ['blue', 'vermillion', 'green', 'purple', 'orange', 'sky'].map(get),
  };
}

const DASHES = [[], [6, 4], [2, 3], [9, 3, 2, 3]];  // beyond six experiments

/** A colour between two, both #rrggbb. */
function between(from, to, share) {
  const parts = [1, 3, 5].map((at) => {
    const [a, b] = [from, to].map((each) => parseInt(each.slice(at, at + 2), 16));
    return Math.round(a + (b - a) * share);
  });
  return `rgb(${parts.join(',')})`;
}

/**
 * A chart in `holder`. `draw(context, width, height, colours)` returns its targets, [{x, y, experiment, text}], of which
 * the one nearest to the pointer is told, and opened by a click. Returns the function that draws it anew.
 */
function chart(holder, { height, label, draw, leastWidth = () => 0 }) {
  const canvas = el('canvas', { role: 'img' });
  const tip = el('div', { class: 'tip', hidden: true });
  const frame = el('div', { class: 'chart' }, canvas, tip);
  holder.append(frame);
  let targets = [];
  let at = null;  // the target at the pointer

  function redraw() {
    const width = Math.max(holder.clientWidth, leastWidth());
    if (!width) return;
    const tall = typeof height === 'function' ? height(width) : height;
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(tall * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${tall}px`;
    canvas.setAttribute('aria-label', label());
    const context = canvas.getContext('2d');
    context.scale(scale, scale);
    context.font = '12px system-ui, sans-serif';
    context.lineJoin = 'round';
    targets = draw(context, width, tall, colours(), at?.experiment) ?? [];
  }

  function nearest(event) {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let found = null;
    let least = 30 ** 2;  // px
    for (const each of targets) {
      const distance = (each.x - x) ** 2 + (each.y - y) ** 2;
      if (distance < least) [found, least] = [each, distance];
    }
    return found;
  }

  function point(target) {
    const isOther = target?.experiment !== at?.experiment;
    at = target;
    tip.hidden = !target;
    canvas.style.cursor = target ? 'pointer' : '';
    if (target) {
      tip.replaceChildren(el('strong', {}, target.experiment.name), el('br'), target.text);
      const isRight = target.x > canvas.clientWidth / 2;
      tip.style.left = `${isRight ? Math.max(0, target.x - 12 - tip.offsetWidth) : target.x + 12}px`;
      tip.style.top = `${Math.max(0, Math.min(target.y - 40, canvas.clientHeight - tip.offsetHeight))}px`;
    }
    if (isOther) redraw();
  }

  canvas.addEventListener('pointermove', (event) => point(nearest(event)));
  canvas.addEventListener('pointerleave', () => point(null));
  canvas.addEventListener('click', (event) => {
    const target = nearest(event);
    if (target) openDetails(target.experiment);
  });
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(holder);
  return redraw;
}

/** A scale from values to pixels: of numbers (with logarithms where they span much), or of things, a place each. */
function scaleOf(values, from, to, { mayBeLog = true, isLog = null } = {}) {
  const there = values.filter(isThere);
  if (there.some((value) => typeof value !== 'number')) {
    const names = [...new Set(there.map(written))].sort((a, b) => a.localeCompare(b, 'en', { numeric: true }));
    const place = new Map(names.map((name, index) => [name, (index + 0.5) / names.length]));
    return { ticks: names, text: String, at: (value) => from + (to - from) * (place.get(written(value)) ?? 0), things: true };
  }
  let low = there.reduce((a, b) => Math.min(a, b), Infinity);
  let high = there.reduce((a, b) => Math.max(a, b), -Infinity);
  if (low > high) [low, high] = [0, 1];
  const few = [...new Set(there)].sort((a, b) => a - b);
  const log = low > 0 && (isLog ?? (mayBeLog && high / low >= 30));
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 10, high + (Math.abs(low) || 1) / 10];
  const warp = log ? Math.log10 : (value) => value;
  const [start, end] = [warp(low), warp(high)];
  return {
    ticks: log ? logTicks(low, high) : linearTicks(low, high),
    few: few.length > 0 && few.length <= 6 ? few : null,  // the values themselves
    text: number,
    at: (value) => from + (to - from) * ((warp(value) - start) / (end - start)),
    things: false,
  };
}

function linearTicks(low, high, wanted = 5) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) ticks.push(index * step);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const each of high / low < 30 ? [1, 2, 5] : [1]) ticks.push(each * 10 ** power);
  }
  const inside = ticks.filter((each) => each >= low * 0.999 && each <= high * 1.001);
  return inside.length > 1 ? inside : [low, high];
}

/** Draw the grid and the numbers of both axes in a box, {left, right, top, bottom}, and the axes' names. */
function drawAxes(context, box, x, y, names, colour) {
  context.lineWidth = 1;
  context.strokeStyle = colour.line;
  context.fillStyle = colour.quiet;
  context.textBaseline = 'middle';
  context.textAlign = 'right';
  for (const tick of y.ticks) {
    const at = Math.round(y.at(tick)) + 0.5;
    line(context, [[box.left, at], [box.right, at]]);
    context.fillText(shortened(context, y.text(tick), box.left - 10), box.left - 8, at);
  }
  context.textBaseline = 'top';
  context.textAlign = 'center';
  let end = -Infinity;  // of the last number, that they don't touch
  for (const tick of x.ticks) {
    const at = Math.round(x.at(tick)) + 0.5;
    const text = shortened(context, x.text(tick), x.things ? (box.right - box.left) / x.ticks.length - 6 : 80);
    const half = context.measureText(text).width / 2;
    line(context, [[at, box.bottom], [at, box.bottom + 4]]);
    if (at - half > end + 6) {
      context.fillText(text, at, box.bottom + 8);
      end = at + half;
    }
  }
  line(context, [[box.left, box.bottom + 0.5], [box.right, box.bottom + 0.5]]);
  context.textAlign = 'right';
  context.fillText(names[0], box.right, box.bottom + 25);
  context.textAlign = 'left';
  context.fillText(names[1], 2, 2);
}

function line(context, points) {
  context.beginPath();
  points.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.stroke();
}

/** Those of the ticks that are at least so many pixels from the one before. */
function apart(scale, ticks, least) {
  const kept = [];
  for (const each of ticks) {
    if (!kept.length || Math.abs(scale.at(each) - scale.at(kept.at(-1))) >= least) kept.push(each);
  }
  return kept;
}

function shortened(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let kept = text;
  while (kept.length > 1 && context.measureText(`${kept}…`).width > room) kept = kept.slice(0, -1);
  return `${kept}…`;
}

const SHAPES = [
  (context, x, y, r) => context.arc(x, y, r, 0, 2 * Math.PI),
  (context, x, y, r) => context.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8),
  (context, x, y, r) => { context.moveTo(x, y - r * 1.2); context.lineTo(x + r * 1.1, y + r * 0.9); context.lineTo(x - r * 1.1, y + r * 0.9); context.closePath(); },
  (context, x, y, r) => { context.moveTo(x, y - r * 1.3); context.lineTo(x + r * 1.3, y); context.lineTo(x, y + r * 1.3); context.lineTo(x - r * 1.3, y); context.closePath(); },
];

/** Fill or stroke a small shape, one of SHAPES. */
function mark(context, shape, x, y, radius) {
  context.beginPath();
  SHAPES[shape % SHAPES.length](context, x, y, radius);
  context.fill();
}
