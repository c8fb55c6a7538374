// Model card, policy and settings: what changes only with a reload or a restart.

import { $, make, row } from "./dom.js";

export function showFacts({ model, policy, settings }) {
  const shape = `${model.input.height} × ${model.input.width} × ${model.input.channels}`;
  $("served").textContent = `${model.name} ${model.version}, ${model.precision}, ${model.engine}`;
  document.title = `Scumble console: ${model.name}`;
  const facts = [
    ["Active policy", policyText(policy)],
    ["Model", `${model.name}, version ${model.version}`],
    ["Served as", `${model.precision} (${model.served_file}) on ${model.engine}`],
    ["Input", `${shape}, ${model.labels.length} classes`],
    ...Object.entries(model.accuracy).map(([precision, { value, images, data }]) => [
      `Accuracy, ${precision}`,
      `${(value * 100).toFixed(2)}% of ${images.toLocaleString("en")} images, ${data}`,
    ]),
    ["Data licence", model.data_licence],
  ];
  $("card").replaceChildren(...terms(facts.filter(([, value]) => value)));
  const files = Object.entries(model.files).map(([file, hash]) => [file, hash, "hash"]);
  $("hashes").replaceChildren(...terms(files));
  $("settings").replaceChildren(
    ...settings.map(({ name, value, says }) => row([name, "value"], [value, "value"], [says])),
  );
}

const terms = (facts) =>
  facts.flatMap(([name, value, className = ""]) => [
    make("dt", {}, name),
    make("dd", { className }, value),
  ]);

// Lines for a shell that serve a policy. `docker --env-file` would keep the quotes.
export function settingsLines(defense, params) {
  return `SCUMBLE_DEFENSE=${defense}\nSCUMBLE_DEFENSE_PARAMS=${shellWord(JSON.stringify(params))}`;
}

const shellWord = (text) => (/^[\w{}.:-]*$/.test(text) && text !== "{}" ? text : `'${text}'`);

export function policyText({ defense, params }) {
  const given = Object.entries(params).map(([name, value]) => `${name} ${JSON.stringify(value)}`);
  return [defense, ...given].join(", ");
}
