// Whether one of two experiments is better, or could be by chance: what src/compare.py says, of the experiments here.

const LEVEL = 0.05;  // what happens by chance at most this often isn't taken for chance
const FEW = 3;  // seeds, with fewer of which chance has too many ways to look like a difference

const sum = (values) => values.reduce((total, each) => total + each, 0);

/** The sum of squares about the mean. */
function squares(values) {
  const mean = sum(values) / values.length;
  return sum(values.map((each) => (each - mean) ** 2));
}

// Picture by picture: finetune.comparison ------------------------------------------------------------------------------

/** For each picture 1 where the second alone is right, -1 where the first alone is, and 0 where neither is alone. */
function gains(first, second) {
  const [before, after] = [first, second].map(({ right }) => Uint8Array.from(atob(right), (char) => char.charCodeAt(0)));
  const isRight = (bytes, at) => (bytes[at >> 3] >> (7 - (at & 7))) & 1;
  return Array.from({ length: first.n }, (_, at) => isRight(after, at) - isRight(before, at));
}

/** The probability of so uneven a split or a more uneven one, were either as likely: McNemar's test, exact, two-sided. */
function mcnemar(onlyFirst, onlySecond) {
  const trials = onlyFirst + onlySecond;
  let term = -trials * Math.LN2;  // logarithm of the probability of each number of heads
  let total = 0;
  for (let heads = 0; heads <= Math.min(onlyFirst, onlySecond); heads++) {
    total += Math.exp(term);
    term += Math.log(trials - heads) - Math.log(heads + 1);
  }
  return Math.min(1, 2 * total);
}

function compareOnce(gained) {
  return ofCounts(gained.length, ...[-1, 1].map((sign) => gained.filter((each) => each === sign).length));
}

/** The comparison of n pictures, of which so many are right in the one alone and in the other alone. */
function ofCounts(n, onlyFirst, onlySecond) {
  const differing = Math.max(onlyFirst + onlySecond, 6);  // five in a row still happen by chance
  let more = differing % 2;
  while (mcnemar((differing - more) / 2, (differing + more) / 2) > LEVEL) more += 2;
  const [low, high] = bootstrapped(n, onlyFirst, onlySecond);
  const p = mcnemar(onlyFirst, onlySecond);
  return { n, onlyFirst, onlySecond, difference: (onlySecond - onlyFirst) / n, low, high, p, detectable: more / n };
}

/** The 95 % interval of all draws of a bootstrap, from the characteristic function of one picture's difference. */
function bootstrapped(n, onlyFirst, onlySecond) {
  const [first, second] = [onlyFirst, onlySecond].map((each) => (each + 0.5) / (n + 2));
  const variance = n * (first + second - (second - first) ** 2);
  const half = Math.ceil(8 * Math.sqrt(variance)) + 16;  // what is further from the mean is not worth a digit
  const start = Math.round(n * (second - first)) - half;
  const waves = Array.from({ length: 2 * half }, (_, index) => {
    const angle = Math.PI * index / half;
    const [real, imaginary] = [1 - (first + second) * (1 - Math.cos(angle)), (second - first) * Math.sin(angle)];
    return { angle, size: Math.hypot(real, imaginary) ** n, turn: n * Math.atan2(imaginary, real) };
  });
  let total = 0;
  const totals = waves.map((_, index) => {
    total += sum(waves.map(({ angle, size, turn }) => size * Math.cos(turn - angle * (start + index)))) / waves.length;
    return total;
  });
  const levels = [LEVEL / 2 - 1e-9, 1 - LEVEL / 2 + 1e-9];  // of a bound that is just at its level, the wider interval
  return levels.map((level) => (start + totals.findIndex((each) => each >= level)) / n);
}

// Over seeds and folds: finetune.repeats -------------------------------------------------------------------------------

/** The experiments here that differ from one in seed and fold alone, by these, itself included; of equals the newest. */
function repeatsOf(named) {
  const members = EXPERIMENTS.filter((each) => each.group === named.group)
    .sort((one, other) => Date.parse(one.created) - Date.parse(other.created) || (one.name < other.name ? -1 : 1));
  const found = new Map([...members, named].map((each) => [String(each.repeat), each]));
  return new Map([...found].filter(([, each]) => each.of));
}

