// A curve in the height of a line, as SVG; knows no run.

const WIDTH = 120;
const HEIGHT = 28;
const EDGE = 2;
const NAMESPACE = "http://www.w3.org/2000/svg";

export function spark(values) {
  const svg = document.createElementNS(NAMESPACE, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("class", "spark");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", describe(values));
  if (values.length > 1) {
    const line = document.createElementNS(NAMESPACE, "polyline");
    line.setAttribute("points", points(values));
    svg.append(line);
  }
  return svg;
}

function points(values) {
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  return values
    .map((value, index) => {
      const x = EDGE + (index / (values.length - 1)) * (WIDTH - 2 * EDGE);
      const y = HEIGHT - EDGE - ((value - low) / span) * (HEIGHT - 2 * EDGE);
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    })
    .join(" ");
}

function describe(values) {
  if (values.length < 2) return "no curve yet";
  return `loss from ${values[0].toFixed(2)} to ${values.at(-1).toFixed(2)}`;
}
