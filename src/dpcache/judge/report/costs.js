// The explorer of the cost tensor: pick key steps i and j, and see what going on to every k would cost.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 389, HEIGHT = 353; // as the plots beside it
const LEFT = 58, RIGHT = 379, TOP = 14, BOTTOM = 312;
const explorer = document.getElementById("explorer");

// cost[i, j, k], as packed by explorer.py; infinite where it is not known.
class Tensor {
  constructor({ steps, widest, cost }) {
    const bytes = Uint8Array.from(atob(cost), (letter) => letter.charCodeAt(0));
    this.values = new Float32Array(bytes.buffer);
    this.steps = steps;
    this.widest = widest;
    this.starts = [];
    let start = 0;
    for (let j = 0; j < steps; j++) {
      this.starts.push(start);
      start += this.befores(j).length * this.reach(j);
    }
  }

  reach(j) { return Math.min(this.steps - j, this.widest); }

  // The key steps that may come before j.
  befores(j) {
    const first = Math.max(j - this.widest, 0);
    return Array.from({ length: Math.max(j, 1) - first }, (_, n) => first + n);
  }

  at(i, j, k) {
    const first = Math.max(j - this.widest, 0), ahead = k - j - 1;
    if (i < first || i >= Math.max(j, 1) || ahead < 0 || ahead >= this.reach(j)) return Infinity;
    return this.values[this.starts[j] + (i - first) * this.reach(j) + ahead];
  }
}

function draw(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  place(element, attributes);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function number(value) {
  if (value === 0) return "0";
  return value >= 0.01 && value < 1e5 ? `${+value.toPrecision(3)}` : value.toExponential(2);
}

function place(element, attributes) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
}

class Explorer {
  constructor(data) {
    this.tensor = new Tensor(data);
    this.steps = data.steps;
    this.area = data.map_area;
    this.hops = Object.fromEntries(Object.entries(data.schedules).map(([name, keys]) => {
      const stops = [keys[0], ...keys, data.steps];
      return [name, keys.map((_, n) => stops.slice(n, n + 3))];
    }));
    this.which = document.getElementById("hops-of");
    this.sliders = ["before", "key", "next"].map((id) => document.getElementById(id));
    for (const slider of this.sliders) {
      slider.addEventListener("input", () => this.pick(...this.sliders.map((one) => one.valueAsNumber)));
    }
    this.which.addEventListener("change", () => this.pick(...this.dearest()));
    document.getElementById("earlier").addEventListener("click", () => this.goOn(-1));
    document.getElementById("later").addEventListener("click", () => this.goOn(1));

    this.prepareCurve();
    this.prepareMap();
    this.pick(...this.dearest());
  }

  // The hop of the schedule that costs most: where there is most to see.
  dearest() {
    const cost = (hop) => Number.isFinite(this.tensor.at(...hop)) ? this.tensor.at(...hop) : -1;
    return this.hops[this.which.value].reduce((a, b) => cost(b) > cost(a) ? b : a);
  }

  // To the schedule's next hop in this direction, or the nearest if none is picked.
  goOn(direction) {
    const hops = this.hops[this.which.value], at = hops.findIndex((hop) => this.isPicked(hop));
    const near = direction > 0 ? hops.findIndex(([, j]) => j > this.j) : hops.findLastIndex(([, j]) => j <= this.j);
    const to = at < 0 ? near : at + direction;
    if (hops[to]) this.pick(...hops[to]);
  }

  isPicked([i, j, k]) { return i === this.i && j === this.j && k === this.k; }

  // Picks a hop; what cannot be is moved to the nearest that can.
  pick(i, j, k) {
    this.j = Math.min(Math.max(j, 0), this.steps - 1);
    const befores = this.tensor.befores(this.j);
    this.i = Math.min(Math.max(i, befores[0]), befores.at(-1));
    const last = this.j + this.tensor.reach(this.j);
    this.k = Math.min(Math.max(k, this.j + 1), last);
    const limits = [[befores[0], befores.at(-1)], [0, this.steps - 1], [this.j + 1, last]];
    for (const [n, value] of [this.i, this.j, this.k].entries()) {
      const slider = this.sliders[n];
      [slider.min, slider.max] = limits[n];
      slider.value = value;
      slider.disabled = limits[n][0] === limits[n][1];
      const said = n === 0 && this.j === 0 ? "none" : n === 2 && value === this.steps ? `${value}, the end` : value;
      document.getElementById(`${slider.id}-number`).textContent = said;
      slider.setAttribute("aria-valuetext", said);
    }
    this.drawCurve();
    this.markMap();
    this.tell();
  }

