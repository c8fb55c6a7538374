// The preview: a picture and a policy go to the server, clean and defended rows come back.

import { preview } from "./api.js";
import { showBars } from "./bars.js";
import { $, make, say } from "./dom.js";
import { policyText } from "./facts.js";

export function startPreview(facts) {
  const { model, policy, defenses } = facts;
  const active = defenses.find((row) => row.name === policy.defense) ?? defenses[0];
  const known = new Map(defenses.map((row) => [row.name, row]));
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
      say($("refusal"), error.message);
    }
    asking = false;
    $("try").ariaBusy = "false";
    if (again) {
      again = false;
      refresh();
    }
  }

  function chosen() {
    const { name, parameter, params } = known.get($("defense").value);
    if (!parameter) return { name, params };
    return { name, params: { ...params, [parameter]: Number($("strength").value) } };
  }

  function select(defense) {
    const slider = $("strength");
    $("defense").value = defense.name;
    $("knob").hidden = !defense.parameter;
    $("parameter").textContent = defense.parameter ?? "";
    $("says").textContent = defense.says;
    slider.min = defense.low;
    slider.max = defense.high;
    slider.step = defense.step;
    slider.value = defense.start;
    refresh();
  }

  function showPolicy() {
    const slider = $("strength");
    $("strength-value").textContent = slider.value;
    const isActive = $("defense").value === active.name && Number(slider.value) === active.start;
    $("is-active").textContent = isActive
      ? "This is the active policy."
      : `Active: ${policyText(policy)}`;
    $("reset").disabled = isActive;
  }

  function show({ seen, clean, defended, l1, label_changed: changed, honest }) {
    $("seen").src = seen;
    $("seen").alt = "The picture as the network sees it";
    $("seen").hidden = false;
    $("invite").textContent = "Drop, choose or paste another";
    $("clean-label").textContent = clean.label;
    $("defended-label").textContent = defended.label;
    $("l1").textContent = l1.toFixed(3);
    $("top1").textContent = changed ? "changed" : "kept";
    $("top1").className = changed ? "changed" : "same";
    showBars(model.labels, clean, defended);
    $("mean-l1").textContent = honest.mean_l1.toFixed(3);
    $("changed").textContent = `${(honest.changed_labels * 100).toFixed(0)}%`;
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

  async function takeFile(file) {
    if (!file) return;
    if (file.size > facts.max_body_bytes) {
      say($("refusal"), `The file has ${file.size} bytes; allowed: ${facts.max_body_bytes}.`);
      return;
    }
    // The bytes as they are now: a file that changes on disk could not be sent again.
    const bytes = new Blob([await file.arrayBuffer()], { type: file.type });
    take({ file: bytes }, file.name || "pasted picture");
  }

  $("defense").replaceChildren(
    ...defenses.map(({ name }) => {
      const text = name === "active" ? policyText(policy) : name;
      return make("option", { value: name }, name === active.name ? `${text} (active)` : text);
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
  select(active);
  takeFile($("file").files[0]); // chosen before the page was ready, or kept by the browser
}
