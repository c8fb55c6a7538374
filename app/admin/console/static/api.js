// What the page asks the admin port. Every failure is an Error whose message a person can read.

const MARK = { "X-Scumble-Console": "1" }; // says that no foreign page asks; see guard.py

export const about = () => ask("/console/about");
export const openapi = () => ask("/console/openapi.json");
export const metrics = () => ask("/console/metrics");
export const clients = () => ask("/console/clients");

// `picture` is {golden: number} or {file: Blob}.
export function preview(picture, defense, params) {
  const query = new URLSearchParams({ defense, params: JSON.stringify(params) });
  if (picture.golden) query.set("golden", picture.golden);
  const body = picture.golden ? undefined : picture.file;
  const headers = body ? { ...MARK, "Content-Type": body.type || "image/png" } : MARK;
  return ask(`/console/preview?${query}`, { method: "POST", headers, body });
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The service does not answer.");
  }
  let document;
  try {
    document = await response.json();
  } catch {
    throw new Error(`The service answers with status ${response.status} and no JSON.`);
  }
  if (!response.ok) throw new Error(document.detail ?? `status ${response.status}`);
  return document;
}
