// Curves drawn by Plotly in the page's own colours; knows no run.

/* global Plotly */

const dark = matchMedia("(prefers-color-scheme: dark)");
const calm = { displayModeBar: false, responsive: true, doubleClick: "reset" };

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(title) {
  return {
    title: { text: title, standoff: 10, font: { size: 13 } },
    gridcolor: color("--line"),
    linecolor: color("--line"),
    zeroline: false,
    automargin: true,
  };
}

function layout(chart) {
  return {
    margin: { l: 52, r: 20, t: 16, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 13, color: color("--faint") },
    hoverlabel: { bgcolor: color("--surface"), bordercolor: color("--line"), font: { color: color("--text") } },
    hovermode: "x unified",
    dragmode: "zoom",
    uirevision: "kept", // a zoom outlives new points
    showlegend: chart.curves.length > 1,
    legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom", font: { color: color("--text") } },
    xaxis: { ...axis("step"), rangemode: "tozero", tickformat: ",d" },
    yaxis: {
      ...axis(""),
      tickformat: chart.whole ? ",d" : "",
      type: chart.log ? "log" : "linear",
      rangemode: chart.fromZero ? "tozero" : "normal",
    },
  };
}

function trace(curve) {
  return {
    name: curve.name,
    x: curve.x,
    y: curve.y,
    type: "scatter",
    mode: curve.markers ? "lines+markers" : "lines",
    line: { color: color(curve.color), width: curve.width ?? 2 },
    marker: { size: 6 },
    opacity: curve.opacity ?? 1,
    hovertemplate: curve.hover ?? "%{y:.4f}",
    hoverinfo: curve.silent ? "skip" : undefined,
  };
}

// A chart in an element. `draw` may be called as often as there is something new: it draws once per frame.
export function chartIn(element) {
  let latest = null;
  let waiting = false;
  function now() {
    waiting = false;
    Plotly.react(element, latest.curves.map(trace), layout(latest), calm);
  }
  function draw(chart) {
    latest = chart;
    if (!waiting) requestAnimationFrame(now);
    waiting = true;
  }
  dark.addEventListener("change", () => latest && draw(latest));
  return draw;
}

// A curve without its noise: each point is the mean of those around it, so that it does not lag behind.
export function smoothed(values) {
  const radius = Math.max(1, Math.round(values.length / 80));
  return values.map((_, index) => {
    const reach = Math.min(radius, index, values.length - 1 - index); // symmetric, at the ends too
    const near = values.slice(index - reach, index + reach + 1).filter((value) => value != null);
    return near.length ? near.reduce((sum, value) => sum + value, 0) / near.length : null;
  });
}
