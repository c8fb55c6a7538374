// What a thief gets: the most accurate copies that were measured, beside what honest users lose.

import { $ } from "./dom.js";

const percent = (copy) => (copy ? `${(copy.copied * 100).toFixed(1)}%` : "–");

// The measured policy that is nearest to the one shown.
function nearest(copies, { defense, params }, parameter) {
  const same = copies.filter((copy) => copy.defense === defense);
  if (!parameter) return same[0];
  const apart = (copy) => Math.abs(copy.params[parameter] - params[parameter]);
  return same.reduce((a, b) => (a && apart(a) <= apart(b) ? a : b), undefined);
}

function measuredAt(copy, parameter) {
  return parameter ? `, measured at ${parameter} ${copy.params[parameter]}` : "";
}

// `parameter` is the slider's; undefined or null for none.
export function showCopies(copies, shown, parameter) {
  const copy = nearest(copies, shown, parameter);
  $("best-copy").textContent = percent(copy);
  for (const defense of ["none", "label"]) {
    const known = copies.find((each) => each.defense === defense);
    $(`copy-${defense}`).textContent = percent(known);
  }
  const missing = copies.length ? `under ${shown.defense}` : "for this model";
  $("copy-by").textContent = copy
    ? `Accuracy of the copy by ${copy.attacker}, ${copy.queries.toLocaleString("en")} queries` +
      `${measuredAt(copy, parameter)}. Honest users get ${(copy.served * 100).toFixed(1)}%.`
    : `Not measured ${missing}.`;
}
