// A schedule stepped by a slider: Python simulates when a control changes, everything else happens here.

const SIZES = [["stages", "ranks", 1], ["microbatches", "micro-batches", 1]];
const COSTS = [["F", "F", 0.1], ["B", "B", 0.1], ["W", "W", 0.1], ["FB", "F&B", 0.1], ["communication", "send", 0.1]];

function live(curve, t) {
  let now = 0;
  for (const [at, count] of curve) { if (at > t + 1e-9) break; now = count; }
  return now;
}

function render({ model, el }) {
  const root = frame(el);
  const title = element("h3", root);
  const controls = element("div", root, { class: "controls" });
  const name = element("select", element("label", controls, {}, "schedule"), { class: "schedule", "aria-label": "schedule" });
  const inputs = {};
  for (const [key, words, step] of [...SIZES, ...COSTS]) {
    const label = element("label", controls, {}, words);
    inputs[key] = element("input", label, { type: "number", class: key, min: step === 1 ? 1 : 0, step, "aria-label": words });
  }
  const steps = element("div", root, { class: "controls" });
  const slider = element("input", element("label", steps, {}, "time"), { type: "range", class: "time", min: 0, "aria-label": "time" });
  const clock = element("output", steps);
  const wrong = element("div", root, { class: "wrong", role: "alert" });
  const picture = element("canvas", root, { role: "img" });
  const words = element("div", root, { class: "words", role: "status", "aria-live": "polite" });
  let data = null, area = null, find = () => null, moments = [];

  function load() {
    const next = JSON.parse(model.get("data"));
    wrong.textContent = next.error || "";
    if (!next.events) return;
    const atEnd = !data || slider.value === slider.max, share = data ? slider.value / (slider.max || 1) : 1;
    data = next;
    if (!name.children.length) for (const [key, text] of data.schedules) element("option", name, { value: key }, text);
    name.value = data.settings.name;
    for (const [key] of [...SIZES, ...COSTS]) if (document.activeElement !== inputs[key]) inputs[key].value = short(data.settings[key]);
    root.style.setProperty("--ink", data.palette.ink); root.style.setProperty("--paper", data.palette.paper);
    moments = [...new Set([...data.events.map((e) => e[1]), data.makespan])].sort((a, b) => a - b);
    slider.max = moments.length - 1;
    slider.value = atEnd ? slider.max : Math.round(share * (moments.length - 1));
    draw();
  }

  function draw() {
    const began = performance.now(), now = moments[slider.value];
    const height = 60 + Math.min(560, Math.max(90, data.stages * (data.stages <= 8 ? 32 : 25)));
    area = resize(picture, 980, height);
    const { pen } = area, { palette } = data;
    pen.fillStyle = palette.paper; pen.fillRect(0, 0, area.width, area.height);
    const box = { left: 34, top: 24, width: 700, height: height - 60 }, tall = box.height / data.stages;
    legend(pen, palette, data.names, box.left, 10);
    find = boxes(area, data, box, now);
    pen.strokeStyle = palette.ink; pen.lineWidth = 1.6;
    const x = box.left + (now / (data.makespan || 1)) * box.width;
    line(pen, x, box.top - 3, x, box.top + box.height);
    const counts = data.live.map((curve) => live(curve, now));
    for (const [left, values, most, colour, text] of [
      [box.left + box.width + 22, data.bubble, data.bubble, palette.neutral, "idle time"],
      [box.left + box.width + 132, counts, data.peak, palette.content, "alive now | peak"],
    ]) {
      const scale = 66 / Math.max(...most, 1);
      pen.textBaseline = "middle"; pen.textAlign = "left";
      values.forEach((value, r) => {
        const y = box.top + (r + 0.12) * tall;
        pen.fillStyle = colour; pen.fillRect(left, y, value * scale, tall * 0.76);
        pen.strokeStyle = palette.ink; pen.lineWidth = 1.2; line(pen, left + most[r] * scale, y, left + most[r] * scale, y + tall * 0.76);
        pen.fillStyle = palette.ink;
        const label = most === values ? short(value) : `${short(value)} | ${short(most[r])}`;
        if (tall >= 11) pen.fillText(label, left + most[r] * scale + 4, y + tall * 0.38);
      });
      pen.textBaseline = "top"; pen.fillText(text, left, box.top + box.height + 4);
    }
    title.textContent = data.title;
    clock.textContent = `${short(now)} of ${short(data.makespan)}`;
    const busy = data.events.filter((e) => e[1] <= now && now < e[2]).length, fullest = counts.indexOf(Math.max(...counts));
    words.textContent = `At ${short(now)}: ${busy} of ${data.stages} ranks compute; most alive on rank ${fullest}: ${short(counts[fullest])}. ` +
      `In all: idle at most ${short(Math.max(...data.bubble))} a rank (${(100 * data.share).toFixed(1)} % of the time), ` +
      `peak ${short(Math.max(...data.peak))} micro-batches, parameters ${short(data.copies)} x.`;
    picture.setAttribute("aria-label", `${data.title}, drawn up to time ${short(now)}. ${words.textContent}`);
    root.dataset.drawMs = (performance.now() - began).toFixed(1);
  }

  function ask(changed) {
    const settings = { name: name.value };
    for (const [key] of [...SIZES, ...COSTS]) settings[key] = Number(inputs[key].value);
    if (changed === "F" || changed === "B") settings.FB = settings.F + settings.B;  // until it is set by itself again
    model.set("settings", settings);
    model.save_changes();
  }

  name.addEventListener("change", () => ask("name"));
  for (const [key] of [...SIZES, ...COSTS]) inputs[key].addEventListener("change", () => ask(key));
  slider.addEventListener("input", draw);
  picture.addEventListener("mousemove", (event) => {
    const found = area && find(...place(event, area));
    picture.title = found ? `rank ${found[0]}: ${nameOf(found)}, ${short(found[1])} to ${short(found[2])}` : "";
  });
  model.on("change:data", load);
  load();
}

export default { render };