  tell() {
    const { i, j, k, tensor } = this, cost = tensor.at(i, j, k);
    const before = j ? ` with ${i} before it` : "", to = k === this.steps ? "the end" : `key step ${k}`;
    const parts = [Number.isFinite(cost)
      ? `From key step ${j}${before} to ${to}: cost ${number(cost)}.`
      : `From key step ${j}${before} to ${to}: no cost is known, so no plan goes this way.`];
    for (const [name, hops] of Object.entries(this.hops)) {
      if (!hops.some((hop) => this.isPicked(hop))) continue;
      const total = hops.reduce((sum, hop) => sum + tensor.at(...hop), 0);
      const share = total > 0 && total < Infinity ? `, ${number((100 * cost) / total)} % of its cost` : "";
      parts.push(`${name} makes this hop${share}.`);
    }
    const best = tensor.befores(j).reduce((a, b) => tensor.at(b, j, k) < tensor.at(a, j, k) ? b : a);
    if (j && best !== i && tensor.at(best, j, k) < cost) {
      parts.push(`It would cost least, ${number(tensor.at(best, j, k))}, with ${best} before it.`);
    }
    document.getElementById("hop").textContent = parts.join(" ");

    const rows = document.querySelector("#hop-costs tbody");
    rows.replaceChildren();
    for (let next = j + 1; next <= j + tensor.reach(j); next++) {
      const row = rows.insertRow(), value = tensor.at(i, j, next);
      row.insertCell().textContent = next === this.steps ? `${next} (the end)` : next;
      row.insertCell().textContent = Number.isFinite(value) ? number(value) : "none";
    }
  }

  // The curve

  x(k) { return LEFT + ((RIGHT - LEFT) * (k - this.first)) / (this.steps - this.first); }

  // What costs nothing has no place on a logarithmic scale and is put at its lower end.
  y(cost) {
    const at = cost > 0 ? (Math.log10(cost) - this.bottom) / (this.top - this.bottom) : 0;
    return BOTTOM - (BOTTOM - TOP) * at;
  }

  prepareCurve() {
    this.svg = document.getElementById("curve");
    const centred = { "text-anchor": "middle" }, across = (LEFT + RIGHT) / 2, down = (TOP + BOTTOM) / 2;
    draw("text", { ...centred, x: across, y: BOTTOM + 35 }, this.svg, `next key step k (${this.steps} is the end)`);
    draw("text", { ...centred, x: 14, y: down, transform: `rotate(-90 14 ${down})` }, this.svg, "cost of the hop");
    this.plot = draw("g", {}, this.svg);
    this.svg.addEventListener("click", (event) => {
      const box = this.svg.getBoundingClientRect(), x = ((event.clientX - box.left) * WIDTH) / box.width;
      this.pick(this.i, this.j, Math.round(this.first + ((x - LEFT) / (RIGHT - LEFT)) * (this.steps - this.first)));
    });
  }

  // Axes that fit all that can be picked at j.
  drawAxes() {
    const { tensor, j } = this;
    this.first = Math.max(0, Math.min(j, this.steps - 5));
    let low = Infinity, high = 0;
    for (const i of tensor.befores(j)) {
      for (let k = j + 1; k <= j + tensor.reach(j); k++) {
        const cost = tensor.at(i, j, k);
        if (cost > 0 && cost < low) low = cost;
        if (cost > high && cost < Infinity) high = cost;
      }
    }
    this.bottom = high ? Math.floor(Math.log10(low)) : 0;
    this.top = high ? Math.max(Math.ceil(Math.log10(high)), this.bottom + 1) : 1;

    const axes = draw("g", { class: "axes" }, this.plot);
    const decades = Math.ceil((this.top - this.bottom) / 8);
    for (let power = this.bottom; power <= this.top; power += decades) {
      const y = this.y(10 ** power), text = power >= -2 && power <= 4 ? `${+(10 ** power).toFixed(2)}` : `1e${power}`;
      draw("line", { x1: LEFT, x2: RIGHT, y1: y, y2: y }, axes);
      draw("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, axes, text);
    }
    const every = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => (this.steps - this.first) / step <= 6) ?? 1000;
    for (let k = Math.ceil(this.first / every) * every; k <= this.steps; k += every) {
      draw("line", { class: "tick", x1: this.x(k), x2: this.x(k), y1: BOTTOM, y2: BOTTOM + 4 }, axes);
      draw("text", { x: this.x(k), y: BOTTOM + 17, "text-anchor": "middle" }, axes, k);
    }
  }

