// Clean beside defended probabilities, two bars for each class.

import { $, make } from "./dom.js";

const MOST = 10;
const percent = (p) => `${(p * 100).toFixed(1)}%`;

export function showBars(labels, clean, defended) {
  const classes = chosen(clean.probabilities, defended.index);
  const list = $("bars");
  // The same rows are kept while only values change, so that the bars glide and focus stays.
  const key = classes.join();
  if (list.dataset.classes !== key) {
    list.replaceChildren(...classes.map((k) => item(labels[k])));
    list.dataset.classes = key;
  }
  classes.forEach((k, at) => {
    fill(list.children[at], clean.probabilities[k], defended.probabilities[k]);
  });
  const rest = labels.length - classes.length;
  $("rest").textContent = rest > 0 ? `and ${rest} more classes` : "";
}

export function clearBars() {
  $("bars").replaceChildren();
  $("bars").dataset.classes = "";
  $("rest").textContent = "Clean and defended probabilities of your picture appear here.";
}

// All classes in their order where they are few, else the largest, and the defended label with them.
function chosen(probabilities, defendedIndex) {
  const all = probabilities.map((_, k) => k);
  if (all.length <= MOST) return all;
  const top = all.sort((a, b) => probabilities[b] - probabilities[a]).slice(0, MOST);
  return top.includes(defendedIndex) ? top : [...top.slice(0, -1), defendedIndex];
}

function item(label) {
  const track = make(
    "div",
    { className: "track", ariaHidden: "true" },
    make("div", { className: "bar clean" }),
    make("div", { className: "bar defended" }),
  );
  const figures = make("span", { className: "figures" }, make("span"), make("span"));
  return make("li", {}, make("span", { className: "name", title: label }, label), track, figures);
}

function fill(li, clean, defended) {
  const [before, after] = li.querySelectorAll(".bar");
  before.style.width = percent(clean);
  after.style.width = percent(defended);
  const [first, second] = li.querySelectorAll(".figures span");
  first.textContent = percent(clean);
  second.textContent = percent(defended);
}
