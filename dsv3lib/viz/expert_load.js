// The expert-load view, drawn from one packet (see load_history.py) with nothing but the browser: in a
// notebook as a widget, and on a page that has no kernel.

const FONT = "12px 'DejaVu Sans', system-ui, sans-serif";
const STYLE = `
.dsv3-load{color:var(--ink);background:var(--paper);font:13px 'DejaVu Sans',system-ui,sans-serif;padding:10px 12px;
  max-width:1000px;border-radius:4px;box-sizing:border-box}
.dsv3-load h3{margin:0 0 2px 0;font-size:15px;color:inherit} .dsv3-load .state{margin:0 0 6px 0;min-height:1.2em}
.dsv3-load .controls{display:flex;flex-wrap:wrap;gap:6px 18px;align-items:center;margin-bottom:6px}
.dsv3-load label{display:inline-flex;gap:6px;align-items:center;color:inherit} .dsv3-load .step{width:300px}
.dsv3-load select{font:inherit;color:#1d1d1f;background:#fff} .dsv3-load canvas{display:block;max-width:100%}
.dsv3-load .row{display:grid;align-items:start;gap:4px 16px} .dsv3-load .row canvas{width:100%!important} .dsv3-load .words{margin-top:4px;min-height:2.4em}`;

export function unpack(bytes) {
  const buffer = bytes.buffer ? bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) : bytes;
  const length = new DataView(buffer).getUint32(0, true);
  const data = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };
  for (const { name, dtype, offset, count } of data.arrays) {
    data[name] = new kinds[dtype](buffer, 4 + length + offset, count);
  }
  return data;
}

function element(tag, parent, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  parent.append(made);
  return made;
}

function canvas(parent, width, height, label) {
  const made = element("canvas", parent, { role: "img", "aria-label": label });
  const scale = Math.max(1, Math.min(2, window.devicePixelRatio || 1));
  made.width = width * scale; made.height = height * scale;
  made.style.width = width + "px";
  const pen = made.getContext("2d");
  pen.scale(scale, scale);
  return { made, pen, width, height };
}

// Colour of a ratio to the mean: blue below, white at it, red above, on a log scale from 2^-clip to 2^clip.
function shade(data, ratio) {
  const place = ratio > 0 ? (Math.log2(ratio) / data.clip + 1) / 2 : 0;
  return 3 * Math.max(0, Math.min(255, Math.round(place * 255)));
}

function clear(area, data, title) {
  area.pen.fillStyle = data.palette.paper;
  area.pen.fillRect(0, 0, area.width, area.height);
  area.pen.fillStyle = data.palette.ink;
  area.pen.font = "bold " + FONT;
  area.pen.textAlign = "left"; area.pen.textBaseline = "alphabetic";
  area.pen.fillText(title, 0, 13);
  area.pen.font = FONT;
}

