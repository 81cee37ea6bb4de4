"use strict";
/* The plots and the search that goes on by itself. Numbers come thinned from the server; zooming asks for the stretch that is seen. */

const DARK = matchMedia("(prefers-color-scheme: dark)").matches;
const COLOURS = DARK
  ? ["#5aa9e6", "#f28a6f", "#6cc58a", "#bd97e3", "#e0b84a", "#5fc7c7", "#e283b0", "#a3acb8"]
  : ["#2f6f9f", "#c8553d", "#3d8b57", "#8a5fb0", "#b8860b", "#3a9a9a", "#b04a7a", "#6b7280"];
const LIVE_MS = 2000;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

async function fetchLines(figure) {
  const query = new URLSearchParams({ runs: figure.dataset.runs, name: figure.dataset.name, against: figure.dataset.against });
  if (figure.span) {
    query.set("from", figure.span[0]);
    query.set("to", figure.span[1]);
  }
  const answer = await fetch(`/data/lines?${query}`);
  if (!answer.ok) throw new Error((await answer.json()).fact ?? answer.status);
  return answer.json();
}

/* One table for uPlot of lines that have steps of their own; what was taken again is a line of its own, drawn faintly. */
function aligned(found) {
  const tables = [];
  const series = [{ label: found.against, value: (_, value) => (value == null ? "" : Number(value.toPrecision(8)).toString()) }];
  found.lines.forEach((line, place) => {
    const stroke = COLOURS[line.run % COLOURS.length];
    tables.push([line.x, line.y]);
    series.push({
      label: line.label, stroke, width: 1.5, points: { show: line.x.length < 60, size: 4, fill: stroke }, spanGaps: false,
      value: (_, value) => (value == null ? "" : Number(value.toPrecision(6)).toString()),
    });
    line.again.forEach(([x, y], number) => {
      tables.push([x, y]);
      series.push({ label: `${line.label}, before it was taken again${number ? ` (${number + 1})` : ""}`, stroke: stroke + "aa", width: 1.25, dash: [4, 4], points: { show: false } });
    });
  });
  const filled = tables.filter((table) => table[0].length);
  const kept = series.filter((_, place) => place === 0 || tables[place - 1][0].length);
  /* Where one line has no value since another has a step there, it goes on; where its own value is null, there is a gap. */
  return { data: filled.length ? uPlot.join(filled, filled.map((table) => table.map(() => 1))) : [[]], series: kept };
}

/* Numbers of an axis, short enough to stand beside it: 1.5 G, 20 k, 3e-5. */
function short(value) {
  if (value == null) return "";
  const size = Math.abs(value);
  if (size && size < 1e-3) return value.toExponential().replace("e-0", "e-");
  for (const [unit, letter] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e4, " k"]]) {
    if (size >= unit) return `${Number((value / (unit === 1e4 ? 1e3 : unit)).toPrecision(6))}${letter}`;
  }
  return value.toLocaleString("en", { maximumSignificantDigits: 6 });
}

function markers(figure) {
  return {
    hooks: {
      draw: [(plot) => {
        const context = plot.ctx;
        context.save();
        context.strokeStyle = colour("--trouble");
        context.lineWidth = 2 * devicePixelRatio;
        context.setLineDash([]);
        for (const mark of figure.marks) {
          const x = plot.valToPos(mark, "x", true);
          if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) continue;
          context.beginPath();
          context.moveTo(x, plot.bbox.top);
          context.lineTo(x, plot.bbox.top + 10 * devicePixelRatio);
          context.stroke();
        }
        context.restore();
      }],
    },
  };
}

