// So many inputs at a time, in an order of choice; prompts of many lines are cut short until somebody asks for more.

const PAGE = 20;
const list = document.getElementById("cases");
const pagers = [...document.querySelectorAll(".pager")];
const sort = document.getElementById("sort");
const worstFirst = [...list.children]; // as they came
const orders = {
  worst: worstFirst,
  best: [...worstFirst].reverse(),
  given: [...worstFirst].sort((a, b) => a.dataset.number - b.dataset.number),
};
let first = 0;

function show(place) {
  const order = orders[sort.value], count = order.length;
  first = Math.max(0, Math.min(place, count - 1 - ((count - 1) % PAGE)));
  for (const [number, article] of order.entries()) article.hidden = number < first || number >= first + PAGE;
  for (const pager of pagers) {
    const [earlier, later] = pager.querySelectorAll("button");
    pager.hidden = count <= PAGE;
    pager.querySelector("output").textContent = `${first + 1} to ${Math.min(first + PAGE, count)} of ${count}`;
    earlier.disabled = first === 0;
    later.disabled = first + PAGE >= count;
  }
  cut();
}

for (const [number, pager] of pagers.entries()) {
  pager.addEventListener("click", (event) => {
    const by = event.target.dataset.by;
    if (!by) return;
    show(first + by * PAGE);
    if (number) list.scrollIntoView({ behavior: "instant" });
  });
}

sort.addEventListener("change", () => {
  list.append(...orders[sort.value]);
  show(0);
});

// Only what is cut short has a button to see it all.
function cut() {
  for (const article of list.querySelectorAll(".case:not([hidden])")) {
    const text = article.querySelector("h3"), open = text.classList.contains("open");
    article.querySelector(".more").hidden = !open && text.scrollHeight <= text.clientHeight + 1;
  }
}

for (const article of worstFirst) {
  const text = article.querySelector("h3");
  const more = Object.assign(document.createElement("button"), { type: "button", className: "more", textContent: "Show all" });
  text.after(more);
  const toggle = () => {
    if (more.hidden || getSelection().toString()) return;
    const open = text.classList.toggle("open");
    more.textContent = open ? "Show less" : "Show all";
    more.setAttribute("aria-expanded", open);
  };
  more.setAttribute("aria-expanded", "false");
  more.addEventListener("click", toggle);
  text.addEventListener("click", toggle);
}

addEventListener("resize", cut);
list.classList.add("cut");
list.append(...orders[sort.value]);
show(0);
