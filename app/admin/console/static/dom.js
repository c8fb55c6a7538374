// Small helpers around the document. Text goes in as text: nothing on the page is parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function say(element, message) {
  element.textContent = message;
  element.hidden = !message;
}

// [text, class of the cell] -> a row of a table.
export const row = (...cells) =>
  make("tr", {}, ...cells.map(([text, className = ""]) => make("td", { className }, text)));
