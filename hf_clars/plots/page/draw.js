"use strict";
// Everything that is painted on canvases: heat map, colour scale, chart of one layer.

const FONT = "12px system-ui, sans-serif";
const SPECIAL = { noValue: [199, 199, 199], zero: [255, 255, 255], infinite: [213, 94, 0] }; // as in the pictures

// Size a canvas for the screen's pixels; returns its context, scaled to CSS pixels, and its size in them.
function prepare(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.clearRect(0, 0, width, height);
  pen.font = FONT;
  return { pen, width, height };
}

function inks() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  return { ink: read("--ink"), paper: read("--paper"), grid: read("--grid"), series: [read("--first"), read("--second")] };
}

function colourOf(value, scale) {
  if (Number.isNaN(value)) return SPECIAL.noValue;
  if (value === Infinity) return SPECIAL.infinite;
  if (value <= 0) return SPECIAL.zero;
  const place = Math.log(value / scale.low) / Math.log(scale.high / scale.low);
  const index = 3 * Math.round(255 * Math.min(1, Math.max(0, place)));
  return [scale.palette[index], scale.palette[index + 1], scale.palette[index + 2]];
}

// Round numbers in [low, high], about `count` of them.
function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough));
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) ticks.push(tick);
  return ticks;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const every = Math.max(1, Math.ceil(decades / 8));
  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    if (e % every) continue;
    for (const m of decades < 2.5 ? [1, 2, 5] : [1]) {
      const tick = Number(`${m}e${e}`);
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks;
}

// A layer's name in so many pixels: its words are cut from the left to three letters, then to one, then the middle goes.
function fitted(pen, text, width) {
  const fits = (tried) => pen.measureText(tried).width <= width;
  if (fits(text)) return text;
  const words = text.split(".");
  for (const letters of [3, 1]) {
    for (let index = 0; index < words.length - 1; index++) {
      words[index] = words[index].slice(0, letters);
      if (fits(words.join("."))) return words.join(".");
    }
  }
  const short = words.join(".");
  let keep = short.length;
  const cut = () => `${short.slice(0, Math.floor(keep / 3))}…${short.slice(short.length - (keep - Math.floor(keep / 3)))}`;
  while (keep > 1 && !fits(cut())) keep--;
  return cut();
}

// A text centred at `x`, moved so far that it stays on the canvas; false if it would touch the one before.
function centred(pen, text, x, y, width, after) {
  const half = pen.measureText(text).width / 2;
  const place = Math.min(width - half - 1, Math.max(half + 1, x));
  if (place - half < after + 4) return after;
  pen.fillText(text, place, y);
  return place + half;
}

// One pixel a cell; painted once for each run and quantity, then stretched.
function paintCells(run, quantity, scale) {
  const values = run.values(quantity);
  const picture = new ImageData(run.columns, run.layers.length);
  for (let i = 0; i < values.length; i++) {
    const colour = colourOf(values[i], scale);
    picture.data.set([colour[0], colour[1], colour[2], 255], 4 * i);
  }
  const cells = document.createElement("canvas");
  cells.width = run.columns;
  cells.height = run.layers.length;
  cells.getContext("2d").putImageData(picture, 0, 0);
  return cells;
}

// Where the cells of a map lie on its canvas, in CSS pixels.
function mapBox(canvas) {
  const left = canvas.labelRoom ?? 0.3 * canvas.clientWidth;
  return { left, top: 6, width: canvas.clientWidth - left - 26, height: canvas.clientHeight - 48 };
}

