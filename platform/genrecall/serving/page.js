// The page for people: asks the API and shows what it says. Everything from the server is set as text, never as markup.
"use strict";

const element = (id) => document.getElementById(id);

function cell(row, text, className) {
  const td = row.insertCell();
  td.textContent = text;
  if (className) td.className = className;
  return td;
}

function show(answer, milliseconds) {
  const sids = element("sids");
  const items = element("items");
  sids.replaceChildren();
  items.replaceChildren();
  const top = Math.exp(answer.sids.length ? answer.sids[0].score : 0);
  for (const sid of answer.sids.slice(0, 25)) {
    const row = sids.insertRow();
    cell(row, sid.sid, "sid");
    const probability = Math.exp(sid.score);
    const td = cell(row, probability < 0.0001 ? probability.toExponential(1) : probability.toFixed(4));
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.style.width = `${Math.max(1, (100 * probability) / top)}%`;
    td.append(bar);
    cell(row, sid.size);
  }
  for (const item of answer.items) {
    const row = items.insertRow();
    cell(row, item.rank + 1);
    const td = cell(row, item.title);
    const path = document.createElement("div");
    path.className = "path";
    path.textContent = [item.item_id, item.brand, item.category_path.join(" › ")].filter(Boolean).join(" · ");
    td.append(path);
    cell(row, item.sid, "sid");
  }
  element("answer").hidden = false;
  element("status").textContent =
    `${answer.items.length} items from ${answer.sids.length} SIDs, beam ${answer.beam_size}, ` +
    `${answer.timings.generate_ms.toFixed(1)} ms generating, ${milliseconds.toFixed(0)} ms in all, by ${answer.versions.model}`;
}

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const request = { query: element("query").value, limit: 50 };
  const history = element("history").value.split(",").map((id) => id.trim()).filter(Boolean);
  if (history.length) request.history = history;
  if (element("beam").value) request.beam_size = Number(element("beam").value);
  const started = performance.now();
  try {
    const response = await fetch("/v1/recall", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(request),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error([answer.error, ...(answer.problems || []).map((p) => `${p.field}: ${p.message}`)].join("; "));
    show(answer, performance.now() - started);
  } catch (error) {
    element("status").textContent = String(error.message || error);
  }
});

fetch("/v1/model")
  .then((response) => response.json())
  .then((model) => {
    element("model").textContent = `${model.versions.model} · ${model.items} items in ${model.sids} SIDs`;
  })
  .catch(() => {});
