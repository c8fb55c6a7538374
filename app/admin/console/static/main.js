// Starts the page: what is served first, then the preview and the live part.

import { about, clients } from "./api.js";
import { $, make, row, say } from "./dom.js";
import { showFacts } from "./facts.js";
import { startLive } from "./live.js";
import { startPreview } from "./preview.js";

const CLIENTS_MS = 5000;

let showPreview = null;

// Facts come when the service is first reached, and again after a reload or a restart.
async function readFacts() {
  try {
    const facts = await about();
    showFacts(facts);
    if (showPreview) showPreview(facts);
    else showPreview = startPreview(facts);
    say($("failure"), "");
    return true;
  } catch (error) {
    say($("failure"), error.message);
    return false;
  }
}

async function followClients() {
  try {
    if (!document.hidden) showClients(await clients());
  } catch {
    // The live part says that the service is not reached.
  }
  setTimeout(followClients, CLIENTS_MS);
}

function showClients({ clients: list, note }) {
  if (!list.length) {
    const text = note || "No client with a key has asked yet.";
    $("clients").replaceChildren(make("p", { className: "hint" }, text));
    return;
  }
  const number = (value) => value.toLocaleString("en");
  const titles = ["policy", "images", "withheld", "refused", "left"].map((title) =>
    make("th", { className: "n" }, title),
  );
  const head = make("tr", {}, make("th", {}, "Client"), ...titles);
  const rows = list.map(({ name, policies, images, withheld, refused, limits, left }) => {
    const budgets = Object.keys(limits).map(
      (budget) => `${number(left[budget])} of ${number(limits[budget])} (${budget})`,
    );
    return row(
      [name],
      [policies.join("; ") || "–", "n"],
      [number(images), "n"],
      [number(withheld), "n"],
      [number(refused), "n"],
      [budgets.join(", ") || "no budget", "n"],
    );
  });
  $("clients").replaceChildren(
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
  );
}

startLive(readFacts);
followClients();
