// The page for people: asks the API and shows what it says. Everything from the server is set as text, never as markup.
"use strict";

const element = (id) => document.getElementById(id);
const value = (id) => element(id).value.trim();
const MOST_SIDS = 25;

function cell(row, text, className = "") {
  const td = row.insertCell();
  td.textContent = text;
  td.className = className;
  return td;
}

function line(parent, text) {
  const div = document.createElement("div");
  div.className = "dim";
  div.textContent = text;
  parent.append(div);
}

// SIDs with one prefix get neighbouring colours.
function hue(sid) {
  const [first, second] = sid.replace("<", "").split(",").map(Number);
  return (first * 47 + second * 7) % 360;
}

function sidCell(row, sid) {
  cell(row, sid, "sid").style.setProperty("--hue", hue(sid));
}

function choose(row, sid) {
  const chosen = !row.classList.contains("chosen");
  for (const other of element("sids").rows) other.classList.toggle("chosen", chosen && other === row);
  for (const item of element("items").rows) item.classList.toggle("other", chosen && item.dataset.sid !== sid);
}

function show(answer, milliseconds) {
  const sids = element("sids");
  const items = element("items");
  sids.replaceChildren();
  items.replaceChildren();
  const best = answer.sids.length ? Math.exp(answer.sids[0].score) : 1;
  for (const sid of answer.sids.slice(0, MOST_SIDS)) {
    const row = sids.insertRow();
    row.title = "show only its items";
    row.addEventListener("click", () => choose(row, sid.sid));
    sidCell(row, sid.sid);
    const probability = Math.exp(sid.score);
    const td = cell(row, probability < 0.001 ? probability.toExponential(1) : probability.toFixed(3), "number");
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.style.width = `${Math.max(1, (100 * probability) / best)}%`;
    bar.style.setProperty("--hue", hue(sid.sid));
    td.append(bar);
    cell(row, sid.size, "number");
  }
  for (const item of answer.items) {
    const row = items.insertRow();
    row.dataset.sid = item.sid;
    cell(row, item.rank + 1, "number dim");
    line(cell(row, item.title || "(no title)"), [item.item_id, item.brand, item.category_path.join(" › ")].filter(Boolean).join(" · "));
    sidCell(row, item.sid);
  }
  element("answer").hidden = false;
  say(
    `${answer.items.length} items from ${answer.sids.length} SIDs · beam ${answer.beam_size} · ` +
      `${answer.timings.generate_ms.toFixed(1)} ms generating · ${milliseconds.toFixed(0)} ms in all · ${answer.versions.model}`,
  );
}

function say(text, wrong = false) {
  element("status").textContent = text;
  element("status").classList.toggle("wrong", wrong);
}

async function call(path, body) {
  const headers = { "content-type": "application/json" };
  if (value("key")) headers["x-api-key"] = value("key");
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const answer = await response.json();
  if (response.ok) return answer;
  if (response.status === 401) element("more").open = true;
  throw new Error([answer.error, ...(answer.problems || []).map((one) => `${one.field}: ${one.message}`)].join("; "));
}

async function recall() {
  const request = { query: value("query"), limit: 100, shopper: {} };
  for (const name of ["gender", "age_band"]) if (value(name)) request.shopper[name] = value(name);
  const history = value("history").split(",").map((id) => id.trim()).filter(Boolean);
  if (history.length) request.history = history;
  if (value("beam")) request.beam_size = Number(value("beam"));
  keep_in_address(request.query);
  const started = performance.now();
  try {
    show(await call("v1/recall", request), performance.now() - started);
  } catch (error) {
    say(error.message, true);
  }
  describe();
}

// The query stays in the address, so that a search can be sent to a colleague.
function keep_in_address(query) {
  const url = new URL(location.href);
  url.searchParams.set("q", query);
  history.replaceState(null, "", url);
}

async function describe() {
  try {
    const model = await call("v1/model");
    element("model").textContent = `${model.versions.model} · ${model.stage} · ${model.items.toLocaleString()} items in ${model.sids.toLocaleString()} SIDs`;
    element("refused").textContent = model.refused ? `another version was refused: ${model.refused}` : "";
  } catch (error) {
    element("model").textContent = error.message;
  }
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  recall();
});

const asked = new URL(location.href).searchParams.get("q");
if (asked !== null) {
  element("query").value = asked;
  recall();
} else {
  describe();
}