function heat(area, data, ratios, names, title, chosen, axis) {
  const rows = names.length, columns = data.experts;
  const box = { left: 84, top: 22, width: area.width - 84 - 70, height: area.height - 22 - 34 };
  clear(area, data, title);
  const pixels = new ImageData(columns, rows);
  const silent = names.map((_, r) => ratios.subarray(r * columns, (r + 1) * columns).every((x) => x === 0));
  for (let i = 0; i < rows * columns; i++) {
    const at = shade(data, ratios[i]);
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = data.colours[at + c];
    pixels.data[4 * i + 3] = silent[Math.floor(i / columns)] ? 0 : 255;  // no token: nothing to be said
  }
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d").putImageData(pixels, 0, 0);
  const { pen } = area;
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, box.left, box.top, box.width, box.height);
  const tall = box.height / rows, wide = box.width / columns;
  if (tall >= 8 && wide >= 8) {
    pen.strokeStyle = data.palette.paper; pen.lineWidth = 1;
    for (let r = 1; r < rows; r++) line(pen, box.left, box.top + r * tall, box.left + box.width, box.top + r * tall);
    for (let c = 1; c < columns; c++) line(pen, box.left + c * wide, box.top, box.left + c * wide, box.top + box.height);
  }
  pen.strokeStyle = data.palette.ink;
  for (let g = 1; g < data.groups; g++) {
    const x = box.left + (box.width * g) / data.groups;
    pen.lineWidth = 1.2; line(pen, x, box.top - 3, x, box.top + box.height + 3);
  }
  if (chosen >= 0) {
    pen.lineWidth = 2; pen.strokeRect(box.left, box.top + chosen * tall, box.width, tall);
  }
  pen.fillStyle = data.palette.ink; pen.textBaseline = "middle"; pen.textAlign = "right";
  if (tall >= 12) {
    pen.fillStyle = data.palette.ink; pen.textAlign = "center"; pen.textBaseline = "middle";
    silent.forEach((is, r) => { if (is) pen.fillText("no tokens", box.left + box.width / 2, box.top + (r + 0.5) * tall); });
    pen.textAlign = "right";
  }
  const every = Math.ceil((13 * rows) / box.height);
  for (let r = 0; r < rows; r += every) pen.fillText(names[r], box.left - 6, box.top + (r + 0.5) * tall);
  pen.textAlign = "center"; pen.textBaseline = "top";
  const jump = [1, 2, 4, 8, 16, 32, 64].find((n) => (box.width / columns) * n >= 26) || 64;
  for (let c = 0; c < columns; c += jump) pen.fillText(c, box.left + (c + 0.5) * wide, box.top + box.height + 4);
  pen.fillText(axis, box.left + box.width / 2, box.top + box.height + 19);
  const bar = { left: box.left + box.width + 14, width: 12 };
  for (let y = 0; y < box.height; y++) {
    const at = shade(data, 2 ** (data.clip * (1 - (2 * y) / box.height)));
    pen.fillStyle = `rgb(${data.colours[at]},${data.colours[at + 1]},${data.colours[at + 2]})`;
    pen.fillRect(bar.left, box.top + y, bar.width, 1.5);
  }
  pen.fillStyle = data.palette.ink; pen.textAlign = "left"; pen.textBaseline = "middle";
  for (const [place, word] of [[0, "4x+"], [0.5, "mean"], [1, "≤¼x"]]) {
    pen.fillText(word, bar.left + bar.width + 4, box.top + 6 + place * (box.height - 12));
  }
}

// The step of an axis: 1, 2 or 5 times a power of ten, at least as large as asked.
function round_step(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(least, 1e-9)));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least * (1 - 1e-9));
}

// A shade of a colour: place -1 is dark, 0 the colour itself, 1 light.
function shaded(data, colour, place) {
  const parts = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  const own = parts(colour), other = parts(place < 0 ? data.palette.ink : data.palette.paper);
  const share = Math.abs(place) * (place < 0 ? 0.62 : 0.45);
  return `rgb(${own.map((c, i) => Math.round((1 - share) * c + share * other[i])).join(",")})`;
}

function line(pen, x0, y0, x1, y1) { pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x1, y1); pen.stroke(); }