function drawMap(canvas, run, cells, view, cursor, selection) {
  const { pen, width } = prepare(canvas);
  const longest = Math.max(...run.labels.map((label) => pen.measureText(label).width));
  canvas.labelRoom = Math.min(longest + 12, 240, 0.42 * width);
  const colours = inks(), box = mapBox(canvas);
  const x = (step) => box.left + box.width * (step - view.x0) / (view.x1 - view.x0);
  const y = (row) => box.top + box.height * (row - view.y0) / (view.y1 - view.y0);
  pen.save();
  pen.beginPath();
  pen.rect(box.left, box.top, box.width, box.height);
  pen.clip();
  if (cells === null) {
    pen.fillStyle = colours.ink;
    pen.fillText("This run did not measure the quantity.", box.left + 12, box.top + 24);
  } else {
    pen.imageSmoothingEnabled = false;
    for (let column = 0; column < run.columns; column++) { // one by one: steps may lie at uneven distances
      const from = x(run.edges[column]), to = x(run.edges[column + 1]);
      if (to < box.left || from > box.left + box.width) continue;
      pen.drawImage(cells, column, 0, 1, run.layers.length, from, y(0), to - from + 0.5, y(run.layers.length) - y(0));
    }
  }
  if (cursor.row >= 0 && cursor.column >= 0) {
    const from = x(run.edges[cursor.column]), to = x(run.edges[cursor.column + 1]);
    for (const [colour, width] of [[colours.paper, 4], [colours.ink, 1.5]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = width;
      pen.strokeRect(from - 1.5, y(cursor.row) - 1.5, to - from + 3, y(cursor.row + 1) - y(cursor.row) + 3);
    }
  }
  if (selection) {
    pen.setLineDash([4, 3]);
    pen.strokeStyle = colours.ink;
    pen.strokeRect(selection.x, selection.y, selection.width, selection.height);
  }
  pen.restore();
  pen.strokeStyle = colours.ink;
  pen.strokeRect(box.left, box.top, box.width, box.height);
  nameRows(pen, run, view, box, y, colours);
  numberSteps(pen, view, box, x, colours, width);
}

function nameRows(pen, run, view, box, y, colours) {
  const first = Math.max(0, Math.floor(view.y0)), last = Math.min(run.layers.length, Math.ceil(view.y1));
  const every = Math.max(1, Math.ceil(14 * (view.y1 - view.y0) / box.height));
  pen.fillStyle = colours.ink;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (let row = Math.ceil(first / every) * every; row < last; row += every) {
    const place = y(row + 0.5);
    if (place < box.top || place > box.top + box.height) continue;
    pen.fillText(fitted(pen, run.labels[row], box.left - 10), box.left - 6, place);
  }
}

function numberSteps(pen, view, box, x, colours, width) {
  pen.fillStyle = colours.ink;
  pen.textAlign = "center";
  pen.textBaseline = "top";
  const bottom = box.top + box.height;
  let after = -Infinity; // where the last number ends
  for (const tick of linearTicks(view.x0, view.x1, box.width / 65)) {
    pen.fillRect(x(tick) - 0.5, bottom, 1, 4);
    after = centred(pen, grouped(tick), x(tick), bottom + 6, width, after);
  }
  pen.fillText("optimizer step", box.left + box.width / 2, bottom + 24);
}

function drawScale(canvas, scale, label) {
  const { pen, width } = prepare(canvas);
  const colours = inks(), left = 10, right = width - 10;
  for (let x = left; x < right; x++) {
    const value = scale.low * (scale.high / scale.low) ** ((x - left) / (right - left));
    pen.fillStyle = `rgb(${colourOf(value, scale).join(",")})`;
    pen.fillRect(x, 0, 1.5, 14);
  }
  pen.fillStyle = colours.ink;
  pen.textAlign = "center";
  pen.textBaseline = "top";
  let after = -Infinity;
  for (const tick of logTicks(scale.low, scale.high)) {
    const x = left + (right - left) * Math.log(tick / scale.low) / Math.log(scale.high / scale.low);
    pen.fillRect(x - 0.5, 14, 1, 4);
    after = centred(pen, String(tick), x, 20, width, after);
  }
  canvas.setAttribute("aria-label", `Colour scale of ${label}: from ${scale.low} (dark) to ${scale.high} (bright)`);
}

// lines: [{points: [[step, value]], series, dots: whether they are not joined, dash, band: [[step, low, high]]}]; values
// that a log scale has no place for leave a gap, and ends of a band that it has no place for reach to its own.
function drawChart(canvas, lines, view, step) {
  const { pen, width, height } = prepare(canvas);
  const colours = inks(), box = { left: 70, top: 8, width: width - 96, height: height - 50 };
  const shown = lines.flatMap((line) => line.points)
    .filter(([at, value]) => at >= view.x0 && at <= view.x1 && value > 0 && value < Infinity).map((point) => point[1]);
  const [least, most] = shown.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, 0]);
  const x = (at) => box.left + box.width * (at - view.x0) / (view.x1 - view.x0);
  pen.strokeStyle = colours.ink;
  pen.strokeRect(box.left, box.top, box.width, box.height);
  numberSteps(pen, view, box, x, colours, width);
  if (!shown.length) return;
  const low = least / (most > 2 * least ? 1.15 : 1.6), high = most * (most > 2 * least ? 1.15 : 1.6);
  const y = (value) => box.top + box.height * Math.log(high / value) / Math.log(high / low);
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const tick of logTicks(low, high)) {
    pen.fillStyle = colours.grid;
    pen.fillRect(box.left, y(tick), box.width, 1);
    pen.fillStyle = colours.ink;
    pen.fillText(String(tick), box.left - 6, y(tick));
  }
  pen.save();
  pen.beginPath();
  pen.rect(box.left, box.top, box.width, box.height);
  pen.clip();
  for (const line of lines) {
    if (line.band) drawBand(pen, line.band, colours.series[line.series], x, (v) => y(Math.min(high, Math.max(low, v))));
    pen.strokeStyle = pen.fillStyle = colours.series[line.series];
    pen.lineWidth = 1.5;
    pen.setLineDash(line.dash ?? (line.series ? [6, 3] : []));
    pen.beginPath();
    let begun = false;
    for (const [at, value] of line.points) {
      const drawable = value > 0 && value < Infinity;
      if (drawable && line.dots) {
        pen.moveTo(x(at) + 3, y(value));
        pen.arc(x(at), y(value), 3, 0, 2 * Math.PI);
      } else if (drawable && begun) pen.lineTo(x(at), y(value)); else if (drawable) pen.moveTo(x(at), y(value));
      begun = drawable;
    }
    if (line.dots) pen.fill(); else pen.stroke();
  }
  pen.setLineDash([]);
  pen.fillStyle = colours.ink;
  if (step !== null) pen.fillRect(x(step), box.top, 1, box.height);
  pen.restore();
}

// Between two curves, in pieces where they are known.
function drawBand(pen, band, colour, x, y) {
  pen.save();
  pen.fillStyle = colour;
  pen.globalAlpha = 0.2;
  for (let i = 1; i < band.length; i++) {
    const [from, to] = [band[i - 1], band[i]];
    if (Number.isNaN(from[1]) || Number.isNaN(to[1])) continue;
    pen.beginPath();
    pen.moveTo(x(from[0]), y(from[1]));
    pen.lineTo(x(to[0]), y(to[1]));
    pen.lineTo(x(to[0]), y(to[2]));
    pen.lineTo(x(from[0]), y(from[2]));
    pen.fill();
  }
  pen.restore();
}
