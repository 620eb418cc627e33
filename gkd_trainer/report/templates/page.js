"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
// Of the divergence; some have none.
const unit = data.unit ? ` ${data.unit}` : "";
// Text reaches the page only as text, never as markup: completions are untrusted.
const make = (name, className, ...content) => {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...content);
  return element;
};
const short = value => value === null ? "–" : value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
const percent = p => p === null ? "–" : p >= 0.1 ? (100 * p).toFixed(1) + "%" : p >= 0.0001 ? (100 * p).toPrecision(2) + "%" : "<0.01%";
const visible = text => text === "" ? "(no text)" : text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +| +$/g, spaces => "␣".repeat(spaces.length));

let described = null;
const hide = () => {
  tip.hidden = true;
  if (described) described.removeAttribute("aria-describedby");
  described = null;
};
const show = (owner, content, box, isBeside = false) => {
  hide();
  tip.replaceChildren(...content);
  tip.hidden = false;
  described = owner;
  owner.setAttribute("aria-describedby", "tip");
  const width = tip.offsetWidth, height = tip.offsetHeight, view = document.documentElement;
  if (isBeside) {
    const fits = box.left + 12 + width <= view.clientWidth - 8;
    tip.style.left = Math.max(8, fits ? box.left + 12 : box.left - 12 - width) + window.scrollX + "px";
    tip.style.top = box.top + window.scrollY + "px";
    return;
  }
  const left = Math.max(8, Math.min(box.left + box.width / 2 - width / 2, view.clientWidth - width - 8));
  let top = box.bottom + 8;
  if (top + height > view.clientHeight && box.top - height - 8 >= 0) top = box.top - height - 8;
  tip.style.left = left + window.scrollX + "px";
  tip.style.top = top + window.scrollY + "px";
};
document.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });

for (const plot of document.querySelectorAll("svg.plot")) {
  const points = (data.charts || {})[plot.dataset.key] || [];
  const cursor = plot.querySelector(".cursor");
  const labels = [...plot.closest("figure").querySelectorAll(".legend li")];
  const xLabel = plot.querySelector(".label").textContent;
  if (!points.length) continue;
  let current = points.length;
  const point = index => {
    current = Math.max(0, Math.min(points.length - 1, index));
    const [x, at, values] = points[current];
    cursor.setAttribute("transform", `translate(${at},0)`);
    cursor.setAttribute("visibility", "visible");
    const table = make("table");
    for (const [series, y] of values) {
      const swatch = labels[series].querySelector("svg").cloneNode(true);
      table.append(make("tr", "", make("td", "", swatch), make("td", "", labels[series].textContent.trim()), make("td", "", make("b", "", short(y)))));
    }
    const box = plot.getBoundingClientRect(), scale = box.width / plot.viewBox.baseVal.width;
    show(plot, [make("div", "mute", `${xLabel} ${x}`), table], { left: box.left + at * scale, top: box.top }, true);
  };
  const leave = () => { cursor.setAttribute("visibility", "hidden"); hide(); };
  const nearest = event => {
    const box = plot.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * plot.viewBox.baseVal.width;
    let best = 0;
    points.forEach((each, index) => { if (Math.abs(each[1] - at) < Math.abs(points[best][1] - at)) best = index; });
    point(best);
  };
  plot.addEventListener("pointermove", nearest);
  plot.addEventListener("pointerdown", nearest);
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", event => {
    const move = { ArrowLeft: current - 1, ArrowRight: current === points.length ? 0 : current + 1, Home: 0, End: points.length - 1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    point(move);
  });
}

const measure = document.getElementById("measure");
const maps = [...(data.entries || []).flatMap(entry => entry.maps), ...(data.maps || []), ...Object.values(data.sides || {}).flat()];
const value = token => { const raw = token[Number(measure.value)]; return raw === null ? null : Number(measure.value) === 4 ? 1 - raw : raw; };
let high = 1;
const rescale = () => {
  // One scale for the whole page, so that completions can be compared; a few outliers must not bleach the rest.
  const values = maps.flatMap(map => map.tokens.map(value)).filter(each => each !== null).sort((a, b) => a - b);
  high = Number(measure.value) === 4 ? 1 : Math.max(1e-6, values[Math.floor(0.99 * (values.length - 1))] || 0);
  document.getElementById("scale-low").textContent = "0";
  document.getElementById("scale-high").textContent = short(Number(high.toPrecision(2))) + (Number(measure.value) === 4 ? "" : `${Number(measure.value) === 1 ? unit : " nats"} or more`);
};
const level = number => number === null ? "" : "h" + Math.max(0, Math.min(9, Math.floor(10 * number / high)));

