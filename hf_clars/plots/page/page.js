"use strict";
// What is shown, and what the reader does: choose, point, zoom, hold a layer.

const stored = JSON.parse(document.getElementById("data").textContent);
const runs = stored.runs.map((run) => new Run(run));
const byId = (id) => document.getElementById(id);
const canvases = [...document.querySelectorAll("canvas.map")];
const palettes = Object.fromEntries(Object.entries(stored.palettes).map(([name, data]) => [name, bytesOf(data)]));

const state = {
  quantity: stored.quantities[0].name,
  shown: [0, runs.length > 1 ? 1 : -1], // which run each map shows; -1: none
  view: null, // {x0, x1: steps, y0, y1: rows}
  cursor: null, // {side, row, step}
  held: null, // the layer that the chart keeps
  drag: null,
  tap: null, // where a finger came down
};
const painted = new Map(); // cells by run, quantity and scale

// ---- what is shown -------------------------------------------------------------------------------------------------

function sides() { return [0, 1].filter((side) => state.shown[side] >= 0); }
function runOf(side) { return runs[state.shown[side]]; }
function described() { return stored.quantities.find((quantity) => quantity.name === state.quantity); }

function everything() {
  const all = sides().map(runOf);
  return {
    x0: Math.min(...all.map((run) => run.edges[0])), x1: Math.max(...all.map((run) => run.edges[run.columns])),
    y0: 0, y1: Math.max(...all.map((run) => run.layers.length)),
  };
}

// One scale for both maps, so that equal colours are equal values; null if neither run has a value.
function commonScale() {
  const ranges = sides().map(runOf).filter((run) => run.has(state.quantity)).map((run) => run.stored[state.quantity]);
  if (!ranges.length) return null;
  return {
    low: Math.min(...ranges.map((range) => range.shown_low)), high: Math.max(...ranges.map((range) => range.shown_high)),
    palette: palettes[described().colours],
  };
}

function cellsOf(side, scale) {
  const run = runOf(side);
  if (scale === null || !run.has(state.quantity)) return null;
  const key = [state.shown[side], state.quantity, scale.low, scale.high].join();
  if (!painted.has(key)) painted.set(key, paintCells(run, state.quantity, scale));
  return painted.get(key);
}

// The cursor in a map: the pointed cell there, and the layer of the same name at the same step in the other.
function cursorIn(side) {
  const cursor = state.cursor, run = runOf(side);
  if (cursor === null) return { row: -1, column: -1 };
  const layer = runOf(cursor.side).layers[cursor.row];
  return { row: run.rows.get(layer) ?? -1, column: run.columnAt(cursor.step) };
}

function draw() {
  const scale = commonScale();
  for (const side of [0, 1]) {
    canvases[side].parentElement.hidden = state.shown[side] < 0;
    if (state.shown[side] < 0) continue;
    const run = runOf(side), selection = state.drag && state.drag.side === side ? selectionOf(state.drag) : null;
    const short = run.prefix ? `; names without ${run.prefix}` : "";
    canvases[side].previousElementSibling.textContent = `${run.name}: ${described().label}${short}`;
    canvases[side].setAttribute("aria-label", `Heat map of ${described().label} of ${run.name}, ` +
      `${run.layers.length} layers by ${run.columns} columns of steps`);
    drawMap(canvases[side], run, cellsOf(side, scale), state.view, cursorIn(side), selection);
  }
  byId("scale").hidden = scale === null;
  if (scale !== null) drawScale(byId("scale"), scale, described().label);
  const { x0, x1, y0, y1 } = state.view;
  byId("range").textContent =
    `steps ${grouped(Math.ceil(x0))} to ${grouped(Math.floor(x1))}, layers ${Math.floor(y0) + 1} to ${Math.ceil(y1)}`;
  tell();
  drawLayer();
  drawLosses();
  drawNoise();
}

function tell() {
  if (state.cursor === null) return;
  const layer = runOf(state.cursor.side).layers[state.cursor.row];
  const lines = sides().map((side) => {
    const run = runOf(side), { row, column } = cursorIn(side);
    if (row < 0) return `${run.name}: has no such layer`;
    if (column < 0) return `${run.name}: has no such step`;
    return `${run.name}: ${described().symbol} = ${run.shown(state.quantity, row, column)}, ${run.stepsOf(column)}`;
  });
  byId("readout").textContent = `layer ${layer}\n${lines.join("\n")}`;
}

function drawLayer() {
  const layer = state.held ?? (state.cursor && runOf(state.cursor.side).layers[state.cursor.row]);
  const lines = sides().map((side, index) => {
    const run = runOf(side), row = run.rows.get(layer ?? run.layers[0]);
    const values = row === undefined ? null : run.values(state.quantity);
    return { series: index, points: values === null ? [] : run.firstSteps.map((first, column) =>
      [(run.edges[column] + run.edges[column + 1]) / 2, values[row * run.columns + column]]) };
  });
  const names = sides().map((side, index) => `${runOf(side).name} (${index ? "dashed" : "solid"})`).join(", ");
  byId("layer-caption").textContent = `${described().symbol} of layer ${layer ?? runOf(0).layers[0]}` +
    `${state.held === null ? "" : " (held)"}: ${names}`;
  drawChart(byId("layer"), lines, state.view, state.cursor && state.cursor.step);
}

