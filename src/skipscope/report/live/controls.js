// The controls: each input of the page carries the name of its setting.

import { RANGES, learningRate } from "./settings.js";

const SHOWN = { rate: learningRate, gain: (s) => s.gain.toFixed(2), strength: (s) => s.strength.toFixed(2) };

// Calls back with the name and the new value of each control that changes.
export function listenToControls(root, change) {
  const read = (event) => {
    const { name, type, value, checked } = event.target;
    if (!name || (type === "radio" && !checked)) return;
    if (type === "number" && value === "") return;
    change(name, type === "range" || type === "number" ? Number(value) : value);
  };
  root.addEventListener("input", read);
  root.addEventListener("change", read);
}

// Sets the controls to the settings.
export function showSettings(root, settings) {
  for (const input of root.querySelectorAll("[name]")) {
    const value = settings[input.name];
    if (value === undefined) continue;
    if (input.type === "radio") input.checked = input.value === value;
    else if (document.activeElement !== input || input.type !== "number") input.value = value;
    if (input.type === "range") {
      const [low, high] = RANGES[input.name], text = String((SHOWN[input.name] ?? ((s) => s[s && input.name]))(settings));
      input.style.setProperty("--part", `${(100 * (value - low)) / (high - low)}%`);
      input.setAttribute("aria-valuetext", text);
      const output = root.querySelector(`output[data-of="${input.name}"]`);
      if (output) output.textContent = text;
    }
  }
  const single = settings.data === "lecture";
  for (const input of root.querySelectorAll('[name="batch"]')) input.disabled = single;
  for (const input of root.querySelectorAll('[name="strength"]')) input.disabled = settings.shortcut === "none";
}