function drawn(figure, found) {
  const { data, series } = aligned(found);
  const log = figure.dataset.log === "1";
  const marked = found.lines.reduce((sum, line) => sum + line.marked, 0);
  figure.marks = found.lines.flatMap((line) => line.marks);
  figure.versions = found.lines.map((line) => line.version).join();
  let caption = figure.querySelector("figcaption");
  if (!caption) {
    caption = document.createElement("figcaption");
    caption.append(document.createElement("span"), document.createElement("span"));
    caption.lastChild.className = "note";
    figure.prepend(caption);
  }
  caption.firstChild.textContent = found.name;
  const again = found.lines.some((line) => line.again.length) ? "dashed: steps as they were before a later session took them again" : "";
  caption.lastChild.textContent = [marked ? `not finite at ${marked.toLocaleString("en")} step${marked === 1 ? "" : "s"} (marked above)` : "", again].filter(Boolean).join("; ");
  const signature = JSON.stringify([series.map((each) => each.label), found.against, log]);
  if (figure.chart && figure.signature === signature) {
    figure.chart.setData(data, !figure.span);
    return;
  }
  figure.chart?.destroy();
  figure.signature = signature;
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
  figure.chart = new uPlot({
    width: figure.clientWidth, height: figure.classList.contains("small") ? 200 : 320, series,
    scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
    axes: [axis, { ...axis, size: 64, values: (_, ticks) => ticks.map(short) }], plugins: [markers(figure)], legend: { live: true },
    cursor: { drag: { x: true, y: false, setScale: false } },
    hooks: {
      setSelect: [(plot) => {
        if (plot.select.width < 4) return;
        figure.span = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
        plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        plot.setScale("x", { min: figure.span[0], max: figure.span[1] });
        refresh(figure);
      }],
    },
  }, data, figure);
  figure.chart.over.addEventListener("dblclick", () => { figure.span = null; refresh(figure); });
}

async function refresh(figure) {
  if (!figure.dataset.runs) {
    figure.chart?.destroy();
    figure.chart = null;
    figure.signature = "";
    return;
  }
  const found = await fetchLines(figure);
  if (figure.chart && figure.versions === found.lines.map((line) => line.version).join() && figure.asked === JSON.stringify([figure.dataset, figure.span])) return;
  figure.asked = JSON.stringify([figure.dataset, figure.span]);
  drawn(figure, found);
  figure.dataset.points = found.lines.reduce((sum, line) => sum + line.x.length, 0);
}

function start(figure) {
  const failed = (error) => { figure.textContent = `The numbers cannot be read: ${error.message}`; };
  refresh(figure).catch(failed);
  if (figure.dataset.live) setInterval(() => { if (!document.hidden) refresh(figure).catch(() => {}); }, LIVE_MS);
  new ResizeObserver(() => figure.chart?.setSize({ width: figure.clientWidth, height: figure.chart.height })).observe(figure);
}

function choice(form) {
  const figure = document.querySelector("figure.plot");
  form.addEventListener("change", () => {
    const data = new FormData(form);
    figure.dataset.runs = data.getAll("run").join(",");
    figure.dataset.name = data.get("name");
    figure.dataset.against = data.get("against");
    figure.dataset.log = data.get("log") ? "1" : "";
    figure.span = null;
    refresh(figure);
    history.replaceState(null, "", `/runs?${new URLSearchParams({ runs: figure.dataset.runs, name: figure.dataset.name, against: figure.dataset.against })}`);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    location.href = `/runs/compare?${new URLSearchParams({ runs: new FormData(form).getAll("run").join(",") })}`;
  });
}

/* A search that has not looked at everything goes on by itself, until there is a page of hits. */
async function goOn(link) {
  const progress = document.getElementById("progress");
  const body = document.querySelector("#hits tbody");
  while (link && link.dataset.search && body.rows.length < 50) {
    const page = new DOMParser().parseFromString(await (await fetch(link.href)).text(), "text/html");
    const found = page.getElementById("progress");
    if (!found) return;
    body.append(...page.querySelectorAll("#hits tbody tr"));
    progress.replaceChildren(...found.childNodes);
    link = document.getElementById("next");
  }
}

addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("figure.plot").forEach(start);
  const form = document.getElementById("choice");
  if (form) choice(form);
  const more = document.getElementById("more");
  more?.addEventListener("change", () => {
    if (!more.value) return;
    const figure = document.createElement("figure");
    figure.className = "plot small";
    Object.assign(figure.dataset, { runs: document.getElementById("more-plot").dataset.runs, name: more.value, against: "step", live: "1" });
    document.querySelector(".plots").append(figure);
    start(figure);
  });
  const steps = document.getElementById("step-form");
  steps?.addEventListener("submit", (event) => {
    event.preventDefault();
    location.href = `/runs/${steps.dataset.run}/steps/${steps.elements.step.value}`;
  });
  goOn(document.getElementById("next"));
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const target = { ArrowRight: "a[rel=next]", ArrowLeft: "a[rel=prev]", "/": "input[type=search]" }[event.key];
    const found = target && document.querySelector(target);
    if (!found) return;
    event.preventDefault();
    if (event.key === "/") found.focus(); else found.click();
  });
});