function curves(area, data, title, xs, lines, marker, zero) {
  const { pen } = area, box = { left: 46, top: 24, width: area.width - 46 - 8, height: area.height - 24 - 34 };
  clear(area, data, title);
  if (lines.some((one) => one.end)) box.width -= 18;  // room for the names at the ends
  let low = zero ? 0 : Infinity, high = -Infinity;
  for (const one of lines) for (const y of one.ys) { if (y < low) low = y; if (y > high) high = y; }
  if (!(high > low)) { low = Math.min(0, low === Infinity ? 0 : low); high = low + 1; }
  if (lines.some((one) => one.name)) high += 0.16 * (high - low);  // room for the legend
  const step = round_step((high - low) / 4);
  low = step * Math.floor(low / step + 1e-9);
  high = step * Math.ceil(high / step - 1e-9);
  const last = xs.length ? xs[xs.length - 1] : 1, first = xs.length ? xs[0] : 0;
  const px = (x) => box.left + (box.width * (x - first)) / Math.max(1, last - first);
  const py = (y) => box.top + box.height * (1 - (y - low) / (high - low));
  pen.strokeStyle = "#d9d6cd"; pen.lineWidth = 1; pen.fillStyle = data.palette.ink;
  pen.textAlign = "right"; pen.textBaseline = "middle";
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  for (let t = 0; t <= Math.round((high - low) / step); t++) {
    const y = low + t * step;
    line(pen, box.left, py(y), box.left + box.width, py(y));
    pen.fillText(y.toFixed(digits).replace(/^-(0\.?0*)$/, "$1"), box.left - 4, py(y));  // no minus zero
  }
  pen.textBaseline = "top"; pen.textAlign = "center";
  const stride = Math.max(1, round_step((last - first) / 5));
  for (let x = stride * Math.ceil(first / stride); x <= last; x += stride) {
    pen.fillText(x, Math.min(px(x), area.width - 14), box.top + box.height + 4);
  }
  pen.fillText("training step", box.left + box.width / 2, box.top + box.height + 18);
  for (const one of lines) {
    pen.strokeStyle = one.colour; pen.lineWidth = one.wide || 1; pen.setLineDash(one.dash || []);
    pen.globalAlpha = one.alpha || 1;
    pen.beginPath();
    one.ys.forEach((y, i) => (i ? pen.lineTo(px(xs[i]), py(y)) : pen.moveTo(px(xs[i]), py(y))));
    pen.stroke();
  }
  pen.globalAlpha = 1; pen.setLineDash([]);
  names_at_ends(pen, lines.filter((one) => one.end && one.ys.length), py, box);
  if (marker !== null) {
    pen.strokeStyle = data.palette.ink; pen.lineWidth = 1; line(pen, px(marker), box.top, px(marker), box.top + box.height);
  }
  let x = box.left + 8;
  pen.textAlign = "left"; pen.textBaseline = "middle";
  for (const one of lines.filter((l) => l.name)) {
    pen.strokeStyle = one.colour; pen.lineWidth = 2; pen.setLineDash(one.dash || []);
    line(pen, x, box.top + 7, x + 22, box.top + 7);
    pen.fillStyle = data.palette.ink; pen.fillText(one.name, x + 26, box.top + 7);
    x += 40 + pen.measureText(one.name).width;
  }
  pen.setLineDash([]);
}

// Each line's name beside its end, moved apart where ends lie close.
function names_at_ends(pen, lines, py, box) {
  const ends = lines.map((one) => ({ text: one.end, y: py(one.ys[one.ys.length - 1]) })).sort((a, b) => a.y - b.y);
  for (let round = 0; round < 4 * ends.length; round++) {
    for (let i = 1; i < ends.length; i++) {
      const short = 12 - (ends[i].y - ends[i - 1].y);
      if (short > 0) { ends[i - 1].y -= short / 2; ends[i].y += short / 2; }
    }
  }
  pen.textAlign = "left"; pen.textBaseline = "middle";
  for (const end of ends) pen.fillText(end.text, box.left + box.width + 5, end.y);
}

