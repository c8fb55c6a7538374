// Starts the page: what is served first, then the preview and the live part.

import { about, clients } from "./api.js";
import { $, make, row, say } from "./dom.js";
import { showFacts } from "./facts.js";
import { startLive } from "./live.js";
import { startPreview } from "./preview.js";

async function start() {
  startLive();
  try {
    const facts = await about();
    showFacts(facts);
    startPreview(facts);
    showClients(await clients());
  } catch (error) {
    say($("failure"), error.message);
  }
}

function showClients({ clients: list, note }) {
  if (!list.length) {
    $("clients").replaceChildren(make("p", { className: "hint" }, note));
    return;
  }
  const head = make("tr", {}, make("th", {}, "Client"), make("th", { className: "n" }, "queries"));
  const rows = list.map(({ name, queries }) => row([name], [queries.toLocaleString("en"), "n"]));
  $("clients").replaceChildren(
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
  );
}

start();
