"use strict";
const NAMES = ["machine", "op", "shape", "dtype", "mode"];
const select = (name) => document.querySelector(`select[name=${name}]`);
const losses = document.querySelector("input[name=lost]");

// What the choices leave: cases and marks have all the attributes, a plot those that all its marks share.
function fits(element, chosen) {
  return NAMES.every((name) => !chosen[name] || !(name in element.dataset) || element.dataset[name] === chosen[name]);
}

function apply() {
  const chosen = Object.fromEntries(NAMES.map((name) => [name, select(name).value]));
  let shown = 0, lost = 0;
  for (const element of document.querySelectorAll(".case, .plot, .mark")) {
    const hidden = !fits(element, chosen) || (losses.checked && "lost" in element.dataset && element.dataset.lost === "");
    element.toggleAttribute("hidden", hidden);
    if (element.classList.contains("mark")) element.style.display = hidden ? "none" : "";
    if (!hidden && element.classList.contains("case")) { shown += 1; lost += element.dataset.lost ? 1 : 0; }
  }
  for (const plot of document.querySelectorAll(".plot:not([hidden])"))
    plot.hidden = ![...plot.querySelectorAll(".mark")].some((mark) => !mark.hasAttribute("hidden"));
  for (const section of document.querySelectorAll("section"))
    section.hidden = !section.querySelector(".case:not([hidden]), .plot:not([hidden])")
      || (section.id === "overview" && chosen.op !== "");  // one operation has its own section
  document.querySelector("output").textContent = `${shown} cases, ${lost} of them lost`;
  const kept = NAMES.filter((name) => chosen[name]).map((name) => [name, chosen[name]]);
  if (losses.checked) kept.push(["lost", "1"]);
  history.replaceState(null, "", kept.length ? "#" + new URLSearchParams(kept) : location.pathname);
}

const asked = new URLSearchParams(location.hash.slice(1));
for (const name of NAMES) {
  if (asked.has(name)) select(name).value = asked.get(name);
  select(name).addEventListener("change", apply);
}
losses.checked = asked.has("lost");
losses.addEventListener("change", apply);
document.querySelector("button").addEventListener("click", () => {
  for (const name of NAMES) select(name).value = "";
  losses.checked = false;
  apply();
});
apply();
