// The demo's page: a click is an event, then the list, the history and the state are asked for again.

const SHOWN = 15; // of the recommendations; more are asked for, to tell from where an item came
const ASKED = 100;
const PAUSE = 150; // ms without a key before a search
const SVG = "http://www.w3.org/2000/svg";
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const at = (id) => document.getElementById(id);

let user = "";
let places = new Map(); // item id to its place in the list before
let path = []; // [length of the history, movement], as far as this page has seen it
let clock = null; // if the model reads times: their units in a second, and by how much the service's clock is ahead
let turn = Promise.resolve(); // clicks take effect one after the other
let searches = 0;

function newName() {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return Array.from(bytes, (byte) => byte.toString(36).padStart(2, "0")).join("");
}

// What fails for the moment is asked once more: events carry an id, so none counts twice.
async function ask(route, body, again = true) {
  let answer;
  try {
    answer = await fetch(route, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Error("The service does not answer.");
  }
  if (answer.status === 503 && again) {
    await new Promise((done) => setTimeout(done, 1000 * (Number(answer.headers.get("retry-after")) || 1)));
    return ask(route, body, false);
  }
  if (answer.ok) return answer.json();
  const { detail } = await answer.json().catch(() => ({ detail: `status ${answer.status}` }));
  throw new Error(`The service refused: ${typeof detail === "string" ? detail : detail[0].what}.`);
}

// One after the other, and a mistake in one stops no other.
function inTurn(work) {
  document.body.dataset.busy = "yes";
  const mine = turn.then(work).then(
    () => { at("trouble").hidden = true; },
    (error) => {
      at("trouble").textContent = error.message;
      at("trouble").hidden = false;
    },
  );
  turn = mine;
  mine.then(() => { if (turn === mine) delete document.body.dataset.busy; });
}

function element(name, kind, text = "") {
  const made = document.createElement(name);
  made.className = kind;
  made.textContent = text; // never HTML: names are data
  return made;
}

function row(item, kind, ...parts) {
  const line = document.createElement("li");
  line.dataset.item = item.item_id;
  const inner = element(kind, "row");
  inner.append(...parts);
  if (kind === "button") {
    inner.type = "button";
    inner.addEventListener("click", () => take(item));
  }
  line.append(inner);
  return line;
}

function take(item) {
  const event = { user_id: user, item_id: item.item_id, event_id: newName() };
  const seconds = Date.now() / 1000; // of the click, whenever its turn comes
  inTurn(async () => {
    if (clock !== null) event.time = clock.perSecond * (seconds + clock.ahead);
    await ask("events", { events: [event] });
    if (event.user_id === user) await show();
  });
}

// An answer comes later than it was made: of all that came, the one that says most was the fastest.
function readClock(told) {
  const ahead = told && Math.max(clock ? clock.ahead : -Infinity, told.now - Date.now() / 1000);
  clock = told && { perSecond: told.per_second, ahead };
}

async function show() {
  const visitor = await ask("demo/visitor", { user_id: user, k: ASKED });
  readClock(visitor.clock);
  showList(visitor.best);
  showState(visitor);
  showHistory(visitor.history);
}

function stepOf(item, place) {
  if (!places.size) return ["", "", ""];
  if (!places.has(item)) return ["new", "new", `was not among the first ${ASKED}`];
  const by = places.get(item) - place;
  if (by > 0) return ["up", `▲ ${by}`, `up by ${by}`];
  return by < 0 ? ["down", `▼ ${-by}`, `down by ${-by}`] : ["", "", "as before"];
}

function showList(best) {
  const before = new Map(Array.from(at("best").children, (line) => [line.dataset.item, line.getBoundingClientRect().top]));
  const shown = best.slice(0, SHOWN);
  const lines = shown.map((item, place) => {
    const [kind, text, spoken] = stepOf(item.item_id, place);
    const step = element("span", `step ${kind}`, text);
    if (spoken) step.title = spoken;
    return row(item, "button", element("span", "place", place + 1), element("span", "name", item.name), step,
      element("span", "score", item.score.toFixed(2)));
  });
  at("best").replaceChildren(...lines);
  slide(lines, before);
  const entered = shown.filter((item) => !before.has(item.item_id)).length;
  at("change").textContent = !best.length ? "Take an item to begin."
    : before.size ? `${entered} of ${shown.length} entered the list with the last click.` : "Scores are the model's own.";
  places = new Map(best.map((item, place) => [item.item_id, place]));
}

// Items slide from where they were.
function slide(lines, before) {
  if (calm.matches) return;
  for (const line of lines) {
    const from = before.get(line.dataset.item);
    const frames = from === undefined ? [{ opacity: 0 }, { opacity: 1 }]
      : [{ transform: `translateY(${from - line.getBoundingClientRect().top}px)` }, { transform: "none" }];
    line.animate(frames, { duration: 350, easing: "ease-out" });
  }
}

function showState({ length, moved, history }) {
  at("moved").textContent = `${(100 * moved).toFixed(moved < 0.1 ? 1 : 0)} %`;
  at("latest").textContent = history.length ? history.at(-1).surprise.toFixed(2) : "–";
  path = [...path.filter(([before]) => before < length), [length, moved]];
  at("chart").toggleAttribute("hidden", path.length < 2);
  const [first, last] = [path[0][0], Math.max(path[0][0] + 8, length)];
  const top = Math.max(...path.map(([, height]) => height), 1e-9);
  const line = document.createElementNS(SVG, "polyline");
  const points = path.map(([x, y]) => [300 * (x - first) / (last - first), 57 - 52 * y / top]);
  line.setAttribute("points", points.map((point) => point.map((x) => x.toFixed(1)).join(",")).join(" "));
  at("chart").replaceChildren(line);
}

function showHistory(history) {
  at("none").hidden = history.length > 0;
  at("history").replaceChildren(...history.toReversed().map((item) => {
    const surprise = element("span", "surprise", item.surprise.toFixed(2));
    surprise.title = "surprise";
    surprise.prepend(bar(item.surprise));
    return row(item, "div", element("span", "name", item.name), surprise);
  }));
}

// From the middle, which is 1: to the left what was known better, to the right what surprised.
function bar(surprise) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 60 10");
  picture.setAttribute("aria-hidden", "true");
  const length = 30 * Math.min(1, Math.abs(surprise - 1));
  for (const [kind, x, width] of [["track", 0, 60], surprise < 1 ? ["less", 30 - length, length] : ["more", 30, length]]) {
    const part = document.createElementNS(SVG, "rect");
    part.setAttribute("class", kind);
    part.setAttribute("x", x);
    part.setAttribute("width", width);
    part.setAttribute("height", 10);
    picture.append(part);
  }
  return picture;
}

async function search() {
  const mine = ++searches;
  const { items, total } = await ask("demo/items", { text: at("search").value });
  if (mine !== searches) return; // a later one is on its way
  const of = total === 1 ? "1 item" : `${total.toLocaleString("en")} items`;
  at("total").textContent = total > items.length ? `${of}, the ${items.length} that most people took` : of;
  at("items").replaceChildren(...items.map((item) => row(item, "button", element("span", "name", item.name))));
  at("items").scrollTop = 0;
}

function begin(name) {
  user = name;
  try {
    sessionStorage.setItem("visitor", name);
  } catch { /* without storage a reload begins again */ }
  at("user").textContent = name;
  at("best").replaceChildren();
  [places, path] = [new Map(), []];
  inTurn(show);
}

function visitorBefore() {
  try {
    return sessionStorage.getItem("visitor");
  } catch {
    return null;
  }
}

let pause;
at("search").addEventListener("input", () => {
  clearTimeout(pause);
  pause = setTimeout(() => inTurn(search), PAUSE);
});
at("again").addEventListener("click", () => begin(`visitor-${newName()}`));
inTurn(search);
begin(visitorBefore() ?? `visitor-${newName()}`);
