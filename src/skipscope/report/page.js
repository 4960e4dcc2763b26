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
  for (const term of document.querySelectorAll("abbr[title]")) {
    term.dataset.tip = term.title;
    term.setAttribute("aria-label", `${term.textContent}: ${term.title}`);
    term.removeAttribute("title");
  }
  const show = (owner, x, y) => {
    tip.hidden = !owner;
    if (!owner) return;
    tip.textContent = owner.dataset.tip;
    tip.style.left = Math.max(4, Math.min(x + 12, root.clientWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = y + 16 + "px";
  };
  const below = (owner) => {
    const box = owner.getBoundingClientRect();
    show(owner, box.left + scrollX, box.bottom + scrollY - 8);
  };
  const owner = (target) => target.closest && target.closest("[data-tip]");
  document.addEventListener("pointerover", (event) => show(owner(event.target), event.pageX, event.pageY));
  document.addEventListener("focusin", (event) => { if (owner(event.target)) below(owner(event.target)); });
  document.addEventListener("focusout", () => show(null));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") show(null); });

  // A chart's points by keyboard: tab to the chart, then the arrow keys.
  for (const chart of document.querySelectorAll("svg.chart")) {
    const points = [...chart.querySelectorAll("[data-tip]")];
    if (!points.length) continue;
    chart.tabIndex = 0;
    let at = -1;
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      at = (at + step + points.length) % points.length;
      below(points[at]);
      chart.setAttribute("aria-description", points[at].dataset.tip);
    });
  }

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
