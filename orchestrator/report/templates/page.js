"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

// -- charts, each drawn when it is first near the screen

function draw(element) {
  const figure = data.figures[element.dataset.figure];
  const isNarrow = window.innerWidth < 640;
  const layout = {
    ...figure.layout,
    template: data.template,
    margin: { l: 60, r: 20, t: 20, b: 60 },
    font: { size: isNarrow ? 11 : 13 },
    hoverlabel: { align: "left" },
  };
  if (isNarrow && layout.coloraxis && layout.coloraxis.colorbar) {
    layout.coloraxis.colorbar = { ...layout.coloraxis.colorbar, thickness: 10 };
  }
  Plotly.newPlot(element, figure.data, layout, { responsive: true, displaylogo: false });
}

const waiting = new Set(document.querySelectorAll(".plot"));
const near = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => drawOnce(entry.target)),
  { rootMargin: "600px" },
);

function drawOnce(element) {
  near.unobserve(element);
  if (waiting.delete(element)) draw(element);
}

waiting.forEach((element) => near.observe(element));
window.addEventListener("beforeprint", () => [...waiting].forEach(drawOnce));

// -- attention patterns

const palette = data.palette.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));

function colour(probability) {
  const place = Math.sqrt(probability) * (palette.length - 1);
  const low = Math.min(Math.floor(place), palette.length - 2);
  return palette[low].map((channel, index) => channel + (place - low) * (palette[low + 1][index] - channel));
}

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return Array.from(new Uint16Array(bytes.buffer), (entry) => entry / data.scale);
}

function paint(canvas, pattern, head, size) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  for (let query = 0; query < size; query++) {
    for (let key = 0; key <= query; key++) {
      const [red, green, blue] = colour(entry(pattern, head, query, key, size));
      image.data.set([red, green, blue, 255], 4 * (query * size + key));
    }
  }
  context.putImageData(image, 0, 0);
}

// lower triangles, head by head, row by row
function entry(pattern, head, query, key, size) {
  return pattern[head * size * (size + 1) / 2 + query * (query + 1) / 2 + key];
}

function create(name, parent, properties = {}) {
  const element = Object.assign(document.createElement(name), properties);
  parent.append(element);
  return element;
}

class PatternView {
  constructor(root) {
    this.root = root;
    this.record = data.patterns[root.dataset.study];
    this.readout = root.querySelector("output");
    this.tokenLine = root.querySelector(".tokens");
    this.heads = this.record.heads.map((kl, head) => this.makeHead(kl, head));
    const select = root.querySelector("select");
    select.addEventListener("change", () => this.show(Number(select.value)));
    const heads = root.querySelector(".heads");
    heads.addEventListener("focusout", () => this.forget());
    // a finger that is lifted leaves too, and has read nothing yet
    heads.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.forget());
    this.paintBar();
    this.show(0);
  }

  forget() {
    this.heads.forEach((view) => view.cursors.forEach((cursor) => (cursor.hidden = true)));
    this.spans.forEach((span) => span.classList.remove("query", "key"));
    this.readout.textContent = "";
  }

  makeHead(kl, head) {
    const figure = create("figure", this.root.querySelector(".heads"), { className: "head", tabIndex: 0 });
    const title = `head ${head}` + (kl === null ? "" : `, KL ${kl.toPrecision(3)}`);
    figure.setAttribute("role", "application");
    figure.setAttribute("aria-label", `Attention of ${title}: arrow keys move over query and key tokens`);
    create("figcaption", figure, { textContent: `${title}: p | p̂` });
    const pair = create("div", figure);
    const view = { cell: null, canvases: [], cursors: [] };
    for (let side = 0; side < 2; side++) {
      const holder = create("div", pair);
      const canvas = create("canvas", holder);
      canvas.addEventListener("pointermove", (event) => this.point(head, this.cellAt(canvas, event)));
      canvas.addEventListener("pointerdown", (event) => this.point(head, this.cellAt(canvas, event)));
      view.canvases.push(canvas);
      view.cursors.push(create("i", holder, { hidden: true }));
    }
    figure.addEventListener("focus", () => this.point(head, view.cell ?? [this.size - 1, 0]));
    figure.addEventListener("keydown", (event) => this.step(head, view, event));
    return view;
  }

  show(number) {
    const sentence = this.record.sentences[number];
    this.tokens = sentence.tokens;
    this.size = sentence.tokens.length;
    this.patterns = [unpack(sentence.p), unpack(sentence.reconstructed)];
    this.tokenLine.replaceChildren();
    this.spans = this.tokens.map((token) => create("span", this.tokenLine, { textContent: token }));
    this.heads.forEach((view, head) => {
      view.cell = null;
      view.canvases.forEach((canvas, side) => paint(canvas, this.patterns[side], head, this.size));
    });
    this.forget();
  }

  cellAt(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const place = (offset, length) => Math.max(0, Math.min(this.size - 1, Math.floor((offset / length) * this.size)));
    return [place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width)];
  }

  step(head, view, event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const [query, key] = view.cell ?? [this.size - 1, 0];
    const next = Math.max(0, Math.min(this.size - 1, query + move[0]));
    this.point(head, [next, Math.max(0, Math.min(next, key + move[1]))]);
  }

  point(head, [query, key]) {
    if (key > query) return;
    this.heads.forEach((view, index) => view.cursors.forEach((cursor) => (cursor.hidden = index !== head)));
    const view = this.heads[head];
    view.cell = [query, key];
    view.cursors.forEach((cursor) => {
      const share = 100 / this.size;
      Object.assign(cursor.style, {
        left: `${key * share}%`, top: `${query * share}%`, width: `${share}%`, height: `${share}%`,
      });
    });
    this.spans.forEach((span, index) => {
      span.classList.toggle("query", index === query);
      span.classList.toggle("key", index === key);
    });
    const [p, reconstructed] = this.patterns.map((pattern) => entry(pattern, head, query, key, this.size).toFixed(4));
    this.readout.textContent =
      `head ${head}, query ${query} “${this.tokens[query]}” → key ${key} “${this.tokens[key]}”: p ${p}, p̂ ${reconstructed}`;
  }

  paintBar() {
    const canvas = this.root.querySelector(".bar canvas");
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, 1);
    for (let x = 0; x < canvas.width; x++) {
      image.data.set([...colour((x / (canvas.width - 1)) ** 2), 255], 4 * x);
    }
    context.putImageData(image, 0, 0);
  }
}

document.querySelectorAll(".patterns").forEach((root) => new PatternView(root));
