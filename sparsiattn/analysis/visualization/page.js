"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const MEANING = {
  exact: "Exact: the softmax over all keys, as dense attention computes it.",
  pattern: "Pattern: the softmax over the keys that the pattern keeps.",
  kept: "Kept: the keys whose attention is computed; for the mean of heads, the share of heads.",
};
// Stops of a perceptual map from black over violet and orange to pale yellow.
const STOPS = [[0, 0, 4], [43, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66],
  [245, 125, 21], [250, 193, 39], [252, 255, 164]];
const KINDS = { lookup: Int32Array, place: Int32Array, keyIndex: Int32Array, keyWindow: Int32Array,
  queryToken: Int32Array, codes: Uint8Array, top: Float32Array, kept: Uint8Array,
  mass: Float32Array, background: Float32Array };
const state = { site: 0, head: -1, mode: "pattern", y: 0.5, x: 0.5, prefix: -1, pinned: false };
const photo = new Image();
let bytes = null;

async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

function array(site, name) {
  const key = "_" + name;
  if (!site[key]) site[key] = new KINDS[name](bytes, ...site.at[name]);
  return site[key];
}

function colour(a) {
  const t = Math.max(0, Math.min(1, a)) * (STOPS.length - 1), i = Math.min(STOPS.length - 2, Math.floor(t));
  return STOPS[i].map((low, c) => low + (t - i) * (STOPS[i + 1][c] - low));
}

// The colour of a share of the maximum, by its square root, so that weak attention is visible.
const shade = (a) => (state.mode === "kept" ? [255 * a, 150 * a, 40 * a] : colour(Math.sqrt(a)));
const veil = (a) => (state.mode === "kept" ? 0.7 - 0.3 * a : 0.66);

// Number of patches per key token, to divide a merged token's attention among them.
function sizes(site) {
  if (site._sizes) return site._sizes;
  const index = array(site, "keyIndex"), window = array(site, "keyWindow"), count = new Map();
  for (let p = 0; p < index.length; p++) {
    const key = window[p] * site.keys + index[p];
    if (index[p] >= 0) count.set(key, (count.get(key) || 0) + 1);
  }
  site._sizes = Float32Array.from(index, (k, p) => (k < 0 ? 1 : count.get(window[p] * site.keys + k)));
  return site._sizes;
}

function patchAt(site, y = state.y, x = state.x) {
  const [rows, columns] = site.grid;
  return [Math.min(rows - 1, Math.floor(y * rows)), Math.min(columns - 1, Math.floor(x * columns))];
}

// Index of the selected query in a site, -1 if its patch was dropped earlier.
function queryOf(site) {
  if (!site.at) return -1;
  if (state.prefix >= 0 && state.prefix < site.prefix_tokens) return state.prefix;
  const [row, column] = patchAt(site);
  return array(site, "lookup")[row * site.grid[1] + column];
}

// Index of the patch whose query is shown: the selected patch, or the nearest one with a query.
function spot(site) {
  const [row, column] = patchAt(site), at = row * site.grid[1] + column, place = array(site, "place");
  const query = array(site, "lookup")[at], token = query < 0 ? place[at] : array(site, "queryToken")[query];
  return place[at] === token ? at : place.indexOf(token);
}

// Shares of one query: by patch, on prefix tokens, kept mass, background, number of kept keys.
function attention(site, head, query, mode) {
  const index = array(site, "keyIndex"), window = array(site, "keyWindow");
  const size = mode === "kept" ? null : sizes(site);
  const codes = array(site, "codes"), top = array(site, "top"), bits = array(site, "kept");
  const masses = array(site, "mass"), backgrounds = array(site, "background");
  const n = site.keys, wide = Math.ceil(n / 8), own = Math.floor(array(site, "queryToken")[query] / site.tokens);
  const heads = head < 0 ? site.heads.map((_, h) => h) : [head];
  const found = { patches: new Float32Array(index.length), prefix: 0, fused: 0, mass: 0, background: 0, kept: 0 };
  const row = new Float32Array(n);
  for (const h of heads) {
    const at = h * site.queries + query, mass = masses[at], background = backgrounds[at];
    const factor = mode === "exact" ? 1 : mass > 0 ? (1 - background) / mass : 0;
    for (let j = 0; j < n; j++) {
      const kept = (bits[at * wide + (j >> 3)] >> (7 - (j & 7))) & 1, code = codes[at * n + j] / 255;
      found.kept += kept / heads.length;
      const value = mode === "kept" ? kept : top[at] * code * code * (mode === "exact" ? 1 : kept * factor);
      row[j] += value / heads.length;
    }
    found.mass += mass / heads.length;
    found.background += background / heads.length;
  }
  for (let j = 0; j < site.prefix_tokens; j++) found.prefix += row[j];
  for (const j of site.fused) found.fused += row[j];
  for (let p = 0; p < index.length; p++) {
    if (index[p] >= 0 && window[p] === own) found.patches[p] = row[index[p]] / (size ? size[p] : 1);
  }
  return found;
}

