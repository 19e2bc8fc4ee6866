// A small part of markdown to elements: code, headings, lists, quotes, tables, emphasis, links. TeX stays text.

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const LIST = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = new RegExp(
  [
    "(?<code>(`+)(?<codetext>[\\s\\S]*?[^`])\\2(?!`))",
    "(?<tex>\\$\\$[\\s\\S]+?\\$\\$|\\\\\\([\\s\\S]+?\\\\\\)|\\\\\\[[\\s\\S]+?\\\\\\])",
    "(?<strong>(\\*\\*|__)(?=\\S)(?<strongtext>[\\s\\S]*?\\S)\\6)",
    "(?<em>(?<![\\w*])\\*(?=[^\\s*])(?<emtext>[^*\\n]*[^\\s*])\\*(?!\\*))",
    "(?<link>\\[(?<linktext>[^\\]\\n]{1,500})\\]\\((?<url>https?:\\/\\/[^\\s()]{1,2000})\\))",
    "(?<bare>https?:\\/\\/[^\\s<>()\\[\\]\"'`]{1,2000}[^\\s<>()\\[\\]\"'`.,;:!?])",
  ].join("|"),
  "g",
);

/** Split a text into blocks; each is {kind, lines} and keeps its source, so that one that stays can be kept. */
function blocksOf(text) {
  const lines = text.split("\n");
  const blocks = [];
  const push = (kind, from, to, more = {}) => blocks.push({ kind, lines: lines.slice(from, to), ...more });
  const begins = (line) => FENCE.test(line) || LIST.test(line) || RULE.test(line) || /^(#{1,6}\s|\s*>)/.test(line);
  for (let i = 0; i < lines.length; ) {
    const from = i;
    const fence = FENCE.exec(lines[i]);
    if (fence) {
      const end = (line) => line.trim().startsWith(fence[1]) && !line.trim().slice(fence[1].length).trim();
      for (i++; i < lines.length && !end(lines[i]); i++);
      push("code", from + 1, i, { language: fence[2] });
      i++;
    } else if (!lines[i].trim()) {
      i++;
    } else if (RULE.test(lines[i])) {
      push("rule", from, ++i);
    } else if (/^#{1,6}\s/.test(lines[i])) {
      push("heading", from, ++i);
    } else if (/^\s*>/.test(lines[i])) {
      for (; i < lines.length && /^\s*>/.test(lines[i]); i++);
      push("quote", from, i);
    } else if (LIST.test(lines[i])) {
      for (i++; i < lines.length && (LIST.test(lines[i]) || /^\s{2,}\S/.test(lines[i]) || (!lines[i].trim() && LIST.test(lines[i + 1] ?? ""))); i++);
      push("list", from, i);
    } else if (lines[i].includes("|") && (lines[i + 1] ?? "").includes("-") && lines[i + 1].length < 500 && TABLE_RULE.test(lines[i + 1])) {
      for (i += 2; i < lines.length && lines[i].includes("|"); i++);
      push("table", from, i);
    } else {
      for (i++; i < lines.length && lines[i].trim() && !begins(lines[i]); i++);
      push("paragraph", from, i);
    }
  }
  return blocks;
}

/** Return the nodes of a line's markup; a line that is very long is text alone, since looking for ends takes time. */
function inline(text, depth = 0) {
  if (text.length > 5000) return [text];
  const nodes = [];
  let last = 0;
  for (const found of text.matchAll(INLINE)) {
    const group = found.groups;
    if (found.index > last) nodes.push(text.slice(last, found.index));
    last = found.index + found[0].length;
    if (group.code) nodes.push(make("code", { textContent: group.codetext }));
    else if (group.tex) nodes.push(make("span", { className: "tex", textContent: found[0] }));
    else if (group.strong) nodes.push(make("strong", {}, ...(depth < 3 ? inline(group.strongtext, depth + 1) : [group.strongtext])));
    else if (group.em) nodes.push(make("em", {}, ...(depth < 3 ? inline(group.emtext, depth + 1) : [group.emtext])));
    else nodes.push(make("a", { href: group.url ?? group.bare, textContent: group.linktext ?? group.bare, target: "_blank", rel: "noopener noreferrer" }));
  }
  if (last < text.length) nodes.push(text.slice(last));
  return nodes;
}

function listOf(lines) {
  const items = lines.filter((line) => line.trim()).map((line) => LIST.exec(line) ?? line);
  let at = 0;
  const build = (indent, depth) => {
    const first = items[at];
    const ordered = /\d/.test(first[2]);
    const list = make(ordered ? "ol" : "ul");
    if (ordered) list.start = parseInt(first[2], 10);
    while (at < items.length) {
      const item = items[at];
      if (typeof item === "string") {
        (list.lastElementChild ?? list).append(" ", ...inline(item.trim()));
        at++;
      } else if (item[1].length < indent) {
        break;
      } else if (item[1].length > indent + 1 && list.lastElementChild && depth < 8) {
        list.lastElementChild.append(build(item[1].length, depth + 1));
      } else {
        list.append(make("li", {}, ...inline(item[3])));
        at++;
      }
    }
    return list;
  };
  const lists = [];
  while (at < items.length) lists.push(build(items[at][1].length, 0));
  return lists.length === 1 ? lists[0] : make("div", {}, ...lists);
}

function tableOf(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => make("tr", {}, ...cells(line).map((cell) => make(tag, {}, ...inline(cell))));
  const body = make("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return make("div", { className: "table" }, make("table", {}, make("thead", {}, row(lines[0], "th")), body));
}

function blockElement({ kind, lines, language }) {
  if (kind === "code") {
    const code = make("code", { textContent: lines.join("\n") });
    const press = button("Copy", "Copy code", () => copy(code.textContent, press));
    return make("div", { className: "code" }, make("div", { className: "bar" }, make("span", { textContent: language || "text" }), press), make("pre", {}, code));
  }
  if (kind === "rule") return make("hr");
  if (kind === "heading") {
    const [, marks, text] = /^(#+)\s+(.*?)\s*#*$/.exec(lines[0]) ?? [null, "#", lines[0]];
    return make(`h${Math.min(marks.length + 2, 6)}`, {}, ...inline(text));
  }
  if (kind === "quote") {
    const quote = make("blockquote");
    renderMarkdown(quote, lines.map((line) => line.replace(/^\s*> ?/, "")).join("\n").replace(/^[ \t>]+/, ""));
    return quote;
  }
  if (kind === "list") return listOf(lines);
  if (kind === "table") return tableOf(lines);
  const paragraph = make("p");
  lines.forEach((line, index) => paragraph.append(...(index ? [make("br")] : []), ...inline(line)));
  return paragraph;
}

const shownBlocks = new WeakMap();

/** Show a text in an element; blocks that have not changed since the last call stay as they are. */
function renderMarkdown(target, text) {
  const before = shownBlocks.get(target) ?? [];
  const blocks = blocksOf(text);
  const keys = blocks.map((block) => `${block.kind}\0${block.language ?? ""}\0${block.lines.join("\n")}`);
  let same = 0;
  while (same < keys.length && same < before.length && keys[same] === before[same]) same++;
  while (target.childNodes.length > same) target.lastChild.remove();
  target.append(...blocks.slice(same).map(blockElement));
  shownBlocks.set(target, keys);
}
