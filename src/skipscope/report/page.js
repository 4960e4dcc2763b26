// Tips under the pointer, the slider, and the surfaces that turn: the page is whole without it.
"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Tips: a chart's own titles, shown at once and on touch too. Only ever as text.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  for (const title of document.querySelectorAll("svg title")) {
    title.parentElement.dataset.tip = title.textContent;
    title.remove();
  }
  document.addEventListener("pointerover", (event) => {
    const owner = event.target.closest && event.target.closest("[data-tip]");
    tip.hidden = !owner;
    if (!owner) return;
    tip.textContent = owner.dataset.tip;
    const width = root.clientWidth;
    tip.style.left = Math.max(4, Math.min(event.pageX + 12, width - tip.offsetWidth - 8)) + "px";
    tip.style.top = event.pageY + 16 + "px";
  });

  // The slider: one line strong, the others in the background.
  for (const slider of document.querySelectorAll(".slider")) {
    const input = slider.querySelector("input");
    const output = slider.querySelector("output");
    const labels = JSON.parse(slider.dataset.labels);
    const frames = slider.closest("figure").querySelectorAll("g.frame");
    const show = () => {
      output.textContent = labels[input.value];
      for (const frame of frames) {
        const on = frame.dataset.frame === input.value;
        frame.classList.toggle("on", on);
        if (on) frame.parentElement.append(frame);
      }
    };
    input.addEventListener("input", show);
    show();
  }

  // Surfaces: drawn when they come into sight; turning one turns its neighbours.
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      Surface3D.group([...target.querySelectorAll(".canvas")], JSON.parse(target.querySelector("script").textContent));
      target.dataset.drawn = "yes";
    }
  }, { rootMargin: "300px" });
  for (const scenes of document.querySelectorAll(".scenes")) seen.observe(scenes);
})();
