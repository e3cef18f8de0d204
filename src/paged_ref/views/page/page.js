"use strict";
// A run, moment by moment. The frames were drawn when the page was made; here keys and buttons move through them.
// The address says what is shown: #run=paged&frame=sharing&step=12, or event=57, or at=C. `embed` hides what is around.

const get = (id) => document.getElementById(id);
const now = { run: 0, frame: 0, position: 0 };
let data, playing, writing;

async function unpack() {
  const bytes = Uint8Array.from(atob(get("data").textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const run = () => data.runs[now.run];
const frame = () => run().frames[now.frame];
const stepOf = (position) => run().steps.findLastIndex((first) => first <= position);

// --- what is shown

function address(position) {
  const step = run().steps.indexOf(position);
  const where = step >= 0 ? `step=${step + data.first_step}` : `${data.moment}=${position + 1}`;
  return `#run=${encodeURIComponent(run().name)}&frame=${frame().name}&${where}`;
}

function painted(row) {
  const line = document.createElement("span");
  for (let i = 0; i < row.length; i += 2) {
    const part = document.createElement("span");
    part.textContent = row[i];
    part.className = row[i + 1];
    line.append(part);
  }
  line.append("\n");
  return line;
}

function button(text, pressed, action) {
  const made = document.createElement("button");
  made.textContent = text;
  made.setAttribute("aria-pressed", pressed);
  made.onclick = action;
  return made;
}

function show() {
  const { name, sentences, where, sources } = run();
  const last = sentences.length - 1;
  now.position = Math.max(0, Math.min(now.position, last));
  now.frame = Math.min(now.frame, run().frames.length - 1);
  get("run").value = now.run;
  get("frames").replaceChildren(...run().frames.map((each, i) =>
    button(`${i + 1} ${each.name}`, i === now.frame, () => { now.frame = i; show(); get("frames").children[i].focus(); })));
  get("where").textContent = `${where[now.position]} · ${data.moment} ${now.position + 1} of ${last + 1}`;
  get("picture").replaceChildren(...data.pictures[frame().pictures[now.position]].map((row) => painted(data.rows[row])));
  get("picture").setAttribute("aria-label", `${name}, frame ${frame().name}`);
  get("sentence").textContent = sentences[now.position];
  get("place").max = last + 1;
  get("place").value = now.position + 1;
  get("place").setAttribute("aria-valuetext", where[now.position]);
  const source = data.sources[sources[now.position]];
  get("code").hidden = !source;
  if (source) [get("function").textContent, get("source").textContent] = source;
  get("link").href = address(now.position);
  get("embed").textContent = `<iframe src="${location.pathname.split("/").pop()}${address(now.position)}&embed" ` +
    `title="${document.title}" width="100%" height="640"></iframe>`;
  clearTimeout(writing);  // the address follows a little later: browsers allow only so many changes in a second
  writing = setTimeout(() => history.replaceState(null, "", get("link").hash +
    (document.documentElement.classList.contains("embed") ? "&embed" : "")), 300);
}

function list() {  // of the steps and the marks of this run, as links
  const marks = new Map(run().marks);
  const places = [...new Set([...run().steps, ...marks.keys()])].sort((a, b) => a - b);
  get("list").querySelector("ol").replaceChildren(...places.map((position) => {
    const item = document.createElement("li"), link = document.createElement("a");
    link.href = address(position);
    link.textContent = marks.has(position) ? data.marks[marks.get(position)] : run().where[position];
    item.append(link, ` ${run().sentences[position]}`);
    return item;
  }));
}

// --- the address

function follow() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const problems = [];
  const place = (name, known, fallback) => {  // by name, or by number from 1
    const text = asked.get(name), i = known.indexOf(text);
    if (text === null) return fallback;
    if (i < 0 && !known[text - 1]) problems.push(`${name} is ${text}; known are ${known.join(", ")}.`);
    return i >= 0 ? i : known[text - 1] ? text - 1 : fallback;
  };
  const number = (name, first, length) => {
    const text = asked.get(name), found = Number(text) - first;
    if (text && Number.isInteger(found) && found >= 0 && found < length) return found;
    problems.push(`${name} is ${text}; ${first} to ${length - 1 + first} is needed.`);
    return null;
  };
  document.documentElement.classList.toggle("embed", asked.has("embed"));
  now.run = place("run", data.runs.map((each) => each.name), now.run);
  now.frame = place("frame", run().frames.map((each) => each.name), now.frame);
  if (asked.has("step")) {
    const step = number("step", data.first_step, run().steps.length);
    now.position = step === null ? now.position : run().steps[step];
  } else if (asked.has(data.moment)) {
    now.position = number(data.moment, 1, run().sentences.length) ?? now.position;
  } else if (asked.has("at")) {
    const found = run().marks.find(([, mark]) => mark === asked.get("at"));
    if (!found) problems.push(`at is ${asked.get("at")}; known are ${Object.keys(data.marks).join(", ")}.`);
    now.position = found ? found[0] : now.position;
  }
  get("problem").textContent = problems.join(" ");
  list();
  show();
}

// --- keys and buttons

function go(position) {
  now.position = position;
  show();
}

function toStep(direction) {
  const step = stepOf(now.position);
  if (direction > 0) go(run().steps[step + 1] ?? run().sentences.length - 1);
  else go(run().steps[run().steps[step] === now.position ? step - 1 : step] ?? 0);
}

function toMark(direction) {
  const places = run().marks.filter(([, mark]) => frame().about.includes(mark)).map(([position]) => position);
  const found = direction > 0 ? places.find((each) => each > now.position) : places.findLast((each) => each < now.position);
  if (found !== undefined) go(found);
}

function toRun(next) {  // the same step of the other run
  const step = stepOf(now.position);
  now.run = next % data.runs.length;
  now.position = run().steps[Math.min(step, run().steps.length - 1)] ?? 0;
  list();
  show();
}

function play(on) {
  clearInterval(playing);
  playing = on && setInterval(() => {
    go(now.position + 1);
    if (now.position + 1 === run().sentences.length) play(false);
  }, 1000);
  get("play").setAttribute("aria-pressed", Boolean(on));
  get("play").textContent = on ? "pause" : "play";
  get("sentence").setAttribute("aria-live", on ? "off" : "polite");  // a reader cannot follow a film
}

const actions = {
  ArrowRight: () => go(now.position + 1),
  ArrowLeft: () => go(now.position - 1),
  ArrowDown: () => toStep(1),
  ArrowUp: () => toStep(-1),
  Home: () => go(0),
  End: () => go(run().sentences.length - 1),
  n: () => toMark(1),
  p: () => toMark(-1),
  r: () => toRun(now.run + 1),
  " ": () => play(!playing),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select, input")) return;
  if (event.key === " " && event.target.closest("button, a, summary")) return;  // it presses what has the focus
  const number = Number(event.key);
  if (number >= 1 && number <= run().frames.length) now.frame = number - 1, show();
  else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
});

unpack().then((unpacked) => {
  data = unpacked;
  Object.assign(now, data.start);
  get("picture").style.setProperty("--columns", data.columns);
  get("picture").style.setProperty("--rows", data.lines);
  get("run").append(...data.runs.map((each, i) => new Option(each.name, i)));
  get("run").onchange = () => toRun(Number(get("run").value));
  get("place").oninput = () => go(get("place").value - 1);
  for (const each of document.querySelectorAll("[data-key]")) each.onclick = () => actions[each.dataset.key]();
  addEventListener("hashchange", follow);
  follow();
}).catch((error) => {
  get("problem").textContent = `This page cannot be shown: it needs a browser of 2023 or later. (${error})`;
});
