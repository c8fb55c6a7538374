// The preview: a picture and a policy go to the server, clean and defended rows come back.

import { preview } from "./api.js";
import { clearBars, showBars } from "./bars.js";
import { $, make, say } from "./dom.js";
import { showCopies } from "./copies.js";
import { policyText, settingsLines } from "./facts.js";

// Gives a function that takes other facts, after a reload.
export function startPreview(facts) {
  let model, policy, active, known;
  let given = {}; // parameters of the shown policy, the slider's apart
  let picture = null;
  let asking = false;
  let again = false;

  // One request at a time; changes in the meantime are sent after the answer.
  async function refresh() {
    showPolicy();
    if (!picture) return;
    if (asking) {
      again = true;
      return;
    }
    asking = true;
    $("try").ariaBusy = "true";
    try {
      const { name, params } = chosen();
      show(await preview(picture, name, params));
      say($("refusal"), "");
    } catch (error) {
      refuse(error.message);
    }
    asking = false;
    $("try").ariaBusy = "false";
    if (again) {
      again = false;
      refresh();
    }
  }

  // What was shown before would be taken for this picture's.
  function refuse(message) {
    const formats = facts.formats.map((format) => format.replace("image/", "")).join(", ");
    const allowed = message.includes("formats") ? "" : ` Allowed formats: ${formats}.`;
    say($("refusal"), picture?.golden ? message : message + allowed);
    picture = null;
    $("seen").hidden = true;
    clearBars();
    for (const id of ["clean-label", "defended-label", "l1", "top1"]) $(id).textContent = "–";
    $("top1").className = "";
  }

  // The parameters with the slider's, which starts at the row's value where they have none.
  function complete({ parameter, start }, params) {
    return parameter ? { ...params, [parameter]: params[parameter] ?? start } : params;
  }

  function chosen() {
    const row = known.get($("defense").value);
    const moved = row.parameter ? { [row.parameter]: Number($("strength").value) } : {};
    return { name: row.name, params: { ...given, ...moved } };
  }

  function isChosen(row, params) {
    const { name, params: now } = chosen();
    return name === row.name && JSON.stringify(now) === JSON.stringify(complete(row, params));
  }

  function select(defense, params = defense.params) {
    const slider = $("strength");
    given = complete(defense, params);
    $("defense").value = defense.name;
    $("knob").hidden = !defense.parameter;
    $("parameter").textContent = defense.parameter ?? "";
    $("says").textContent = defense.says;
    slider.min = defense.low;
    slider.max = defense.high;
    slider.step = defense.step;
    slider.value = given[defense.parameter];
    refresh();
  }

  function showPolicy() {
    $("strength-value").textContent = $("strength").value;
    const isActive = isChosen(active, active.params);
    facts.presets.forEach(({ defense, params }, i) => {
      $("presets").children[i].ariaPressed = String(isChosen(known.get(defense), params));
    });
    $("is-active").textContent = isActive
      ? "This is the active policy."
      : `Active: ${policyText(policy)}`;
    $("reset").disabled = isActive;
    const { name, params } = chosen();
    const shown = name === "active" ? policy : { defense: name, params };
    $("lines").textContent = settingsLines(shown.defense, shown.params);
    showCopies(facts.copies, shown, known.get(name).parameter);
    $("copied").textContent = "";
  }

  function show({ seen, clean, defended, l1, label_changed: changed, abstained, withheld, honest }) {
    $("seen").src = seen;
    $("seen").alt = "The picture as the network sees it";
    $("seen").hidden = false;
    $("invite").textContent = "Drop, choose or paste another";
    $("clean-label").textContent = clean.label;
    $("defended-label").textContent = abstained ? "no answer" : defended.label;
    $("l1").textContent = l1.toFixed(3);
    $("top1").textContent = withheld ? "withheld" : changed ? "changed" : "kept";
    $("top1").className = withheld || changed ? "changed" : "same";
    showBars(model.labels, clean, defended);
    $("mean-l1").textContent = honest.mean_l1.toFixed(3);
    $("changed").textContent = `${(honest.changed_labels * 100).toFixed(0)}%`;
    $("withheld").textContent = `${(honest.withheld * 100).toFixed(0)}%`;
    const pictures = `${honest.pictures} picture${honest.pictures === 1 ? "" : "s"}`;
    $("over").textContent = `Over ${honest.golden} golden inputs (made-up waves) and ${pictures} shown so far.`;
  }

  function take(next, name) {
    picture = next;
    $("picture-name").textContent = name;
    for (const button of $("golden").children) {
      button.ariaPressed = String(Number(button.value) === next.golden);
    }
    refresh();
  }

  async function copy() {
    try {
      await navigator.clipboard.writeText($("lines").textContent);
      $("copied").textContent = "copied";
    } catch {
      // Browsers allow it only over HTTPS and on localhost.
      getSelection().selectAllChildren($("lines"));
      $("copied").textContent = "selected: copy with Ctrl-C";
    }
  }

  async function takeFile(file) {
    if (!file) return;
    if (file.size > facts.max_body_bytes) {
      refuse(`The file has ${file.size} bytes; allowed: ${facts.max_body_bytes}.`);
      return;
    }
    // The bytes as they are now: a file that changes on disk could not be sent again.
    const bytes = new Blob([await file.arrayBuffer()], { type: file.type });
    take({ file: bytes }, file.name || "pasted picture");
  }

  function use(next) {
    facts = next;
    ({ model, policy } = facts);
    const { defenses } = facts;
    active = defenses.find((row) => row.name === policy.defense) ?? defenses[0];
    known = new Map(defenses.map((row) => [row.name, row]));
    $("defense").replaceChildren(
      ...defenses.map(({ name }) => {
        const text = name === "active" ? policyText(policy) : name;
        return make("option", { value: name }, name === active.name ? `${text} (active)` : text);
      }),
    );
    $("presets").replaceChildren(
      ...facts.presets.map(({ defense, params, recommended }) => {
        const text = recommended ? `${defense} (recommended)` : defense;
        const button = make("button", { type: "button", ariaPressed: "false" }, text);
        button.addEventListener("click", () => select(known.get(defense), params));
        return button;
      }),
    );
    $("golden").replaceChildren(
      ...Array.from({ length: facts.golden }, (_, i) => {
        const button = make("button", { type: "button", value: i + 1, ariaPressed: "false" }, i + 1);
        button.ariaLabel = `Golden input ${i + 1}`;
        button.addEventListener("click", () => take({ golden: i + 1 }, `golden input ${i + 1}`));
        return button;
      }),
    );
    picture = null;
    $("bars").dataset.classes = "";
    select(active);
  }

  $("defense").addEventListener("change", () => select(known.get($("defense").value)));
  $("strength").addEventListener("input", refresh);
  $("reset").addEventListener("click", () => {
    select(active);
    $("defense").focus(); // the button has just been disabled, and would drop the focus
  });
  $("file").addEventListener("change", () => {
    takeFile($("file").files[0]);
    $("file").value = ""; // or choosing the same file once more would be no change
  });
  document.addEventListener("paste", (event) => takeFile(event.clipboardData.files[0]));
  // On the whole page: a picture that misses the frame must not replace the console.
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
  document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    takeFile(event.dataTransfer.files[0]);
  });
  $("copy").addEventListener("click", copy);
  use(facts);
  takeFile($("file").files[0]); // chosen before the page was ready, or kept by the browser
  return use;
}
