// A button that changes between light and dark; until it is pressed the page follows the system.
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const button = document.getElementById("theme");

function name() {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  button.textContent = dark ? "Light" : "Dark";
  button.setAttribute("aria-label", dark ? "Change to light colours" : "Change to dark colours");
  return dark;
}

button.addEventListener("click", () => {
  root.dataset.theme = name() ? "light" : "dark";
  name();
});
system.addEventListener("change", name);
name();
button.hidden = false;