// Colours of every patch; opaque for thumbnails, else a veil over the photo.
function paint(site, values, most, opaque) {
  const index = array(site, "keyIndex"), picture = new ImageData(site.keyGrid[1], site.keyGrid[0]);
  for (let p = 0; p < values.length; p++) {
    const a = most > 0 ? values[p] / most : 0, [r, g, b] = index[p] < 0 ? [60, 60, 66] : shade(a);
    picture.data.set([r, g, b, opaque ? 255 : 255 * (index[p] < 0 ? 0.9 : veil(a))], 4 * p);
  }
  return picture;
}

function small(picture) {
  const canvas = document.createElement("canvas");
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

function drawPhoto(site, query, found) {
  const canvas = $("photo"), context = canvas.getContext("2d"), { width, height } = canvas;
  context.imageSmoothingEnabled = !DATA.small;
  context.drawImage(photo, 0, 0, width, height);
  if (!site.at) return;
  if (found) {
    const most = state.mode === "kept" ? 1 : Math.max(...found.patches);
    context.imageSmoothingEnabled = false;
    context.drawImage(small(paint(site, found.patches, most, false)), 0, 0, width, height);
  }
  if (query >= 0 && query < site.prefix_tokens) return;
  outline(context, site, width, height);
}

// Around the query's patch, and all patches merged into its token.
function outline(context, site, width, height) {
  const [rows, columns] = site.grid, place = array(site, "place"), at = spot(site);
  const mine = place[at], w = width / columns, h = height / rows;
  const inside = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns
    && (mine < 0 ? r * columns + c === at : place[r * columns + c] === mine);
  const sides = [[-1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1, 1], [0, -1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 1]];
  context.beginPath();
  for (let p = 0; p < place.length; p++) {
    const r = Math.floor(p / columns), c = p % columns;
    if (!inside(r, c)) continue;
    for (const [dr, dc, x0, y0, x1, y1] of sides) {
      if (inside(r + dr, c + dc)) continue;
      context.moveTo((c + x0) * w, (r + y0) * h);
      context.lineTo((c + x1) * w, (r + y1) * h);
    }
  }
  context.lineCap = "square";
  for (const [line, style] of [[8, "#000c"], [4, mine < 0 ? "#a9b4ba" : "#3be0ff"]]) {
    Object.assign(context, { lineWidth: line, strokeStyle: style });
    context.stroke();
  }
}

const percent = (x) => (x > 0 && x < 0.001 ? (100 * x).toPrecision(1) : (100 * x).toFixed(x < 0.0995 ? 1 : 0)) + " %";

function readout(site, query, found) {
  const said = [];
  if (found) {
    said.push(["Keys kept", `${+found.kept.toFixed(1)} of ${site.keys}`]);
    said.push(["Exact mass kept", percent(found.mass)]);
    if (site.prefix_tokens) said.push([state.mode === "kept" ? "Prefix kept" : "On prefix tokens",
      state.mode === "kept" ? `${Math.round(found.prefix)} of ${site.prefix_tokens}` : percent(found.prefix)]);
    if (site.fused.length && state.mode !== "kept") said.push(["On fused tokens", percent(found.fused)]);
    if (state.mode === "pattern" && site.background) said.push(["Background", percent(found.background)]);
  }
  $("readout").replaceChildren(...said.map(([name, value]) => {
    const item = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    item.append(dt, dd);
    return item;
  }));
  const head = state.head < 0 ? "mean of heads" : `head ${site.heads[state.head]}`;
  let text = `${site.name}, ${head}`;
  if (!site.at) text += `: ${site.note}`;
  else if (query >= 0 && query < site.prefix_tokens) text += `, prefix token ${query}`;
  else text += `, patch (${Math.floor(spot(site) / site.grid[1])}, ${spot(site) % site.grid[1]}) of ${site.grid.join(" x ")}` + (query < 0 ? ": dropped before this layer" : "");
  if (site.dense) text += "; dense attention runs here";
  if (DATA.step > 1 && site.at) text += `; a query every ${DATA.step} patches, the nearest is shown`;
  if (site.windows > 1) text += `; ${site.windows} windows`;
  $("where").textContent = text;
}

function draw() {
  const site = DATA.sites[state.site], query = queryOf(site);
  const found = query < 0 ? null : attention(site, state.head, query, state.mode);
  drawPhoto(site, query, found);
  readout(site, query, found);
  $("most").textContent = state.mode === "kept" ? "all heads" : found ? percent(Math.max(...found.patches)) : "";
  const bar = $("scale").getContext("2d");
  for (let i = 0; i < 256; i++) {
    bar.fillStyle = `rgb(${shade(i / 255).join()})`;
    bar.fillRect(i, 0, 1, 1);
  }
  for (const cell of document.querySelectorAll("#layers canvas, #heads canvas")) thumbnail(cell);
}

function thumbnail(canvas) {
  const site = DATA.sites[+canvas.dataset.site];
  if (!site.at) return;
  let head = canvas.dataset.head === undefined ? state.head : +canvas.dataset.head;
  if (head >= site.heads.length) head = -1;
  const query = queryOf(site);
  canvas.width = site.keyGrid[1];
  canvas.height = site.keyGrid[0];
  if (query < 0) return canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  const values = attention(site, head, query, state.mode).patches;
  const most = state.mode === "kept" ? 1 : Math.max(...values);
  canvas.getContext("2d").putImageData(paint(site, values, most, true), 0, 0);
}

function cell(site, head, text, short, pressed, choose) {
  const figure = document.createElement("figure"), button = document.createElement("button");
  const canvas = document.createElement("canvas"), caption = document.createElement("figcaption");
  canvas.dataset.site = site;
  canvas.width = canvas.height = 14;
  if (head !== null) canvas.dataset.head = head;
  button.type = "button";
  button.setAttribute("aria-pressed", pressed);
  button.setAttribute("aria-label", text);
  button.append(canvas);
  button.onclick = choose;
  button.title = text;
  caption.textContent = short;
  figure.append(button, caption);
  return figure;
}

function strips() {
  const site = DATA.sites[state.site];
  $("layers").replaceChildren(...DATA.sites.map((one, i) =>
    cell(i, null, one.name, one.index, i === state.site, () => choose({ site: i }))));
  $("heads").replaceChildren(...[-1, ...site.heads.keys()].map((h) =>
    cell(state.site, h, h < 0 ? "mean of heads" : `head ${site.heads[h]}`, h < 0 ? "mean" : site.heads[h],
      h === state.head, () => choose({ head: h }))));
  const names = [["-1", "mean of heads"], ...site.heads.map((h, i) => [String(i), `head ${h}`])];
  fill($("head"), names, state.head);
  fill($("layer"), DATA.sites.map((one, i) => [String(i), one.name]), state.site);
  const prefix = Array.from({ length: site.prefix_tokens }, (_, i) => [String(i), `prefix token ${i}`]);
  fill($("query"), [["-1", "patch pointed at"], ...prefix], state.prefix);
  $("whichquery").hidden = !site.prefix_tokens || !site.at;
  for (const one of document.querySelectorAll("[data-mode]")) {
    one.setAttribute("aria-checked", one.dataset.mode === state.mode);
    one.tabIndex = one.dataset.mode === state.mode ? 0 : -1;
  }
  for (const one of document.querySelectorAll("#table button")) {
    one.setAttribute("aria-pressed", +one.dataset.site === state.site && +one.dataset.head === state.head);
  }
  $("meaning").textContent = MEANING[state.mode];
}

function fill(select, options, value) {
  select.replaceChildren(...options.map(([key, text]) => new Option(text, key)));
  select.value = String(value);
}

function choose(change) {
  Object.assign(state, change);
  const site = DATA.sites[state.site];
  if (state.head >= site.heads.length) state.head = -1;
  if (state.prefix >= site.prefix_tokens) state.prefix = -1;
  const focused = document.activeElement && document.activeElement.id;
  strips();
  draw();
  if (focused) $(focused).focus({ preventScroll: true });
}

function table() {
  $("tablesection").hidden = DATA.sites.every((site) => site.dense);
  const heads = Math.max(...DATA.sites.map((site) => site.heads.length));
  const first = DATA.sites.find((site) => site.heads.length === heads);
  const names = ["", "mean", ...first.heads.map((h) => `head ${h}`), "pairs"];
  const heading = $("table").createTHead().insertRow();
  for (const name of names) heading.append(Object.assign(document.createElement("th"), { textContent: name, scope: "col" }));
  const body = $("table").createTBody(), mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  DATA.sites.forEach((site, i) => {
    const line = body.insertRow();
    line.append(Object.assign(document.createElement("th"), { textContent: site.name, scope: "row" }));
    for (let h = -1; h < heads; h++) {
      const place = line.insertCell();
      if (h < site.heads.length) place.append(massCell(i, h, h < 0 ? mean(site.mass) : site.mass[h]));
    }
    const last = line.insertCell();
    last.className = "plain";
    last.textContent = site.dense ? "dense" : percent(mean(site.density));
  });
}

function massCell(site, head, mass) {
  const button = document.createElement("button"), strength = Math.round(100 * mass);
  button.type = "button";
  button.textContent = (100 * mass).toFixed(mass < 0.9995 ? 1 : 0);
  button.style.background = `color-mix(in srgb, var(--heat) ${Math.round(0.62 * strength)}%, var(--card))`;
  Object.assign(button.dataset, { site, head });
  button.onclick = () => choose({ site, head });
  return button;
}

function point(event) {
  const box = $("photo").getBoundingClientRect(), clip = (t) => Math.max(0, Math.min(0.9999, t));
  Object.assign(state, { y: clip((event.clientY - box.top) / box.height), x: clip((event.clientX - box.left) / box.width) });
  if (state.prefix >= 0) choose({ prefix: -1 });
  else draw();
}

function move(rows, columns) {
  const site = DATA.sites[state.site];
  if (!site.at) return;
  const at = patchAt(site).map((t, i) => Math.max(0, Math.min(site.grid[i] - 1, t + DATA.step * [rows, columns][i])));
  Object.assign(state, { y: (at[0] + 0.5) / site.grid[0], x: (at[1] + 0.5) / site.grid[1], prefix: -1 });
  choose({});
}

function listen() {
  const canvas = $("photo"), steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.addEventListener("pointermove", (event) => { if (!state.pinned || event.buttons) point(event); });
  canvas.addEventListener("pointerdown", (event) => {
    state.pinned = event.pointerType === "mouse" && !state.pinned;
    point(event);
  });
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Escape") state.pinned = false;
    const turn = { PageUp: -1, PageDown: 1 }[event.key];
    if (steps[event.key]) { state.pinned = true; move(...steps[event.key]); }
    else if (turn) choose({ site: Math.max(0, Math.min(DATA.sites.length - 1, state.site + turn)) });
    else return;
    event.preventDefault();
  });
  $("layer").onchange = (event) => choose({ site: +event.target.value });
  $("head").onchange = (event) => choose({ head: +event.target.value });
  $("query").onchange = (event) => choose({ prefix: +event.target.value });
  const modes = [...document.querySelectorAll("[data-mode]")];
  modes.forEach((one, i) => {
    one.onclick = () => choose({ mode: one.dataset.mode });
    one.onkeydown = (event) => {
      const next = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: 2, ArrowUp: 2 }[event.key];
      if (next) { modes[(i + next) % 3].focus(); modes[(i + next) % 3].click(); event.preventDefault(); }
    };
  });
  const root = document.documentElement;
  $("theme").onclick = () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; };
}