  drawCurve() {
    const { tensor, plot } = this;
    plot.replaceChildren();
    this.drawAxes();
    for (const i of [...tensor.befores(this.j).filter((i) => i !== this.i), this.i]) {
      let path = "";
      for (let k = this.j + 1; k <= this.j + tensor.reach(this.j); k++) {
        const cost = tensor.at(i, this.j, k);
        if (Number.isFinite(cost)) path += `${path ? "L" : "M"}${this.x(k).toFixed(1)} ${this.y(cost).toFixed(1)}`;
      }
      draw("path", { class: i === this.i ? "line picked" : "line", d: path }, plot);
    }
    const cost = tensor.at(this.i, this.j, this.k), x = this.x(this.k);
    draw("line", { class: "guide", x1: x, x2: x, y1: TOP, y2: BOTTOM }, plot);
    if (Number.isFinite(cost)) draw("circle", { class: "here", cx: x, cy: this.y(cost), r: 5 }, plot);
    this.markHops();
  }

  // Rings for the hops that schedules make from j: on the picked curve where they come from i, and else on another.
  markHops() {
    let lowest = Infinity; // names must not lie on each other
    for (const [name, hops] of Object.entries(this.hops)) {
      const hop = hops.find(([, j]) => j === this.j);
      if (!hop || !Number.isFinite(this.tensor.at(...hop))) continue;
      const [i, , k] = hop, x = this.x(k), y = this.y(this.tensor.at(...hop)), left = x > (LEFT + RIGHT) / 2;
      draw("circle", { class: "real", cx: x, cy: y, r: 8 }, this.plot);
      lowest = Math.min(y - 8, lowest - 15);
      const at = { x: x + (left ? -13 : 13), y: Math.max(lowest, TOP), "text-anchor": left ? "end" : "start" };
      draw("text", { class: "name", ...at }, this.plot, i === this.i ? name : `${name}, from ${i}`);
    }
  }

  // The map beside it, drawn beforehand: a row is a key step j

  prepareMap() {
    this.map = document.getElementById("cost-map");
    this.row = draw("rect", { class: "row" }, this.map);
    this.cell = draw("rect", { class: "cell" }, this.map);
    this.map.addEventListener("click", (event) => {
      const box = this.map.getBoundingClientRect(), view = this.map.viewBox.baseVal;
      const [left, top, width, height] = this.area;
      const x = ((event.clientX - box.left) * view.width) / box.width - left;
      const y = ((event.clientY - box.top) * view.height) / box.height - top;
      if (x < 0 || y < 0 || x > width || y > height) return;
      const j = Math.floor((y / height) * this.steps), k = Math.floor((x / width) * (this.steps + 1));
      if (k <= j) return;
      // With the key step before it that makes this hop cheapest: that is the cost which the map shows.
      const i = this.tensor.befores(j).reduce((a, b) => this.tensor.at(b, j, k) < this.tensor.at(a, j, k) ? b : a);
      this.pick(i, j, k);
    });
  }

  markMap() {
    const [left, top, width, height] = this.area, wide = width / (this.steps + 1), high = height / this.steps;
    const row = { y: top + this.j * high, height: high };
    place(this.row, { ...row, x: left + (this.j + 1) * wide, width: (this.steps - this.j) * wide });
    place(this.cell, { ...row, x: left + this.k * wide, width: wide });
  }
}

if (explorer) {
  explorer.hidden = false;
  new Explorer(JSON.parse(document.getElementById("cost-data").textContent));
}
