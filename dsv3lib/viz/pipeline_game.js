// The game: put the actions in order yourself; Python runs what stands there so far and scores it.

function render({ model, el }) {
  const root = frame(el);
  element("h3", root, {}, "Order the actions yourself");
  const row = element("div", root, { class: "controls" });
  const undo = element("button", row, { class: "undo" }, "take the last one back");
  const again = element("button", row, { class: "again" }, "start again");
  const score = element("output", row, { class: "score" });
  const table = element("table", root, { class: "ranks" });
  const wrong = element("div", root, { class: "wrong", role: "alert" });
  const picture = element("canvas", root, { role: "img" });
  const words = element("div", root, { class: "words", role: "status", "aria-live": "polite" });
  let data = null;

  function play(moves) { model.set("moves", moves); model.save_changes(); }

  function load() {
    data = JSON.parse(model.get("data"));
    root.style.setProperty("--ink", data.palette.ink); root.style.setProperty("--paper", data.palette.paper);
    const focused = root.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    table.replaceChildren();
    data.choices.forEach((choices, rank) => {
      const line = element("tr", table);
      element("td", line, {}, `rank ${rank}`);
      const cell = element("td", line);
      for (const text of choices) {
        const button = element("button", cell, { "data-key": `${rank} ${text[0]}`, class: "move" }, text);
        button.addEventListener("click", () => play([...model.get("moves"), [rank, text]]));
      }
      if (!choices.length) cell.textContent = "done";
    });
    if (focused) root.querySelector(`[data-key="${focused}"]`)?.focus();
    wrong.textContent = data.waiting;
    score.textContent = data.score;
    words.textContent = data.words;
    const area = resize(picture, 980, 60 + 34 * data.stages), { pen } = area;
    pen.fillStyle = data.palette.paper; pen.fillRect(0, 0, area.width, area.height);
    legend(pen, data.palette, data.names, 34, 10);
    boxes(area, data, { left: 34, top: 24, width: 920, height: area.height - 60 }, Infinity);
    picture.setAttribute("aria-label", `Your schedule so far. ${data.score} ${data.words}`);
  }

  undo.addEventListener("click", () => play(model.get("moves").slice(0, -1)));
  again.addEventListener("click", () => play([]));
  model.on("change:data", load);
  load();
}

export default { render };
