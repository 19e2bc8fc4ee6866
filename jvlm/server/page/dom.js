// Elements of the page. Text is always set as text.

const $ = (id) => document.getElementById(id);

/** Return a new element; properties that start with "on" are listeners, those with a dash are attributes. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const button = (text, label, onclick) => make("button", { type: "button", textContent: text, "aria-label": label, title: label, onclick });

function say(text) {
  $("status").textContent = text;
}

/** Return a name that no other conversation or message has. */
function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Copy a text; where the page is not served safely, through a selection. */
async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = pressed.textContent;
  pressed.textContent = "Copied";
  setTimeout(() => (pressed.textContent = before), 1200);
}
