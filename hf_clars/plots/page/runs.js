"use strict";
// The runs of the page, decoded from the JSON that page_data.py writes.

const CODES = { noValue: 0, zero: 1, infinite: 2, first: 3, last: 65535 };

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// 16-bit codes stand at equal distances on a logarithmic scale from `low` to `high`.
function decodeLog16(stored) {
  const codes = new Uint16Array(bytesOf(stored.data).buffer);
  const start = Math.log(stored.low);
  const step = (Math.log(stored.high) - start) / (CODES.last - CODES.first);
  const values = new Float64Array(codes.length);
  for (let i = 0; i < codes.length; i++) {
    const code = codes[i];
    values[i] = code >= CODES.first ? Math.exp(start + (code - CODES.first) * step)
      : code === CODES.zero ? 0 : code === CODES.infinite ? Infinity : NaN;
  }
  return values;
}

class Run {
  constructor(stored) {
    this.name = stored.name;
    this.layers = stored.layers;
    this.labels = stored.labels; // the same, shortened
    this.prefix = stored.prefix; // what the labels leave out
    this.loss = stored.loss; // [[step, value]]
    this.evalLoss = stored.eval_loss;
    this.noise = stored.noise; // [[step, noise scale, its lower end, its upper end, batch size]]; null: not known
    this.settings = stored.settings;
    this.firstSteps = stored.first_steps; // of each column
    this.lastSteps = stored.last_steps;
    this.edges = stored.edges; // on the axis of steps, one more than columns
    this.stored = stored.quantities;
    this.rows = new Map(stored.layers.map((layer, row) => [layer, row]));
    this.decoded = new Map();
  }

  get columns() { return this.firstSteps.length; }

  has(quantity) { return quantity in this.stored; }

  // Values of a quantity, one layer after the other; null if the run has none.
  values(quantity) {
    if (!this.has(quantity)) return null;
    if (!this.decoded.has(quantity)) {
      const stored = this.stored[quantity];
      this.decoded.set(quantity, stored.encoding === "float32"
        ? new Float32Array(bytesOf(stored.data).buffer) : decodeLog16(stored));
    }
    return this.decoded.get(quantity);
  }

  value(quantity, row, column) {
    const values = this.values(quantity);
    return values === null ? NaN : values[row * this.columns + column];
  }

  // The column that holds a step; -1 outside of the run.
  columnAt(step) {
    if (!(step >= this.edges[0] && step <= this.edges[this.columns])) return -1;
    let low = 0, high = this.columns - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.edges[middle] <= step) low = middle; else high = middle - 1;
    }
    return low;
  }

  stepsOf(column) {
    const first = this.firstSteps[column], last = this.lastSteps[column];
    return first === last ? `step ${grouped(first)}` : `steps ${grouped(first)} to ${grouped(last)} (median)`;
  }

  // A value as text with as many digits as it has, and how exact it is.
  shown(quantity, row, column) {
    if (!this.has(quantity)) return "not measured in this run";
    const value = this.value(quantity, row, column);
    if (Number.isNaN(value)) return "no value";
    if (!Number.isFinite(value)) return "infinite";
    if (value === 0) return "0";
    const error = this.stored[quantity].error;
    if (error === 0) return Number(value.toPrecision(7)).toString();
    const digits = Math.max(2, Math.ceil(-Math.log10(error)) + 1);
    const power = 10 ** Math.floor(Math.log10(100 * error)); // one digit, rounded up
    return `${Number(value.toPrecision(digits))} (± ${Number((Math.ceil(100 * error / power) * power).toPrecision(1))} %)`;
  }
}

function grouped(number) { return Math.round(number).toLocaleString("en"); }