// The losses of the shown runs over the same steps as the maps: lines for training, dots for evaluation.
function drawLosses() {
  const lines = sides().flatMap((side, index) => [
    { series: index, points: runOf(side).loss },
    { series: index, points: runOf(side).evalLoss, dots: true },
  ]);
  const some = lines.some((line) => line.points.length);
  byId("losses").hidden = !some;
  byId("maps").className = sides().length === 1 ? "single" : "";
  if (!some) return;
  const names = sides().map((side, index) => `${runOf(side).name} (${index ? "dashed" : "solid"})`).join(", ");
  byId("loss-caption").textContent = `Loss (lines: training, dots: evaluation): ${names}`;
  drawChart(byId("loss"), lines, state.view, state.cursor && state.cursor.step);
}

// The whole model's noise scale with one standard error, and the batch size that was used.
function drawNoise() {
  const drawn = sides().filter((side) => runOf(side).noise.length);
  byId("noises").hidden = !drawn.length;
  if (!drawn.length) return;
  const lines = drawn.flatMap((side) => {
    const points = runOf(side).noise, series = sides().indexOf(side);
    return [
      { series, points: points.map(([step, value]) => [step, value ?? NaN]),
        band: points.map(([step, value, low, high]) => [step, value === null ? NaN : low ?? 0, high ?? Infinity]) },
      { series, points: points.map(([step, , , , size]) => [step, size]), dash: [2, 4] },
    ];
  });
  const names = drawn.map((side) => runOf(side).name).join(", ");
  byId("noise-caption").textContent =
    `Noise scale of the whole model, in samples, ± 1 standard error (dots: the batch size): ${names}`;
  drawChart(byId("noise"), lines, state.view, state.cursor && state.cursor.step);
}

// ---- zooming and moving --------------------------------------------------------------------------------------------

function placeOf(side, event) {
  const bounds = canvases[side].getBoundingClientRect(), box = mapBox(canvases[side]), view = state.view;
  const across = (event.clientX - bounds.left - box.left) / box.width;
  const down = (event.clientY - bounds.top - box.top) / box.height;
  return { across, down, step: view.x0 + across * (view.x1 - view.x0), row: view.y0 + down * (view.y1 - view.y0) };
}

function point(side, step, row) {
  const run = runOf(side);
  state.cursor = {
    side,
    row: Math.min(run.layers.length - 1, Math.max(0, Math.floor(row))),
    step: Math.min(run.edges[run.columns], Math.max(run.edges[0], step)),
  };
}

// Show [from, to] of an axis of [least, most], at least `narrowest` of it.
function within(from, to, least, most, narrowest) {
  const span = Math.min(most - least, Math.max(narrowest, to - from));
  const start = Math.min(most - span, Math.max(least, (from + to - span) / 2));
  return [start, start + span];
}

function show(x0, x1, y0, y1) {
  const all = everything();
  [x0, x1] = within(x0, x1, all.x0, all.x1, 2);
  [y0, y1] = within(y0, y1, all.y0, all.y1, 1);
  state.view = { x0, x1, y0, y1 };
}

function zoom(factor, across, down, layersToo) {
  const { x0, x1, y0, y1 } = state.view;
  const spread = (from, to, place) => {
    const centre = from + place * (to - from);
    return [centre - (centre - from) * factor, centre + (to - centre) * factor];
  };
  if (layersToo) show(x0, x1, ...spread(y0, y1, down)); else show(...spread(x0, x1, across), y0, y1);
}

function zoomAtCursor(factor, layersToo) {
  const { x0, x1, y0, y1 } = state.view, cursor = state.cursor;
  const across = cursor ? (cursor.step - x0) / (x1 - x0) : 0.5, down = cursor ? (cursor.row + 0.5 - y0) / (y1 - y0) : 0.5;
  zoom(factor, across, down, layersToo);
}

// Steps and layers at once, but not closer than to a few of either.
function zoomBoth(factor) {
  const { y0, y1 } = state.view;
  zoomAtCursor(factor, false);
  if (factor > 1 || y1 - y0 > 6) zoomAtCursor(factor, true);
}

function move(side, columns, rows) {
  if (state.cursor === null || state.cursor.side !== side) point(side, state.view.x0, state.view.y0);
  const run = runOf(side), cursor = state.cursor;
  const column = Math.min(run.columns - 1, Math.max(0, run.columnAt(cursor.step) + columns));
  point(side, (run.edges[column] + run.edges[column + 1]) / 2, cursor.row + rows);
  const { x0, x1, y0, y1 } = state.view, { step, row } = state.cursor;
  const sideways = step < x0 ? step - x0 : step > x1 ? step - x1 : 0;
  const down = row < y0 ? row - y0 : row + 1 > y1 ? row + 1 - y1 : 0;
  show(x0 + sideways, x1 + sideways, y0 + down, y1 + down);
}