/** What both have of the same seed and fold, [first, second] each. */
function inBoth(first, second) {
  return [...first.keys()].filter((at) => second.has(at)).map((at) => [first.get(at), second.get(at)])
    .sort(([{ repeat: one }], [{ repeat: other }]) => one[0] - other[0] || one[1] - other[1]);
}

/** The pairs of each run: one; or, where each fold validates other pictures, all folds that the seed with the most has. */
function runsOf(pairs) {
  if (!pairs.flat().every((each) => each.folds)) return pairs.map((pair) => [pair]);
  const runs = [...new Set(pairs.map(seedOf))].map((seed) => pairs.filter((pair) => seedOf(pair) === seed));
  const most = runs.reduce((one, other) => (other.length > one.length ? other : one)).map(foldOf);
  return runs.filter((run) => most.every((fold) => run.map(foldOf).includes(fold)));
}

const seedOf = ([{ repeat }]) => repeat?.[0];
const foldOf = ([{ repeat }]) => repeat?.[1];

/** How the second compares with the first over several runs, from each run's gains on the same pictures: min F'. */
function compareRuns(gained) {
  const [runs, n] = [gained.length, gained[0].length];
  const differences = gained.map((run) => sum(run) / n);
  const difference = sum(gained.map(sum)) / (runs * n);
  const ofEach = gained[0].map((_, at) => sum(gained.map((run) => run[at])) / runs);
  const ofPictures = squares([...ofEach, -1, 1]) / (n + 2) / n;
  const ofRuns = squares(differences) / (runs - 1) / runs;
  const variance = ofPictures + ofRuns;
  const freedom = runs < FEW ? 1 : variance ** 2 / (ofPictures ** 2 / (n + 1) + ofRuns ** 2 / (runs - 1));
  const reach = studentBeyond(LEVEL, freedom) * Math.sqrt(variance);
  const p = student(difference / Math.sqrt(variance), freedom);
  return {
    n, differences, difference, low: difference - reach, high: difference + reach, p, detectable: reach, shareOfRuns: ofRuns / variance,
  };
}

/** The probability that Student's t, of so many degrees of freedom, is at least so far from zero, on either side. */
function student(t, freedom) {
  const [near, far] = [freedom, t * t].map((each) => each / (freedom + t * t));
  return incompleteBeta(near, far, freedom / 2, 0.5);
}

/** How far from zero Student's t is with that probability. */
function studentBeyond(probability, freedom) {
  let [low, high] = [0, 1];
  while (student(high, freedom) > probability) high *= 2;
  for (let step = 0; step < 60; step++) {
    const middle = (low + high) / 2;
    if (student(middle, freedom) > probability) low = middle;
    else high = middle;
  }
  return high;
}

/** The regularised incomplete beta function of x, with `rest` = 1 - x; by Lentz's continued fraction. */
function incompleteBeta(x, rest, a, b) {
  if (x > (a + 1) / (a + b + 2)) return 1 - incompleteBeta(rest, x, b, a);  // where the fraction converges fast
  if (!x) return 0;
  let [ratio, inverse] = [1, 1 / (1 - (a + b) * x / (a + 1))];
  let fraction = inverse;
  for (let m = 1, change = 0; Math.abs(change - 1) > 1e-15 && m < 1e4; m++) {
    const even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
    const odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1));
    for (const term of [even, odd]) {
      [ratio, inverse] = [1 + term / ratio, 1 / (1 + term * inverse)];
      change = ratio * inverse;
      fraction *= change;
    }
  }
  return Math.exp(a * Math.log(x) + b * Math.log(rest) + logGamma(a + b) - logGamma(a) - logGamma(b)) * fraction / a;
}

const LANCZOS = [
  0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059, 12.507343278686905,
  -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7,
];

/** The logarithm of the gamma function of half a thing or more. */
function logGamma(value) {
  const series = sum(LANCZOS.map((each, index) => (index ? each / (value - 1 + index) : each)));
  return Math.log(2 * Math.PI) / 2 + (value - 0.5) * Math.log(value + 6.5) - (value + 6.5) + Math.log(series);
}

// In words -------------------------------------------------------------------------------------------------------------

/** What there is to say of two experiments, [{title, lines, left}]: of the two, and of their settings' seeds and folds. */
function verdicts(first, second) {
  const without = [first, second].filter((each) => !each.of).map((each) => each.name);
  if (without.length) return [{ lines: [`There are no predictions of ${without.join(' and ')} here to compare.`] }];
  const over = overRepeats(first, second);
  return [{ title: over && 'The two trained networks alone', lines: verdict(first, second, [[[first, second]]]) }, ...(over ? [over] : [])];
}

