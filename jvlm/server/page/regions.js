// Boxes and points in an answer, in the forms that models write, and their pixels in the original picture.

const NUMBER = "(-?\\d{1,6}(?:\\.\\d{1,8})?)";
const BETWEEN = "(?:\\s{0,20},\\s{0,20}|\\s{1,20})";
const COLOURS = ["#e6194b", "#0a84ff", "#2fb344", "#f58231", "#a855f7", "#00a3a3", "#d6289f", "#b8860b"];
const FORMS = [
  // {"bbox_2d": [x1, y1, x2, y2], "label": "cat"}, the label before or behind, or not there
  { pattern: new RegExp(`\\{[^{}]{0,500}?"(?:bbox_2d|bbox|box_2d|point_2d|point)"\\s*:\\s*\\[\\s*${NUMBER}\\s*,\\s*${NUMBER}(?:\\s*,\\s*${NUMBER}\\s*,\\s*${NUMBER})?\\s*\\][^{}]{0,500}?\\}`, "g"), label: labelInside },
  // <ref>cat</ref><box>(x1,y1),(x2,y2)</box>, [[x1, y1, x2, y2]], or with Qwen's tokens
  { pattern: new RegExp(`(?:(?:<ref>|<\\|object_ref_start\\|>)(?<name>[^<>\\n]{1,200})(?:</ref>|<\\|object_ref_end\\|>)\\s{0,20})?(?:<box>|<\\|box_start\\|>)[\\s(\\[]{0,20}${NUMBER}${BETWEEN}${NUMBER}(?:[)\\s,(]{1,20}${NUMBER}${BETWEEN}${NUMBER})?[\\s)\\]]{0,20}(?:</box>|<\\|box_end\\|>)`, "g"), label: (found) => found.groups.name ?? "", first: 2 },
  { pattern: new RegExp(`<point>[\\s(\\[]{0,20}${NUMBER}${BETWEEN}${NUMBER}[\\s)\\]]{0,20}</point>`, "g"), label: () => "" },
  { pattern: new RegExp(`<point[^<>]{0,80}?\\sx="${NUMBER}"\\s+y="${NUMBER}"[^<>]{0,200}>(?<name>[^<>]{0,200})</point>`, "g"), label: (found) => found.groups.name, most: 2 },
  // MM1.5: <x1,y1,x2,y2>
  { pattern: new RegExp(`<${NUMBER},${NUMBER}(?:,${NUMBER},${NUMBER})?>`, "g"), label: labelBefore },
  // Qwen's tokens, left out of the text
  { pattern: new RegExp(`\\(${NUMBER},\\s*${NUMBER}\\),\\s*\\(${NUMBER},\\s*${NUMBER}\\)`, "g"), label: labelBefore },
];
const BARE = { pattern: new RegExp(`\\[\\s*${NUMBER}\\s*,\\s*${NUMBER}\\s*,\\s*${NUMBER}\\s*,\\s*${NUMBER}\\s*\\]`, "g"), label: labelBefore };

function labelInside(found) {
  const text = /"(?:label|name|text|text_content|object)"\s*:\s*("(?:[^"\\]|\\.)*")/.exec(found[0]);
  if (!text) return "";
  try {
    return JSON.parse(text[1]);
  } catch {
    return text[1].slice(1, -1);
  }
}

function labelBefore(found) {
  const line = found.input.slice(Math.max(0, found.index - 80), found.index).split(/[\n.;,>)\]]/).pop();
  return line.replace(/[^\p{L}\p{N}\s'-]+/gu, " ").trim().split(/\s+/).slice(-4).join(" ");
}

/** Return the regions of a text so far: {values: 2 or 4 numbers, label, start, end}. */
function findRegions(text) {
  const found = [];
  const take = ({ pattern, label, first = 1, most = 4 }) => {
    for (const match of text.matchAll(pattern)) {
      const end = match.index + match[0].length;
      if (found.some((other) => match.index < other.end && other.start < end)) continue;
      const values = match.slice(first, first + most).map(Number).filter(Number.isFinite);
      if (values.length === 3) continue;
      if (values.length === 4 && (values[2] <= values[0] || values[3] <= values[1])) continue;
      found.push({ values, label: String(label(match) ?? "").slice(0, 80), start: match.index, end });
    }
  };
  FORMS.forEach(take);
  if (!found.length) take(BARE);
  return found.sort((a, b) => a.start - b.start);
}

/** Return what numbers of a space are multiplied with, across and down, to be pixels of the original. */
function factors(space, original, processed) {
  const sizes = { resized: processed, original, norm1000: [1000, 1000], norm1: [1, 1] };
  const [width, height] = sizes[space] ?? processed;
  return [original[0] / width, original[1] / height];
}

/** Return values in pixels of the original. */
function toOriginal(values, space, original, processed) {
  const by = factors(space, original, processed);
  return values.map((value, index) => value * by[index % 2]);
}

/** Return the text of a box whose values are pixels of the original, in another space. */
function boxText(values, space, original, processed) {
  const by = factors(space, original, processed);
  const numbers = values.map((value, index) => value / by[index % 2]);
  return `[${numbers.map((value) => (space === "norm1" ? value.toFixed(3) : Math.round(value))).join(", ")}]`;
}
