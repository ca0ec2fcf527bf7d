// What the rounds of one workload say: as the program's `bench` counts them, so that rows of both can be compared.

/** A round is an outlier where its modified Z-score (Iglewicz and Hoaglin 1993) is beyond this. */
const OUTLIER = 10;
/** From the median absolute deviation, and the mean one, to the standard deviation of a normal distribution. */
const OF_MEDIAN = 1.4826;
const OF_MEAN = 1.2533;
/** Parts that the rounds are cut into in the order of time. */
const BLOCKS = 32;
/** The share of the time that a part of the warm-up takes, and how close two are when nothing gets faster any more. */
const WARM_PARTS = 10;
const WARM_CLOSE = 0.05;

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const sorted = (numbers) => Float64Array.from(numbers).sort();

/** The number below which a share of them lies; NaN if there is none. */
export const quantile = (numbers, share) => sorted(numbers)[Math.round((numbers.length - 1) * share)] ?? NaN;

/** The middle of numbers; NaN if there is none. */
export function median(numbers) {
  const all = sorted(numbers);
  const middle = all.length >> 1;
  if (all.length === 0) return NaN;
  return all.length % 2 === 1 ? all[middle] : (all[middle - 1] + all[middle]) / 2;
}

function outliers(times) {
  const middle = median(times);
  const deviations = times.map((time) => Math.abs(time - middle));
  // a coarse clock gives most rounds the same time, and a median deviation of 0
  const deviation = OF_MEDIAN * median(deviations) || (OF_MEAN * sum(deviations)) / deviations.length;
  return deviations.filter((far) => far > OUTLIER * deviation).length;
}

/** The fields of a row that the times of its rounds give, in the order of time. */
export function spread(times) {
  const mean = sum(times) / times.length;
  const parts = Math.min(times.length, BLOCKS);
  const edge = (n) => Math.floor((n * times.length) / parts);
  const at = (share) => quantile(times, share);
  return {
    median_ms: at(0.5),
    min_ms: at(0),
    p10_ms: at(0.1),
    p25_ms: at(0.25),
    p75_ms: at(0.75),
    p90_ms: at(0.9),
    p99_ms: at(0.99),
    max_ms: at(1),
    mean_ms: mean,
    stddev_ms: Math.sqrt(sum(times.map((time) => (time - mean) ** 2)) / Math.max(times.length - 1, 1)),
    blocks_ms: Array.from({ length: parts }, (_, n) => median(times.slice(edge(n), edge(n + 1)))),
    outliers: outliers(times),
    rounds: times.length,
  };
}

/** Runs rounds, for a tenth of the time each part, until two parts after each other take the same, or the time is up. */
export async function warmUp(round, budget, goesOn) {
  const end = performance.now() + budget;
  for (let [rounds, before] = [0, NaN]; ; ) {
    const partEnd = performance.now() + budget / WARM_PARTS;
    const part = [];
    do part.push(await round());
    while (performance.now() < partEnd && goesOn());
    rounds += part.length;
    const now = quantile(part, 0.5);
    if (Math.abs(now / before - 1) <= WARM_CLOSE) return { warmup_rounds: rounds, warmup_steady: true };
    if (performance.now() >= end || !goesOn()) return { warmup_rounds: rounds, warmup_steady: Number.isFinite(before) ? false : null };
    before = now;
  }
}
