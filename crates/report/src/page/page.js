"use strict";
// The timeline can be looked at closely: by mouse, touch and keyboard.
const WIDTH = 10000;
const clock = (seconds) => seconds >= 1 ? `${seconds.toFixed(2)} s`
  : seconds >= 1e-3 ? `${(seconds * 1e3).toFixed(2)} ms` : `${(seconds * 1e6).toFixed(1)} us`;

// What is looked at outlives an update of a live page.
const view = { from: 0, width: WIDTH };

function show(drawing) {
  view.width = Math.min(WIDTH, Math.max(2, view.width));
  view.from = Math.min(WIDTH - view.width, Math.max(0, view.from));
  const box = drawing.viewBox.baseVal;
  drawing.setAttribute("viewBox", `${view.from} 0 ${view.width} ${box.height}`);
  const step = Number(drawing.dataset.step);
  drawing.parentElement.querySelectorAll(".ticks span").forEach((tick, quarter) => {
    tick.textContent = clock(step * (view.from + view.width * quarter / 4) / WIDTH);
  });
}

function zoom(drawing, factor, at = 0.5) {
  const middle = view.from + at * view.width;
  view.width = Math.min(WIDTH, view.width * factor);
  view.from = middle - at * view.width;
  show(drawing);
}

const moves = {
  in: (drawing) => zoom(drawing, 0.5),
  out: (drawing) => zoom(drawing, 2),
  left: (drawing) => { view.from -= view.width / 4; show(drawing); },
  right: (drawing) => { view.from += view.width / 4; show(drawing); },
  all: (drawing) => { view.from = 0; view.width = WIDTH; show(drawing); },
};
const keys = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "all", Home: "all" };

function timeline(drawing) {
  const fingers = new Map();
  const share = (x) => { const box = drawing.getBoundingClientRect(); return (x - box.left) / box.width; };
  const apart = () => { const [a, b] = [...fingers.values()]; return Math.abs(a - b); };
  drawing.closest(".timeline").querySelectorAll("[data-zoom]").forEach((button) => {
    button.onclick = () => moves[button.dataset.zoom](drawing);
  });
  drawing.onkeydown = (event) => {
    const move = keys[event.key];
    if (!move || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    moves[move](drawing);
  };
  drawing.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.shiftKey && document.activeElement !== drawing) return;
    event.preventDefault();
    zoom(drawing, event.deltaY > 0 ? 1.25 : 0.8, share(event.clientX));
  }, { passive: false });
  drawing.ondblclick = (event) => zoom(drawing, 0.25, share(event.clientX));
  drawing.onpointerdown = (event) => {
    fingers.set(event.pointerId, event.clientX);
    drawing.setPointerCapture(event.pointerId);
  };
  drawing.onpointerup = drawing.onpointercancel = (event) => fingers.delete(event.pointerId);
  drawing.onpointermove = (event) => {
    const before = fingers.get(event.pointerId);
    if (before === undefined) {
      const title = event.target.querySelector?.("title");
      if (event.target !== drawing && title)
        drawing.parentElement.querySelector(".readout").textContent = title.textContent;
      return;
    }
    const distance = fingers.size === 2 ? apart() : 0;
    fingers.set(event.pointerId, event.clientX);
    if (fingers.size === 2) {
      const [a, b] = [...fingers.values()];
      if (apart() > 0) zoom(drawing, distance / apart(), share((a + b) / 2));
    } else {
      view.from -= (share(event.clientX) - share(before)) * view.width;
      show(drawing);
    }
  };
  if (view.width < WIDTH) show(drawing);
}

function start() {
  document.querySelectorAll(".drawing").forEach(timeline);
}
start();

// A page that is served while its job runs takes over, part by part, what has changed.
const refresh = Number(document.documentElement.dataset.refresh);
if (refresh) setInterval(async () => {
  try {
    const answer = await fetch(location.pathname, { cache: "no-store" });
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    const parts = [".facts", ".about", "main > section"];
    const same = parts.every((part) => document.querySelectorAll(part).length === next.querySelectorAll(part).length);
    if (!same) {
      document.querySelector("main").replaceWith(next.querySelector("main"));
      document.querySelector("header").replaceWith(next.querySelector("header"));
    } else for (const part of parts) {
      const now = document.querySelectorAll(part);
      next.querySelectorAll(part).forEach((fresh, index) => {
        if (now[index].innerHTML !== fresh.innerHTML && !now[index].contains(document.activeElement))
          now[index].replaceWith(fresh);
      });
    }
    start();
  } catch { /* The job is over, or its server is: what was seen last stays. */ }
}, refresh * 1000);