function overRepeats(first, second) {
  if (!isThere(first.group) || !isThere(second.group) || first.group === second.group) return null;
  const groups = [first, second].map(repeatsOf);
  const pairs = inBoth(...groups);
  if (pairs.length < 2) return null;
  const runs = runsOf(pairs);
  const [seeds, folds] = [seedOf, foldOf].map((which) => new Set(runs.flat().map(which)).size);
  const several = [seeds > 1 || folds < 2 ? counted(seeds, 'seed') : '', folds > 1 ? counted(folds, 'fold') : ''];
  const compared = runs.flat(2);
  const left = groups.flatMap((group) => [...group.values()]).filter((each) => !compared.includes(each)).map((each) => each.name);
  return { title: `Over ${several.filter(Boolean).join(' and ')} of each`, lines: verdict(first, second, runs), left };
}

/** What src/compare.py says of two experiments, given the runs of both. */
function verdict(first, second, runs) {
  const folds = new Set(runs.flat().map(foldOf)).size;
  const places = runs[0].map(([{ of }]) => of);
  if (!runs.every((run) => run.every((pair, index) => pair.every(({ of }) => of === places[index])))) {
    return [`They were not evaluated on the same pictures${folds > 1 ? ', fold by fold' : ''}.`];
  }
  const gained = runs.map((run) => run.flatMap((pair) => gains(...pair)));
  const isAlone = runs.length === 1;
  const compared = isAlone ? compareOnce(gained[0]) : compareRuns(gained);
  const { difference, low, high, p, detectable } = compared;
  const points = (share) => (share < 0 ? '' : '+') + decimals(100 * share, 1);
  return [
    (isAlone ? sentence : sentenceOverRuns)(first.name, second.name, compared),
    `Accuracy of ${second.name} minus that of ${first.name}: ${points(difference)} points, 95 % interval ${points(low)} to ${points(high)}.`,
    p > LEVEL ? `A difference below ${decimals(100 * detectable, 1)} points can't be told from chance here.` : '',
    folds > 1 ? `The networks of the ${folds} folds share training pictures, so p is somewhat too small.` : '',
    isAlone ? adviceForOne(first, second) : adviceForRuns(compared),
  ].filter(Boolean);
}

function sentence(first, second, { n, onlyFirst, onlySecond, p }) {
  if (!(onlyFirst + onlySecond)) return `${first} and ${second} are right on the same pictures, and wrong on the same: all ${n}.`;
  const counts = `${second} is right on ${counted(onlySecond, 'picture')} where ${first} is wrong, `
    + `and wrong on ${onlyFirst} where ${first} is right`;
  if (p > LEVEL) return `${counts}: with ${counted(n, 'picture')} this could be chance (${pValue(p)}).`;
  return `${counts}: with ${counted(n, 'picture')}, ${onlySecond > onlyFirst ? second : first} is better (${pValue(p)}).`;
}

function sentenceOverRuns(first, second, { n, differences, difference, p }) {
  const [ahead, behind] = [1, -1].map((sign) => differences.filter((each) => sign * each > 0).length);
  const counts = `${second} is ahead of ${first} in ${ahead} of ${differences.length} runs, and behind in ${behind}`;
  const where = `over ${counted(n, 'picture')} and ${differences.length} runs each`;
  if (p > LEVEL) return `${counts}: ${where}, this could be chance (${pValue(p)}).`;
  return `${counts}: ${where}, ${difference > 0 ? second : first} is better (${pValue(p)}).`;
}

function adviceForOne(first, second) {
  if (first.alike === second.alike) return 'Their settings are the same, seed and fold apart: such a difference is what another seed makes.';
  return 'That is of two trained networks, not yet of their settings: several seeds of both tell more.';
}

function adviceForRuns({ differences, p, shareOfRuns }) {
  if (differences.length < FEW) return 'Two runs hardly tell what another seed makes: five of each are a good number.';
  if (p <= LEVEL) return '';
  const percent = (share) => `${decimals(100 * share, 0)}%`;
  if (shareOfRuns > 0.5) return `${percent(shareOfRuns)} of the uncertainty is that of seeds: more seeds of both would make it smaller.`;
  return `${percent(1 - shareOfRuns)} of the uncertainty is that of pictures: more pictures, or data.folds, make it smaller.`;
}