const row = (name, shown) => make("tr", "", make("td", "mute", name), make("td", "", shown));
const side = (name, entropy, p, top, rank) => {
  const table = make("table", "", row("entropy", short(entropy) + " nats"), row("this token", percent(p)));
  top.forEach(([candidate, p], index) => {
    const code = make("code", index === rank ? "is" : "", visible(candidate));
    table.append(make("tr", "", make("td", "", code), make("td", "", percent(p))));
  });
  return make("div", "", make("p", "", name), table);
};
const details = token => {
  const [text, divergence, student, teacher, acceptance, studentP, teacherP, studentTop, teacherTop, studentRank, teacherRank] = token;
  const head = make("div", "", make("code", "is", visible(text)));
  if (divergence === null && !studentTop.length) return [head, make("div", "mute", "not compared")];
  const table = make("table", "", row("divergence", short(divergence) + unit), row("acceptance", short(acceptance)));
  return [head, table, make("div", "sides", side("Student", student, studentP, studentTop, studentRank), side("Teacher", teacher, teacherP, teacherTop, teacherRank))];
};

const drawMap = map => {
  const article = make("article", "map");
  const compared = map.tokens.filter(token => token[1] !== null);
  const mean = compared.length ? compared.reduce((sum, token) => sum + token[1], 0) / compared.length : null;
  article.append(make("p", "", map.caption), make("p", "numbers", `${map.isCut ? "first " : ""}${map.tokens.length} tokens` + (mean === null ? "" : `, mean divergence ${short(mean)}${unit}`)));
  if (map.prompt) {
    const prompt = make("pre", "", map.prompt);
    prompt.dir = "auto";
    article.append(make("details", "", make("summary", "", "prompt"), prompt));
  }
  const tokens = make("div", "tokens");
  tokens.dir = "auto";
  tokens.setAttribute("role", "group");
  tokens.setAttribute("aria-label", "tokens; arrow keys move");
  map.tokens.forEach((token, index) => {
    const text = token[0].includes("\n") ? token[0].replace(/\n/g, "↵\n") : token[0] || "∅";
    const element = make("span", "t " + level(value(token)), text);
    element.tabIndex = index ? -1 : 0;
    element.token = token;
    tokens.append(element);
  });
  if (!map.tokens.length) tokens.append(make("span", "mute", "(empty)"));
  article.append(tokens);
  const open = event => { const target = event.target.closest(".t"); if (target) show(target, details(target.token), target.getClientRects()[0] || target.getBoundingClientRect()); };
  tokens.addEventListener("pointerover", open);
  tokens.addEventListener("focusin", open);
  tokens.addEventListener("click", event => { const target = event.target.closest(".t"); if (target) target.focus(); });
  tokens.addEventListener("pointerleave", hide);
  tokens.addEventListener("focusout", hide);
  tokens.addEventListener("keydown", event => {
    const all = [...tokens.querySelectorAll(".t")], at = all.indexOf(document.activeElement);
    const backwards = getComputedStyle(tokens).direction === "rtl" ? 1 : -1;
    const move = { ArrowLeft: at + backwards, ArrowRight: at - backwards, ArrowUp: at - 10, ArrowDown: at + 10, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || move === undefined) return;
    event.preventDefault();
    const next = all[Math.max(0, Math.min(all.length - 1, move))];
    all[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return article;
};

if (measure) {
  const holder = document.getElementById("maps"), slider = document.getElementById("entry");
  const draw = () => {
    hide();
    if (holder) {
      const entry = slider ? data.entries[Number(slider.value)] : null;
      if (entry) {
        document.getElementById("step").textContent = entry.step;
        slider.setAttribute("aria-valuetext", entry.step);
      }
      holder.replaceChildren(...(entry ? entry.maps : data.maps).map(drawMap));
    }
    for (const place of document.querySelectorAll("[data-side]")) place.replaceChildren(...data.sides[place.dataset.side].map(drawMap));
  };
  if (slider) {
    const step = by => { slider.value = String(Number(slider.value) + by); draw(); };
    slider.addEventListener("input", draw);
    document.getElementById("previous").addEventListener("click", () => step(-1));
    document.getElementById("next").addEventListener("click", () => step(1));
  }
  measure.addEventListener("change", () => { rescale(); draw(); });
  rescale();
  draw();
}
})();