function bars(area, data, title, values, names) {
  const { pen } = area, box = { left: 46, top: 24, width: area.width - 54, height: area.height - 24 - 34 };
  clear(area, data, title);
  const high = 1.12 * Math.max(2, ...values), wide = box.width / values.length;
  values.forEach((value, i) => {
    const tall = (box.height * value) / high;
    pen.fillStyle = data.palette.communication; pen.strokeStyle = data.palette.ink; pen.lineWidth = 0.8;
    pen.fillRect(box.left + (i + 0.15) * wide, box.top + box.height - tall, 0.7 * wide, tall);
    pen.strokeRect(box.left + (i + 0.15) * wide, box.top + box.height - tall, 0.7 * wide, tall);
    pen.fillStyle = data.palette.ink; pen.textAlign = "center"; pen.textBaseline = "top";
    pen.fillText(names[i], box.left + (i + 0.5) * wide, box.top + box.height + 4);
    pen.textBaseline = "bottom";
    pen.fillText(value.toFixed(2), box.left + (i + 0.5) * wide, box.top + box.height - tall - 1);
  });
  pen.textBaseline = "top"; pen.textAlign = "center";
  pen.fillText("node (one group of experts)", box.left + box.width / 2, box.top + box.height + 18);
  pen.setLineDash([4, 3]); pen.strokeStyle = data.palette.ink;
  line(pen, box.left, box.top + box.height * (1 - 1 / high), box.left + box.width, box.top + box.height * (1 - 1 / high));
  pen.setLineDash([]);
}

// Load relative to the mean of its row, from counts at an offset.
function ratios(counts, offset, rows, columns) {
  const out = new Float32Array(rows * columns);
  for (let r = 0; r < rows; r++) {
    let total = 0;
    for (let c = 0; c < columns; c++) total += counts[offset + r * columns + c];
    for (let c = 0; c < columns && total; c++) out[r * columns + c] = (counts[offset + r * columns + c] * columns) / total;
  }
  return out;
}

