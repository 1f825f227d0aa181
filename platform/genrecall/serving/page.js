// The page for people: asks the API and shows what it says. Everything from the server is set as text, never as markup.
"use strict";

const element = (id) => document.getElementById(id);
const value = (id) => element(id).value.trim();
const SHOPPER = { gender: "genders", age_band: "age_bands" };
const MOST_SIDS = 50;
const OPEN_BRANCHES = 3;

// One column for each version that is asked: what it adds to the request.
let columns = [{}];

function make(parent, tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function percent(probability) {
  return probability < 0.001 ? "<0.1 %" : `${(100 * probability).toFixed(1)} %`;
}

function things(count) {
  return `${count.toLocaleString()} ${count === 1 ? "item" : "items"}`;
}

// SIDs with one prefix get neighbouring colours.
function hue(sid) {
  const [first, second] = sid.match(/\d+/g) || [0];
  return (first * 47 + (second || 0) * 7) % 360;
}

function choose(column, leaf, sid) {
  const chosen = !leaf.classList.contains("chosen");
  for (const other of column.querySelectorAll(".leaf")) other.classList.toggle("chosen", chosen && other === leaf);
  for (const item of column.querySelector(".items").rows) item.classList.toggle("other", chosen && item.dataset.sid !== sid);
}

// The generated SIDs as a tree of their prefixes, likeliest first: {step, probability, best, children (a Map), leaves}.
function grown(sids) {
  const root = { probability: 0, children: new Map(), leaves: [] };
  for (const sid of sids) {
    const probability = Math.exp(sid.score);
    let node = root;
    for (const step of (sid.path || []).slice(0, -1)) {
      if (!node.children.has(step.prefix)) node.children.set(step.prefix, { step, probability: 0, children: new Map(), leaves: [] });
      node = node.children.get(step.prefix);
      node.probability += probability;
    }
    node.leaves.push({ sid, probability });
  }
  return root;
}

function showBranch(column, parent, node, level, best) {
  const branches = [...node.children.values()].sort((one, other) => other.probability - one.probability);
  branches.forEach((branch, place) => {
    const details = make(parent, "details");
    details.open = level > 0 || place < OPEN_BRANCHES;
    const summary = make(details, "summary");
    make(summary, "span", "share", `${percent(branch.probability)} · ${things(branch.step.size)}`);
    make(summary, "span", "sid", branch.step.prefix).style.setProperty("--hue", hue(branch.step.prefix));
    make(summary, "span", "label", ` ${branch.step.label}`);
    showBranch(column, details, branch, level + 1, best);
  });
  for (const { sid, probability } of node.leaves) {
    const leaf = make(parent, "button", "leaf");
    leaf.type = "button";
    leaf.title = "show only its items";
    leaf.style.setProperty("--hue", hue(sid.sid));
    make(leaf, "span", "share", `${percent(probability)} · ${things(sid.size)}`);
    make(leaf, "span", "sid", sid.sid);
    make(leaf, "span", "label", ` ${sid.label || ""}`);
    make(leaf, "div", "bar").style.width = `${Math.max(1, (100 * probability) / best)}%`;
    leaf.addEventListener("click", () => choose(column, leaf, sid.sid));
  }
}

function showItems(column, answer) {
  const labels = new Map(answer.sids.map((sid) => [sid.sid, sid.label]));
  for (const item of answer.items) {
    const row = column.querySelector(".items").insertRow();
    row.dataset.sid = item.sid;
    make(row, "td", "number dim", item.rank + 1);
    const shown = make(row, "td", "", item.title || "(no title)");
    make(shown, "div", "dim", [item.item_id, item.brand, item.category_path.join(" › ")].filter(Boolean).join(" · "));
    const from = make(row, "td");
    make(from, "span", "sid", item.sid).style.setProperty("--hue", hue(item.sid));
    const why = item.explanation;
    const probability = why && (why.share ? `${percent(Math.exp(why.sid_score))} × ${percent(Math.exp(why.share))}` : percent(Math.exp(why.sid_score)));
    make(from, "div", "dim", [labels.get(item.sid), probability].filter(Boolean).join(" · "));
  }
}

function show(answer, milliseconds) {
  element("columns").append(element("column").content.cloneNode(true));
  const column = element("columns").lastElementChild;
  column.querySelector(".name").textContent = answer.versions.model + (columns.length > 1 ? ` · ${answer.versions.role}` : "");
  column.querySelector(".figures").textContent =
    `${answer.items.length} items from ${answer.sids.length} SIDs · beam ${answer.beam_size} · ` +
    `${answer.timings.generate_ms.toFixed(1)} ms generating · ${answer.timings.expand_ms.toFixed(1)} ms expanding · ` +
    `${milliseconds.toFixed(0)} ms in all${answer.timings.cached ? " · from the cache" : ""}`;
  const degraded = column.querySelector(".degraded");
  degraded.hidden = !answer.degraded;
  degraded.textContent = `degraded: ${(answer.degraded_by || []).join(", ")}`;
  const readAs = column.querySelector(".read-as");
  readAs.hidden = !answer.read_as;
  readAs.textContent = `read as: ${answer.read_as}`;
  const sids = answer.sids.slice(0, MOST_SIDS);
  showBranch(column, column.querySelector(".tree"), grown(sids), 0, sids.length ? Math.exp(sids[0].score) : 1);
  showItems(column, answer);
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
  throw new Error([answer.error, ...(answer.problems || []).map((one) => `${one.field}: ${one.message}`)].join("; "));
}

let asking = 0;

async function recall() {
  const mine = ++asking;
  const request = { query: value("query"), limit: 100, shopper: {}, explain: true };
  for (const name of Object.keys(SHOPPER)) if (value(name)) request.shopper[name] = value(name);
  const history = value("history").split(",").map((id) => id.trim()).filter(Boolean);
  if (history.length) request.history = history;
  if (value("beam")) request.beam_size = Number(value("beam"));
  keepInAddress(request);
  const answers = [];
  let refusal = "";
  try {
    for (const more of columns) {
      const started = performance.now();
      answers.push([await call("v1/recall", { ...request, ...more }), performance.now() - started]);
    }
  } catch (error) {
    refusal = error.message;
  }
  if (mine !== asking) return; // a later question is on its way
  if (refusal) say(refusal, true);
  if (!answers.length) return;
  element("columns").replaceChildren();
  element("columns").classList.toggle("several", answers.length > 1);
  for (const [answer, milliseconds] of answers) show(answer, milliseconds);
  if (!refusal) say(answers.every(([answer]) => answer.items.length === 0) ? "nothing found" : "");
}

// The question stays in the address, so that it can be sent to a colleague; the key does not.
function keepInAddress(request) {
  const url = new URL(location.href);
  url.searchParams.set("q", request.query);
  for (const name of Object.keys(SHOPPER)) {
    if (request.shopper[name]) url.searchParams.set(name, request.shopper[name]);
    else url.searchParams.delete(name);
  }
  history.replaceState(null, "", url);
}

function offer(name, values) {
  const select = element(name);
  const known = new Set([...select.options].map((option) => option.value));
  for (const one of values || []) if (!known.has(one)) select.add(new Option(one, one));
}

async function describe() {
  try {
    const model = await call("v1/model");
    element("model").textContent = `${model.versions.model} · ${model.stage} · ${model.items.toLocaleString()} items in ${model.sids.toLocaleString()} SIDs`;
    columns = model.challenger && model.challenger.versions ? [{ version: "champion" }, { version: "challenger" }] : [{}];
    element("refused").textContent = model.refused ? `another version was refused: ${model.refused}` : "";
    for (const [name, values] of Object.entries(SHOPPER)) offer(name, model[values]);
  } catch (error) {
    element("model").textContent = error.message;
  }
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  describe().then(recall);
});

const asked = new URL(location.href).searchParams;
for (const name of Object.keys(SHOPPER)) {
  if (asked.get(name)) {
    offer(name, [asked.get(name)]);
    element(name).value = asked.get(name);
  }
}
if (asked.has("q")) element("query").value = asked.get("q");
describe().then(() => asked.has("q") && recall());
