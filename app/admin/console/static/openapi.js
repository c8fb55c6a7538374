// The public API, from its OpenAPI description: one panel per path, one table per operation.

import { openapi } from "./api.js";
import { $, make, row, say } from "./dom.js";

function operation(method, path, { summary = "", description = "", ...rest }) {
  const parameters = (rest.parameters ?? []).map((parameter) =>
    row([parameter.name, "value"], [`${parameter.in}, ${kind(parameter.schema)}`],
      [parameter.description ?? ""]),
  );
  const bodies = Object.entries(rest.requestBody?.content ?? {}).map(([type, { schema }]) =>
    row([type, "value"], ["body"], [kind(schema)]),
  );
  const answers = Object.entries(rest.responses ?? {}).map(([status, answer]) =>
    row([status, "value"], ["answer"], [answer.description ?? ""]),
  );
  const body = make("tbody", {}, ...parameters, ...bodies, ...answers);
  const table = make("div", { className: "scroll", tabIndex: 0 }, make("table", {}, body));
  table.role = "region";
  table.ariaLabel = `${method} ${path}`;
  return [
    make("h2", {}, make("code", {}, `${method.toUpperCase()} ${path}`), ` ${summary}`),
    make("p", { className: "hint" }, description),
    table,
  ];
}

// The name or type of a schema.
function kind(schema = {}) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  const format = schema.format ? ` (${schema.format})` : "";
  return (schema.type === "array" ? `list of ${kind(schema.items)}` : schema.type ?? "any") + format;
}

function schemaPanel(schemas) {
  const rows = Object.entries(schemas).flatMap(([name, { properties = {} }]) =>
    Object.entries(properties).map(([member, schema], i) =>
      row([i ? "" : name, "value"], [member, "value"], [kind(schema)]),
    ),
  );
  const table = make("div", { className: "scroll", tabIndex: 0 },
    make("table", {}, make("tbody", {}, ...rows)));
  table.role = "region";
  table.ariaLabel = "Bodies and answers";
  return make("section", { className: "panel wide" }, make("h2", {}, "Bodies and answers"), table);
}

async function start() {
  try {
    const { info, paths, components = {} } = await openapi();
    $("title").textContent = `${info.title} ${info.version}, on the public port`;
    const panels = Object.entries(paths).map(([path, operations]) =>
      make("section", { className: "panel wide" },
        ...Object.entries(operations).flatMap(([method, about]) => operation(method, path, about))),
    );
    $("routes").replaceChildren(...panels, schemaPanel(components.schemas ?? {}));
  } catch (error) {
    say($("failure"), error.message);
  }
}

start();