export function mount(root, bytes) {
  let data = unpack(bytes), follows = true;
  // The attribute, and the end of the event below, keep JupyterLab from taking the slider's arrow keys itself.
  const shadow = element("div", root, { class: "dsv3-load", "data-lm-suppress-shortcuts": "true" });
  for (const kind of ["keydown", "keyup", "mousedown", "pointerdown"]) {
    shadow.addEventListener(kind, (event) => event.stopPropagation());
  }
  element("style", shadow, {}, STYLE);
  const title = element("h3", shadow), state = element("p", shadow, { class: "state", role: "status" });
  const controls = element("div", shadow, { class: "controls" });
  const stepLabel = element("label", controls, {}, "step");
  const slider = element("input", stepLabel, { type: "range", class: "step", min: 0, "aria-label": "training step" });
  const stepWords = element("output", stepLabel);
  const layer = element("select", element("label", controls, {}, "layer"), { class: "layer", "aria-label": "layer" });
  const domain = element("select", element("label", controls, {}, "text"), { class: "domain", "aria-label": "text domain" });
  const rankLabel = element("label", controls, {}, "rank");
  const rank = element("select", rankLabel, { class: "rank", "aria-label": "rank of the run" });
  const top = element("div", shadow), middle = element("div", shadow, { class: "row" }), low = element("div", shadow, { class: "row" }), last = element("div", shadow);
  const words = element("div", shadow, { class: "words", role: "status", "aria-live": "polite" });
  let areas = {};

  function build() {
    shadow.style.setProperty("--ink", data.palette.ink);
    shadow.style.setProperty("--paper", data.palette.paper);
    title.textContent = data.title || "Load of every expert";
    top.replaceChildren(); middle.replaceChildren(); low.replaceChildren(); last.replaceChildren();
    const rows = data.layers.length;
    areas.load = canvas(top, 970, Math.min(420, 56 + Math.max(rows * 7, Math.min(rows * 26, 220))), "Heat map of load, layers by experts");
    const moved = data.bias.length > 0;  // a bias that stands still needs no chart
    areas.vio = canvas(middle, moved ? 476 : 970, 210, "MaxVio over the steps");
    areas.bias = moved ? canvas(middle, 476, 210, "Routing bias over the steps") : null;
    middle.style.gridTemplateColumns = moved ? "1fr 1fr" : "1fr";
    low.style.gridTemplateColumns = data.domains.length && data.groups > 1 ? "2fr 1fr" : "1fr";
    areas.domains = data.domains.length ? canvas(low, 640, 56 + 24 * data.domains.length, "Heat map of load, text domains by experts") : null;
    areas.nodes = data.groups > 1 ? canvas(low, 312, 56 + 24 * Math.max(6, data.domains.length), "Load of each node") : null;
    areas.ranks = data.ranks ? canvas(last, 970, 56 + Math.max(7 * (data.ranks + 1), Math.min(24 * (data.ranks + 1), 220)), "Heat map of load, ranks by experts") : null;
    rankLabel.style.display = data.ranks ? "" : "none";
    const keep = [layer.value || "0", domain.value || "-1", rank.value || "-1"];
    layer.replaceChildren(); domain.replaceChildren(); rank.replaceChildren();
    data.layers.forEach((name, i) => element("option", layer, { value: i }, name));
    element("option", domain, { value: -1 }, "all text");
    data.domains.forEach((name, i) => element("option", domain, { value: i }, name));
    rankNames().forEach((name, i) => element("option", rank, { value: i - 1 }, name));
    rank.value = keep[2] < data.ranks ? keep[2] : "-1";
    layer.value = keep[0] < data.layers.length ? keep[0] : "0";
    domain.value = keep[1] < data.domains.length ? keep[1] : "-1";
  }

  function rankNames() { return ["all ranks", ...Array.from({ length: data.ranks }, (_, i) => `rank ${i}`)]; }

  // The latest steps' loads of one layer, up to a frame: a row for each of so many parts (domains, ranks, or 1).
  function recent(counts, parts, f, l) {
    const columns = data.experts, size = data.layers.length * columns, out = new Float32Array(parts * columns);
    for (let i = 0; i < parts; i++) {
      const sum = new Float64Array(columns);
      for (let g = f; g >= 0 && data.last[f] - data.first[g] < data.recent_steps; g--) {
        const from = (g * parts + i) * size + l * columns;
        for (let e = 0; e < columns; e++) sum[e] += counts[from + e];
      }
      out.set(ratios(sum, 0, 1, columns), i * columns);
    }
    return out;
  }

  function draw() {
    const frames = data.last.length, rows = data.layers.length, columns = data.experts, size = rows * columns;
    slider.max = Math.max(0, frames - 1);
    if (follows) slider.value = frames - 1;
    if (!frames) { words.textContent = "No step has been recorded yet."; stepWords.textContent = "none"; return; }
    const f = Number(slider.value), l = Number(layer.value), d = Number(domain.value), r = Number(rank.value), n = data.domains.length;
    const span = data.first[f] === data.last[f] ? `${data.last[f]}` : `${data.first[f]}–${data.last[f]}`;
    stepWords.textContent = `${span} of ${data.steps[data.steps.length - 1]}`;
    const [counts, at, text] = r >= 0 ? [data.rank, (f * data.ranks + r) * size, `rank ${r}`]
      : d >= 0 ? [data.domain, (f * n + d) * size, data.domains[d]] : [data.load, f * size, "all text"];
    const now = ratios(counts, at, rows, columns);
    heat(areas.load, data, now, data.layers, `Load relative to the mean · step ${span} · ${text}`, l, "expert (lines part the groups, one node each)");
    const mean = [], mine = [];
    for (let s = 0; s < data.steps.length; s++) {
      let sum = 0;
      for (let r = 0; r < rows; r++) sum += data.violation[s * rows + r];
      mean.push(sum / rows); mine.push(data.violation[s * rows + l]);
    }
    const colour = data.palette;
    curves(areas.vio, data, "MaxVio: load of the fullest expert / mean − 1" + (data.ranks ? " · all ranks" : ""), data.steps,
      [{ ys: mean, colour: colour.neutral, dash: [2, 3], wide: 2, name: "mean of layers" }, { ys: mine, colour: colour.content, wide: 2, name: data.layers[l] }], data.last[f], true);
    if (areas.bias) {
      const named = columns <= 16, wanted = shown(l), biases = wanted.map((e, i) => ({
        ys: data.bias_steps.map((_, s) => data.bias[s * size + l * columns + e]), wide: 1.5,
        colour: shaded(data, colour.bias, wanted.length > 1 ? (2 * i) / (wanted.length - 1) - 1 : 0),
        dash: [[], [6, 2], [2, 1.5]][i % 3], end: named ? String(e) : "",
      }));
      curves(areas.bias, data, `Bias of ${biases.length} experts, added to the affinity · ${data.layers[l]}`, data.bias_steps, biases, data.last[f], false);
    }
    if (areas.domains) {
      heat(areas.domains, data, recent(data.domain, n, f, l), data.domains, `Who works for which text, last ${data.recent_steps} steps · ${data.layers[l]}`, d, "expert");
    }
    if (areas.ranks) {
      const by = new Float32Array((data.ranks + 1) * columns);
      by.set(recent(data.load, 1, f, l));
      by.set(recent(data.rank, data.ranks, f, l), columns);
      heat(areas.ranks, data, by, rankNames(), `What each rank computed, last ${data.recent_steps} steps · ${data.layers[l]}`, r + 1, "expert");
    }
    let words_nodes = "";
    if (areas.nodes) {
      const each = columns / data.groups, nodes = new Array(data.groups).fill(0);
      for (let e = 0; e < columns; e++) nodes[Math.floor(e / each)] += now[l * columns + e] / each;
      bars(areas.nodes, data, `Visits to each node, mean 1 · ${data.layers[l]}`, nodes, nodes.map((_, i) => i));
      words_nodes = ` Fullest node ${nodes.indexOf(Math.max(...nodes))}.`;
    }
    let best = 0;
    for (let e = 1; e < columns; e++) if (now[l * columns + e] > now[l * columns + best]) best = e;
    const peak = now[l * columns + best];
    words.textContent = peak > 0
      ? `Step ${span}, ${data.layers[l]}, ${text}: expert ${best} is the fullest, ${peak.toFixed(2)} times the mean, so MaxVio is ${(peak - 1).toFixed(2)}.${words_nodes}`
      : `Step ${span}, ${data.layers[l]}, ${text}: no token.`;
  }

  // In the order in which they end; where there are too many, those that end furthest out.
  function shown(l) {
    const columns = data.experts, all = Array.from({ length: columns }, (_, e) => e);
    const end = (data.bias_steps.length - 1) * data.layers.length * columns + l * columns;
    all.sort((a, b) => data.bias[end + a] - data.bias[end + b]);
    return columns <= 32 ? all : [...all.slice(0, 16), ...all.slice(-16)];
  }

  slider.addEventListener("input", () => { follows = slider.value === slider.max; draw(); });
  layer.addEventListener("change", draw);
  // What a domain's text was to one rank is not known: choosing one shows all of the other.
  domain.addEventListener("change", () => { rank.value = "-1"; draw(); });
  rank.addEventListener("change", () => { domain.value = "-1"; draw(); });
  top.addEventListener("click", (event) => {
    const box = areas.load.made.getBoundingClientRect(), scale = areas.load.height / box.height;
    const row = Math.floor((((event.clientY - box.top) * scale - 22) / (areas.load.height - 56)) * data.layers.length);
    if (row >= 0 && row < data.layers.length) { layer.value = row; draw(); }
  });
  build(); draw();
  const shape = () => JSON.stringify([data.layers, data.experts, data.groups, data.domains, data.ranks, data.title, data.bias.length > 0]);
  return {
    update(next) { const before = shape(); data = unpack(next); if (shape() !== before) build(); draw(); },
    say(text) { state.textContent = text; },
  };
}

function render({ model, el }) {
  const view = mount(el, model.get("packet"));
  view.say(model.get("state"));
  model.on("change:packet", () => view.update(model.get("packet")));
  model.on("change:state", () => view.say(model.get("state")));
}

export default { render };
