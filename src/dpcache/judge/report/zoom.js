// A picture or clip at its full size or larger: full and cached lie on each other, and a line in the window divides them.

const dialog = document.getElementById("zoom");
const pane = document.getElementById("pane");
const canvas = pane.querySelector(".canvas");
const wipe = document.getElementById("wipe");
const difference = document.getElementById("zoom-difference");
const sizes = [...dialog.querySelectorAll("[name=zoom]")];
const reduced = Number(dialog.dataset.scale);
let width = 0, height = 0;

function open(shot) {
  const article = shot.closest(".case"), stage = shot.querySelector(".stage");
  // In the picture's own pixels, however it was made to fit into this page.
  [width, height] = ["width", "height"].map((name) => stage.querySelector(".as-made").getAttribute(name) / reduced);
  document.getElementById("zoom-title").textContent = article.querySelector("h3").textContent;
  document.getElementById("zoom-name").textContent = shot.dataset.name;
  const layers = [".under", ".as-made", ".difference"].map((name) => stage.querySelector(name));
  const copies = layers.map((layer) => layer.cloneNode());
  for (const [n, name] of ["full", "cached", "difference"].entries()) copies[n].className = name;
  canvas.replaceChildren(...copies, Object.assign(document.createElement("span"), { className: "line" }));
  difference.checked = false;
  dialog.showModal();
  resize();
  pane.scrollTo((pane.scrollWidth - pane.clientWidth) / 2, (pane.scrollHeight - pane.clientHeight) / 2);
  follow(layers, copies);
}

// The clip goes on here as it does on the page.
function follow(layers, copies) {
  if (!dialog.open || !(layers[0] instanceof HTMLCanvasElement)) return;
  for (const [n, copy] of copies.entries()) {
    copy.style.background = layers[n].style.background;
    const pen = copy.getContext("2d");
    pen.clearRect(0, 0, copy.width, copy.height);
    pen.drawImage(layers[n], 0, 0);
  }
  requestAnimationFrame(() => follow(layers, copies));
}

// 100 % is one pixel of the picture on one of the screen.
function resize() {
  const size = Number(sizes.find((one) => one.checked).value) / 100;
  canvas.style.width = `${(width * size) / devicePixelRatio}px`;
  canvas.style.height = `${(height * size) / devicePixelRatio}px`;
  canvas.classList.toggle("enlarged", size > 1);
  divide();
}

// The line stays where it is in the window while the picture moves beneath it.
function divide() {
  const box = canvas.getBoundingClientRect(), window = pane.getBoundingClientRect();
  const left = Math.max(box.left, window.left), right = Math.min(box.right, window.left + pane.clientWidth);
  canvas.style.setProperty("--at", `${left - box.left + (wipe.valueAsNumber / 100) * (right - left)}px`);
  canvas.classList.toggle("differing", difference.checked);
  wipe.disabled = difference.checked;
}

for (const size of sizes) {
  size.addEventListener("change", () => {
    const x = (pane.scrollLeft + pane.clientWidth / 2) / pane.scrollWidth;
    const y = (pane.scrollTop + pane.clientHeight / 2) / pane.scrollHeight;
    resize();
    pane.scrollTo(x * pane.scrollWidth - pane.clientWidth / 2, y * pane.scrollHeight - pane.clientHeight / 2);
  });
}
for (const control of [wipe, difference]) control.addEventListener("input", divide);
pane.addEventListener("scroll", divide);
addEventListener("resize", () => dialog.open && resize());
document.getElementById("zoom-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => canvas.replaceChildren());

// A mouse drags the picture; fingers do so anyway.
pane.addEventListener("pointerdown", (event) => {
  if (event.pointerType !== "mouse" || event.button !== 0) return;
  event.preventDefault();
  pane.focus({ preventScroll: true });
  pane.setPointerCapture(event.pointerId);
});
pane.addEventListener("pointermove", (event) => {
  if (pane.hasPointerCapture(event.pointerId)) pane.scrollBy(-event.movementX, -event.movementY);
});

for (const shot of document.querySelectorAll(".shot.cached:not(:has(.small))")) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "zoom", textContent: "Zoom" });
  button.setAttribute("aria-haspopup", "dialog");
  button.addEventListener("click", () => open(shot));
  shot.querySelector("figcaption").prepend(button);
}