function selectionOf(drag) {
  const [x, y] = [Math.min(drag.x, drag.toX), Math.min(drag.y, drag.toY)];
  return { x, y, width: Math.abs(drag.toX - drag.x), height: Math.abs(drag.toY - drag.y) };
}

function showAll() { state.view = everything(); }

// ---- events --------------------------------------------------------------------------------------------------------

function listen(canvas, side) {
  const on = (name, handle) => canvas.addEventListener(name, (event) => { handle(event); draw(); }, { passive: false });
  on("pointermove", (event) => {
    const place = placeOf(side, event);
    point(side, place.step, place.row);
    if (state.drag) [state.drag.toX, state.drag.toY] = [event.offsetX, event.offsetY];
  });
  on("pointerdown", (event) => {
    if (event.pointerType === "touch") { // a finger scrolls the page, and may tap
      const place = placeOf(side, event);
      point(side, place.step, place.row);
      state.tap = { x: event.clientX, y: event.clientY };
      return;
    }
    canvas.setPointerCapture(event.pointerId);
    const { offsetX: x, offsetY: y } = event;
    state.drag = { side, x, y, toX: x, toY: y, from: placeOf(side, event) };
  });
  on("pointerup", (event) => {
    const { drag, tap } = state;
    state.drag = state.tap = null;
    if (tap !== null && Math.abs(event.clientX - tap.x) < 9 && Math.abs(event.clientY - tap.y) < 9) return hold();
    if (drag === null) return;
    const { width, height } = selectionOf(drag), to = placeOf(side, event);
    if (width < 5 && height < 5) return hold();
    const order = (a, b) => [Math.min(a, b), Math.max(a, b)];
    show(...order(drag.from.step, to.step), ...(height < 12 ? [state.view.y0, state.view.y1] : order(drag.from.row, to.row)));
  });
  on("pointercancel", () => { state.drag = state.tap = null; });
  on("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    const place = placeOf(side, event);
    zoom((event.deltaY || event.deltaX) > 0 ? 1.25 : 0.8, place.across, place.down, event.shiftKey);
  });
  on("dblclick", showAll);
  on("keydown", (event) => {
    const far = event.shiftKey ? 10 : 1;
    const actions = {
      ArrowLeft: () => move(side, -far, 0), ArrowRight: () => move(side, far, 0),
      ArrowUp: () => move(side, 0, -far), ArrowDown: () => move(side, 0, far),
      "+": () => zoomAtCursor(0.8, false), "=": () => zoomAtCursor(0.8, false), "-": () => zoomAtCursor(1.25, false),
      PageUp: () => zoomAtCursor(0.8, true), PageDown: () => zoomAtCursor(1.25, true),
      Enter: hold, Escape: showAll,
    };
    if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  });
}

function hold() {
  const layer = state.cursor && runOf(state.cursor.side).layers[state.cursor.row];
  state.held = layer === state.held ? null : layer;
}

function fill(select, options, chosen, choose) {
  for (const [value, text] of options) select.add(new Option(text, value));
  select.value = chosen;
  select.addEventListener("change", () => { choose(select.value); draw(); });
}

function listSettings() {
  const table = document.createElement("table");
  const rowOf = (cells, kind) => {
    const row = table.insertRow();
    for (const text of cells) row.appendChild(document.createElement(kind)).textContent = text;
  };
  rowOf(["", ...runs.map((run) => run.name)], "th");
  for (const key of new Set(runs.flatMap((run) => Object.keys(run.settings)))) {
    rowOf([key, ...runs.map((run) => run.settings[key] ?? "")], "td");
  }
  byId("settings").append(table);
}

function begin() {
  const names = runs.map((run, index) => [String(index), run.name]);
  const chooseRun = (side) => (value) => {
    state.shown[side] = Number(value);
    state.cursor = null;
    showAll();
  };
  fill(byId("quantity"), stored.quantities.map((q) => [q.name, q.label]), state.quantity,
    (value) => { state.quantity = value; });
  fill(byId("first"), names, "0", chooseRun(0));
  fill(byId("second"), [["-1", "none"], ...names], String(state.shown[1]), chooseRun(1));
  byId("second").parentElement.hidden = runs.length < 2;
  byId("reset").addEventListener("click", () => { showAll(); draw(); });
  byId("nearer").addEventListener("click", () => { zoomBoth(0.5); draw(); });
  byId("farther").addEventListener("click", () => { zoomBoth(2); draw(); });
  canvases.forEach(listen);
  window.addEventListener("resize", draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  listSettings();
  showAll();
  draw();
}

begin();
