// Timelines: pointing at a step, or going there with the arrow keys, tells what happens at it.
for (const schedule of document.querySelectorAll(".schedule")) {
  const steps = [...schedule.querySelectorAll(".timeline button")];
  const about = schedule.querySelector(".about");
  const hint = about.textContent;
  let focused = null;

  const tell = (step) => {
    about.textContent = step ? step.dataset.about : hint;
    for (const one of steps) one.classList.toggle("told", one === step);
  };

  const go = (step) => {
    for (const one of steps) one.tabIndex = one === step ? 0 : -1;
    step.focus();
  };

  // One stop of the tab key for the whole timeline.
  for (const [number, step] of steps.entries()) {
    step.tabIndex = number ? -1 : 0;
    step.addEventListener("pointerenter", () => tell(step));
    step.addEventListener("click", () => go(step));
    step.addEventListener("focus", () => tell((focused = step)));
    step.addEventListener("blur", () => tell((focused = null)));
    step.addEventListener("keydown", (event) => {
      const to = { ArrowRight: number + 1, ArrowLeft: number - 1, Home: 0, End: steps.length - 1 }[event.key];
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      if (steps[to]) go(steps[to]);
    });
  }
  schedule.querySelector(".timeline").addEventListener("pointerleave", () => tell(focused));
}