// Where to look at first: a point whose patch is still there, else the first such patch.
function opening(site) {
  if (!site.at) return DATA.points[0];
  const lookup = array(site, "lookup"), [rows, columns] = site.grid;
  const alive = ([y, x]) => { const [r, c] = patchAt(site, y, x); return lookup[r * columns + c] >= 0; };
  const first = Math.max(0, lookup.findIndex((query) => query >= 0));
  return DATA.points.find(alive) || [(Math.floor(first / columns) + 0.5) / rows, ((first % columns) + 0.5) / columns];
}

// #layer=3&head=1&mode=exact&at=0.4,0.6&theme=dark
function fromHash() {
  const asked = new URLSearchParams(location.hash.slice(1)), dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = asked.get("theme") || (dark ? "dark" : "light");
  const layer = DATA.sites.findIndex((site) => String(site.index) === asked.get("layer"));
  const start = DATA.sites.map((site) => Boolean(site.at)), middle = Math.floor(start.length / 2);
  state.site = layer >= 0 ? layer : start[middle] ? middle : Math.max(0, start.indexOf(true));
  if (asked.has("head")) state.head = DATA.sites[state.site].heads.indexOf(+asked.get("head"));
  if (DATA.sites.every((site) => site.dense)) state.mode = "exact";
  if (asked.get("mode") in MEANING) state.mode = asked.get("mode");
  const [y, x] = asked.has("at") ? asked.get("at").split(",").map(Number) : opening(DATA.sites[state.site]);
  if (y >= 0 && y < 1 && x >= 0 && x < 1) Object.assign(state, { y, x });
}

async function start() {
  bytes = await inflate($("blob").textContent);
  photo.src = DATA.image;
  await photo.decode();
  const side = Math.max(720, Math.max(...DATA.size)), most = Math.max(...DATA.size), canvas = $("photo");
  canvas.height = Math.round((side * DATA.size[0]) / most);
  canvas.width = Math.round((side * DATA.size[1]) / most);
  fromHash();
  listen();
  table();
  tokens();
  choose({});
  document.documentElement.dataset.ready = "yes";
}

start();
