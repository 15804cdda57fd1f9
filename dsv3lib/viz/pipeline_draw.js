// What the pipeline view and the game share: elements, a sharp canvas, and boxes of actions in time.

const FONT = "12px 'DejaVu Sans', system-ui, sans-serif";
const STYLE = `
.dsv3-pipe{color:var(--ink);background:var(--paper);font:13px 'DejaVu Sans',system-ui,sans-serif;padding:10px 12px;
  max-width:1010px;border-radius:4px;box-sizing:border-box}
.dsv3-pipe h3{margin:0 0 4px 0;font-size:15px;color:inherit}
.dsv3-pipe .controls{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:center;margin-bottom:6px}
.dsv3-pipe label{display:inline-flex;gap:5px;align-items:center;color:inherit}
.dsv3-pipe input[type=number]{width:4.6em} .dsv3-pipe .time{width:330px}
.dsv3-pipe select,.dsv3-pipe input[type=number],.dsv3-pipe button{font:inherit;color:#1d1d1f;background:#fff}
.dsv3-pipe button{border:1px solid #8a8a8a;border-radius:3px;padding:1px 7px;cursor:pointer}
.dsv3-pipe button:focus-visible{outline:2px solid #0362a0}
.dsv3-pipe canvas{display:block;max-width:100%} .dsv3-pipe .words{margin-top:4px;min-height:2.6em}
.dsv3-pipe .wrong{color:#871f22;font-weight:bold} .dsv3-pipe .ranks td{padding:2px 4px;text-align:left}`;

// Kind -> (meaning, from, to) of the bands of its box; the forward band of a pair is its first part's.
const BANDS = {
  F: [["forward", 0, 1]], I: [["backward-input", 0, 1]], W: [["backward-weight", 0, 1]],
  B: [["backward-input", 0, 0.5], ["backward-weight", 0.5, 1]],
  FB: [["forward", 0, 0.5], ["backward-input", 0.5, 0.75], ["backward-weight", 0.75, 1]],
};

function element(tag, parent, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  parent.append(made);
  return made;
}

// A frame whose keys and clicks JupyterLab does not take for itself.
function frame(el) {
  const root = element("div", el, { class: "dsv3-pipe", "data-lm-suppress-shortcuts": "true" });
  for (const kind of ["keydown", "keyup", "mousedown", "pointerdown"]) {
    root.addEventListener(kind, (event) => event.stopPropagation());
  }
  element("style", root, {}, STYLE);
  return root;
}

function resize(made, width, height) {
  const scale = Math.max(1, Math.min(2, window.devicePixelRatio || 1));
  made.width = width * scale; made.height = height * scale;
  made.style.width = width + "px";
  const pen = made.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  return { made, pen, width, height };
}

function line(pen, x0, y0, x1, y1) { pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x1, y1); pen.stroke(); }

function stripes(pen, paper) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const small = tile.getContext("2d");
  small.strokeStyle = paper; small.lineWidth = 1.3;
  for (const shift of [-6, 0, 6]) line(small, shift, 6, shift + 6, 0);
  return pen.createPattern(tile, "repeat");
}

// An event is [rank, start, end, kind, direction, micro-batch, and those of a pair's backward].
function nameOf(event) {
  const [, , , kind, d, m, d2, m2] = event;
  return kind === "FB" ? `[F${d}.${m} & B${d2}.${m2}]` : `${kind}${d}.${m}`;
}

function legend(pen, palette, names, x, y) {
  pen.textAlign = "left"; pen.textBaseline = "middle"; pen.font = FONT;
  for (const [meaning, name] of [...Object.entries(names), ["", "striped: direction or chunk 1"]]) {
    if (meaning) {
      pen.fillStyle = palette[meaning]; pen.fillRect(x, y - 6, 18, 12);
      pen.strokeStyle = palette.ink; pen.lineWidth = 0.6; pen.strokeRect(x, y - 6, 18, 12);
      x += 23;
    }
    pen.fillStyle = palette.ink; pen.fillText(name, x, y);
    x += pen.measureText(name).width + 18;
  }
}

// Draws the boxes; those that begin after `now` are faded. Returns a function (x, y) -> event or null.
function boxes(area, data, box, now) {
  const { pen } = area, { palette } = data, tall = box.height / data.stages, wide = box.width / (data.makespan || 1);
  const pattern = stripes(pen, palette.paper), high = tall * 0.86;
  pen.font = FONT; pen.lineWidth = 0.6;
  for (const event of data.events) {
    const [rank, start, end, kind, d, m, d2, m2] = event;
    const x = box.left + start * wide, width = (end - start) * wide, y = box.top + (rank + 0.07) * tall;
    pen.globalAlpha = start > now ? 0.22 : 1;
    for (const [meaning, from, to] of BANDS[kind]) {
      const direction = kind === "FB" && meaning !== "forward" ? d2 : d;
      pen.fillStyle = palette[meaning];
      pen.fillRect(x, y + from * high, width, (to - from) * high);
      if (direction % 2) { pen.fillStyle = pattern; pen.fillRect(x, y + from * high, width, (to - from) * high); }
    }
    pen.strokeStyle = palette.ink;
    pen.strokeRect(x, y, width, high);
    if (width >= 15 && high >= 11 && start <= now) {
      const words = kind === "FB" && high >= 24 ? [m, m2] : [kind === "FB" ? `${m},${m2}` : m];
      pen.textAlign = "center"; pen.textBaseline = "middle";
      words.forEach((word, i) => {
        const at = y + (high * (2 * i + 1)) / (2 * words.length), half = pen.measureText(word).width / 2 + 1;
        if (2 * half > width) return;
        pen.globalAlpha = 0.6; pen.fillStyle = palette.ink; pen.fillRect(x + width / 2 - half, at - 6, 2 * half, 12);
        pen.globalAlpha = 1; pen.fillStyle = "#fff"; pen.fillText(word, x + width / 2, at + 0.5);
      });
    }
  }
  pen.globalAlpha = 1; pen.fillStyle = palette.ink; pen.strokeStyle = palette.ink;
  pen.textAlign = "right"; pen.textBaseline = "middle";
  const every = Math.ceil((13 * data.stages) / box.height);
  for (let r = 0; r < data.stages; r += every) pen.fillText(r, box.left - 6, box.top + (r + 0.5) * tall);
  pen.lineWidth = 1;
  line(pen, box.left, box.top + box.height, box.left + box.width, box.top + box.height);
  pen.textAlign = "center"; pen.textBaseline = "top";
  const raw = data.makespan / 8 || 1, power = 10 ** Math.floor(Math.log10(raw));
  const jump = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  for (let t = 0; t <= data.makespan + 1e-9; t += jump) {
    pen.fillText(+t.toFixed(6), box.left + t * wide, box.top + box.height + 4);
    line(pen, box.left + t * wide, box.top + box.height, box.left + t * wide, box.top + box.height + 3);
  }
  pen.fillText("time (in units of the costs)", box.left + box.width / 2, box.top + box.height + 18);
  return (px, py) => {
    const rank = Math.floor((py - box.top) / tall), t = (px - box.left) / wide;
    return data.events.find((e) => e[0] === rank && e[1] <= t && t < e[2]) || null;
  };
}

function place(event, area) {
  const shown = area.made.getBoundingClientRect(), scale = area.width / shown.width;
  return [(event.clientX - shown.left) * scale, (event.clientY - shown.top) * scale];
}

function short(value) { return +Number(value).toFixed(3); }
