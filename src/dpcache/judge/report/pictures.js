// Pictures and clips: sliders between full and cached, maps of the difference, and one clock that moves all clips.

const FRAME_MILLISECONDS = 125; // a clip does not say how fast it plays
const section = document.getElementById("pictures");
const tools = document.getElementById("tools");

// One picture, or a clip: its frames, drawn one at a time on a canvas. It may be shown in several places.
class Layer {
  constructor(image) {
    const frames = image.parentElement.querySelector(`script[data-of="${image.dataset.layer}"]`);
    this.uris = frames ? JSON.parse(frames.textContent) : [];
    this.elements = [this.uris.length ? canvasFor(image) : image];
    this.images = [];
  }

  copy() {
    const element = this.elements[0].cloneNode();
    this.elements.push(element);
    return element;
  }

  async load() {
    this.images = await Promise.all(this.uris.map(async (uri) => {
      const image = new Image();
      image.src = uri;
      await image.decode();
      return image;
    }));
  }

  draw(frame) {
    if (!this.images.length) return;
    for (const canvas of this.elements) {
      canvas.style.background = "";
      const pen = canvas.getContext("2d");
      pen.clearRect(0, 0, canvas.width, canvas.height);
      pen.drawImage(this.images[frame % this.images.length], 0, 0);
    }
  }
}

function canvasFor(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.getAttribute("width"); // not .width, which is as shown
  canvas.height = image.getAttribute("height");
  canvas.className = image.className;
  canvas.style.background = `0 0 / 100% 100% url("${image.src}")`; // until the first frame is drawn
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", image.alt);
  image.replaceWith(canvas);
  return canvas;
}

// All that is shown of one input. Its sliders move together, and so do the frames of its clips.
class Case {
  constructor(article) {
    this.article = article;
    this.sliders = [];
    const full = new Layer(article.querySelector(".full img"));
    this.layers = [full];
    for (const shot of article.querySelectorAll(".cached")) {
      const [cached, difference] = [...shot.querySelectorAll("img")].map((image) => new Layer(image));
      this.layers.push(cached, difference);
      this.addSlider(shot.querySelector(".stage"), full.copy(), shot.dataset.name);
    }
    this.move(50);
  }

  addSlider(stage, under, name) {
    under.classList.replace("as-made", "under");
    under.setAttribute("aria-hidden", "true");
    stage.prepend(under);
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: 100, className: "divide" });
    slider.setAttribute("aria-label", `Full on the left, cached on the right, ${name}`);
    slider.addEventListener("input", () => this.move(slider.valueAsNumber));
    const handle = Object.assign(document.createElement("span"), { className: "handle", ariaHidden: "true" });
    const names = [["left", "Full"], ["right", "Cached"]].map(([side, textContent]) =>
      Object.assign(document.createElement("span"), { className: `side ${side}`, textContent, ariaHidden: "true" }));
    stage.append(slider, handle, ...names);
    this.sliders.push(slider);

    // The pointer may take hold anywhere on the picture, not only at the slider's thumb.
    const follow = (event) => {
      const box = stage.getBoundingClientRect();
      this.move(Math.round((100 * (event.clientX - box.left)) / box.width));
    };
    stage.addEventListener("pointerdown", (event) => {
      if (section.dataset.view !== "slider" || event.button !== 0) return;
      event.preventDefault();
      stage.setPointerCapture(event.pointerId);
      slider.focus({ preventScroll: true });
      follow(event);
    });
    stage.addEventListener("pointermove", (event) => {
      if (stage.hasPointerCapture(event.pointerId)) follow(event);
    });
  }

  move(percent) {
    const at = Math.min(100, Math.max(0, percent));
    this.article.style.setProperty("--at", `${at}%`);
    for (const slider of this.sliders) {
      slider.value = at;
      slider.setAttribute("aria-valuetext", `${at} % full, ${100 - at} % cached`);
    }
  }

  // Nothing is drawn before all frames are there: full and cached never show different ones.
  async load() {
    this.loading ??= Promise.all(this.layers.map((layer) => layer.load()));
    await this.loading;
    this.loaded = true;
  }

  draw(frame) {
    if (!this.loaded || this.shown === frame) return;
    this.shown = frame;
    this.article.dataset.frame = frame;
    for (const layer of this.layers) layer.draw(frame);
  }
}

// The one clock of all clips. Only those in sight are drawn.
class Clock {
  constructor(cases, count) {
    this.count = count;
    this.frame = 0;
    this.seen = new Set();
    const watch = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const one = cases.find(({ article }) => article === target);
        if (!isIntersecting) this.seen.delete(one);
        else {
          this.seen.add(one);
          one.load().then(() => one.draw(this.frame));
        }
      }
    }, { rootMargin: "200px" });
    for (const { article } of cases) watch.observe(article);

    this.button = document.getElementById("play");
    this.scrub = document.getElementById("frame");
    this.number = document.getElementById("frame-number");
    this.scrub.max = count - 1;
    this.scrub.addEventListener("input", () => {
      this.play(false);
      this.show(this.scrub.valueAsNumber);
    });
    this.button.addEventListener("click", () => this.play(!this.playing));
    this.show(0);
    this.play(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  }

  show(frame) {
    this.frame = frame;
    this.scrub.value = frame;
    this.number.textContent = `${frame + 1} of ${this.count}`;
    for (const one of this.seen) one.draw(frame);
  }

  play(on) {
    this.playing = on;
    this.button.textContent = on ? "Pause" : "Play";
    if (!on) return;
    const began = performance.now() - this.frame * FRAME_MILLISECONDS;
    const run = this.run = Symbol(); // a later start ends this one
    const tick = (now) => {
      if (!this.playing || this.run !== run) return;
      const frame = Math.max(0, Math.floor((now - began) / FRAME_MILLISECONDS)) % this.count;
      if (frame !== this.frame) this.show(frame);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }
}

const cases = [...section.querySelectorAll(".case")].map((article) => new Case(article));
const count = Math.max(...cases.flatMap(({ layers }) => layers.map(({ uris }) => uris.length)));
if (count > 0) new Clock(cases, count);

for (const choice of tools.querySelectorAll("[name=view]")) {
  choice.addEventListener("change", () => { section.dataset.view = choice.value; });
}
section.dataset.view = tools.querySelector("[name=view]:checked").value;

tools.hidden = false;
