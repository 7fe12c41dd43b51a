// Shows the value nearest to the pointer. The values are the rows of the table under each chart.
"use strict";
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector(".plot svg");
  const rows = [...chart.querySelectorAll("tr[data-x]")].map(row => ({
    x: +row.dataset.x, y: +row.dataset.y, cells: [...row.cells].map(cell => cell.textContent),
  }));
  if (!rows.length) continue;
  const names = [...chart.querySelectorAll(".values th")].map(cell => cell.textContent);
  const tip = document.getElementById("tip");
  const here = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  here.setAttribute("class", "here");
  here.setAttribute("r", "5");
  here.style.display = "none";
  svg.append(here);
  const leave = () => { tip.hidden = true; here.style.display = "none"; };
  const show = event => {
    const matrix = svg.getScreenCTM();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
    let best = rows[0], least = Infinity;
    for (const row of rows) {
      const distance = (row.x - at.x) ** 2 + (row.y - at.y) ** 2;
      if (distance < least) { best = row; least = distance; }
    }
    here.style.display = "";
    here.setAttribute("cx", best.x);
    here.setAttribute("cy", best.y);
    tip.replaceChildren();
    best.cells.forEach((cell, i) => {
      const line = document.createElement("div");
      const name = document.createElement("span");
      name.textContent = names[i] + " ";
      line.append(name, cell);
      tip.append(line);
    });
    tip.hidden = false;
    const place = new DOMPoint(best.x, best.y).matrixTransform(matrix);
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(place.x + 12, innerWidth - box.width - 4)) + "px";
    tip.style.top = Math.max(4, place.y - box.height - 12) + "px";
  };
  const plot = chart.querySelector(".plot");
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  // A finger leaves the screen at once: what it showed stays until the next touch elsewhere.
  plot.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") leave(); });
  addEventListener("pointerdown", event => { if (!plot.contains(event.target)) leave(); }, { capture: true });
  addEventListener("scroll", leave, { passive: true });
}
