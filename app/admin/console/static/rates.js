// Totals since the start -> what happened between two of them. No document here: only numbers.

// The rate of a counter; null where the service restarted between the two.
export function rate(before, after, seconds) {
  return after < before || seconds <= 0 ? null : (after - before) / seconds;
}

// The mean of what was observed; null where nothing was.
export function mean(before, after) {
  const count = after.count - before.count;
  return count > 0 ? (after.sum - before.sum) / count : null;
}

// A quantile of a histogram by linear interpolation in its bucket, as Prometheus does it. What lies
// above the last bound counts as that bound; zeros are zeros, not somewhere in the first bucket.
export function quantile(q, before, after) {
  const count = after.count - before.count;
  if (count <= 0) return null;
  if (after.sum === before.sum) return 0;
  const wanted = q * count;
  let below = 0;
  let low = 0;
  for (const [i, high] of after.bounds.entries()) {
    const here = after.below[i] - before.below[i];
    if (here >= wanted) return low + ((high - low) * (wanted - below)) / (here - below);
    below = here;
    low = high;
  }
  return low;
}

// The share of a count in another, null where that one is 0.
export function share(part, whole) {
  return whole > 0 ? Math.min(1, part / whole) : null;
}
