"""Scripts of the pages. They load nothing from other hosts. Text of a run is only ever set as text, never as markup.

`SCRIPT` is in every page: values under the pointer, and images that are enlarged on click. `LIVE_SCRIPT` is in the live
page: it fetches the sections that have changed and the group that is clicked; both come as markup from our server.
"""

from __future__ import annotations

SCRIPT = """
"use strict";
(() => {
  const tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true;
  document.body.append(tip);
  const NS = "http://www.w3.org/2000/svg";
  let active = null;
  function leave() {
    if (active) active.querySelectorAll(".hover").forEach(e => e.remove());
    active = null; tip.hidden = true;
  }
  function mark(svg, name, attributes) {
    const e = document.createElementNS(NS, name);
    for (const key in attributes) e.setAttribute(key, attributes[key]);
    svg.append(e);
  }
  function show(svg, event) {
    if (!svg.chart) svg.chart = JSON.parse(svg.dataset.chart);
    const {box: [left, right, top, bottom], frame: [x0, x1, y0, y1], series} = svg.chart;
    const place = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const at = x0 + ((event.clientX - place.left) / place.width * view.width - left) / (right - left) * (x1 - x0);
    leave(); active = svg; tip.textContent = "";
    const near = series.map(line => line.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const px = x => left + (x - x0) / (x1 - x0) * (right - left);
    const nearest = near.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    mark(svg, "line", {class: "cursor hover", x1: px(nearest[0]), x2: px(nearest[0]), y1: top, y2: bottom});
    near.forEach((point, i) => {
      mark(svg, "circle", {class: `dot hover series-${i % 8}`, r: 4, cx: px(point[0]),
        cy: bottom - (point[1] - y0) / (y1 - y0) * (bottom - top)});
      const line = document.createElement("div"), value = document.createElement("b");
      value.textContent = String(point[1]);
      line.append(`${series[i].label} at ${point[0]}: `, value);
      tip.append(line);
    });
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - size.width - 6)) + "px";
    tip.style.top = Math.max(4, event.clientY - size.height - 12) + "px";
  }
  document.addEventListener("pointermove", event => {
    const svg = event.target.closest ? event.target.closest("svg[data-chart]") : null;
    if (svg) show(svg, event); else if (active) leave();
  });
  document.addEventListener("scroll", leave, {passive: true});

  const large = document.createElement("dialog"), text = document.createElement("p");
  large.id = "large";
  document.body.append(large);
  let shown = null;
  function enlarge(button) {
    const source = button.firstElementChild, ratio = Number(button.dataset.ratio) ||
      (source.naturalWidth / source.naturalHeight) || 1;
    const view = source.cloneNode(true);
    const width = Math.min(innerWidth * .92, (innerHeight * .92 - 70) * ratio);
    view.className = source.className + " view";
    view.style.width = width + "px"; view.style.height = width / ratio + "px";
    text.textContent = button.dataset.text || source.alt || "";
    large.style.width = width + "px";
    large.replaceChildren(view, text);
    shown = button;
    if (!large.open) large.showModal();
  }
  function step(by) {
    const all = [...(shown.closest(".pictures") || document).querySelectorAll(".enlarge")];
    const next = all[all.indexOf(shown) + by];
    if (next) enlarge(next);
  }
  document.addEventListener("click", event => {
    const button = event.target.closest(".enlarge");
    if (button) enlarge(button); else if (large.contains(event.target)) large.close();
  });
  large.addEventListener("keydown", event => {
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
  });
  large.addEventListener("close", () => { if (shown) shown.focus(); });
})();
"""

LIVE_SCRIPT = """
"use strict";
(() => {
  const QUICK_MS = 3000;
  const stamps = {};
  const lost = document.getElementById("lost"), dialog = document.getElementById("group");
  async function fetched(path) {
    const answer = await fetch(path, {cache: "no-store", credentials: "same-origin"});
    if (answer.status === 401) { location.reload(); throw new Error("the token is needed"); }
    if (!answer.ok) throw new Error(await answer.text());
    return answer;
  }
  async function refresh() {
    try {
      const have = encodeURIComponent(JSON.stringify(stamps));
      const changed = await (await fetched("sections?have=" + have)).json();
      const chosen = document.getElementById("iterations");
      for (const [name, {stamp, markup}] of Object.entries(changed)) {
        if (name === "groups" && chosen && chosen.selectedIndex > 0) continue;  // an older iteration is being read
        stamps[name] = stamp;
        document.getElementById(name).innerHTML = markup;
      }
      lost.hidden = true;
    } catch (error) {
      lost.textContent = `No new data: ${error.message}. The page tries again.`;
      lost.hidden = false;
    }
    setTimeout(refresh, document.hidden ? 10 * QUICK_MS : QUICK_MS);
  }
  document.addEventListener("click", async event => {
    const card = event.target.closest(".group");
    if (!card) return;
    try {
      dialog.innerHTML = await (await fetched("group?" + card.dataset.group)).text();
      if (!dialog.open) dialog.showModal();
    } catch (error) {
      lost.textContent = `The group cannot be shown: ${error.message}`;
      lost.hidden = false;
    }
  });
  document.addEventListener("change", async event => {
    if (event.target.id !== "iterations") return;
    const answer = await fetched("groups?name=" + encodeURIComponent(event.target.value));
    document.getElementById("chosen").innerHTML = await answer.text();
  });
  dialog.addEventListener("click", event => { if (event.target.closest(".close")) dialog.close(); });
  refresh();
})();
"""
