// What stays in this browser: conversations in IndexedDB, settings in localStorage, the key in sessionStorage.

const FIELDS = ["system", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "thinking", "space", "shrink", "stops", "schema", "theme"];

const asPromise = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

let database = null;

function opened() {
  if (!database) {
    const request = indexedDB.open("jvlm", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    database = asPromise(request);
  }
  return database;
}

async function inStore(mode, action) {
  const store = (await opened()).transaction("conversations", mode).objectStore("conversations");
  return asPromise(action(store));
}

const readConversations = () => inStore("readonly", (store) => store.getAll());
const keep = (conversation) => inStore("readwrite", (store) => store.put(conversation)).catch((error) => say(`Not kept: ${error.message}`));
const forget = (id) => inStore("readwrite", (store) => store.delete(id));

/** Return a conversation of an imported file, or null for what is none. Media can only be data, never addresses. */
function checkedConversation(value) {
  if (!value || typeof value.id !== "string" || !Array.isArray(value.messages)) return null;
  const size = (pair) => Array.isArray(pair) && pair.length === 2 && pair.every((side) => Number.isInteger(side) && side > 0);
  const messages = [];
  for (const item of value.messages) {
    if (typeof item?.id !== "string" || !["user", "assistant"].includes(item.role) || typeof item.text !== "string") return null;
    const media = (Array.isArray(item.media) ? item.media : []).filter((one) => /^data:(image|video)\/[\w.+-]+;base64,/.test(one?.url));
    messages.push({
      id: item.id,
      parent: typeof item.parent === "string" ? item.parent : null,
      role: item.role,
      text: item.text,
      reasoning: typeof item.reasoning === "string" ? item.reasoning : "",
      thought: Number(item.thought) || 0,
      note: typeof item.note === "string" ? item.note : "",
      error: typeof item.error === "string" ? item.error : "",
      space: typeof item.space === "string" ? item.space : "",
      sizes: Array.isArray(item.sizes) && item.sizes.every(size) ? item.sizes : [],
      processed: Array.isArray(item.processed) && item.processed.every(size) ? item.processed : [],
      media: media.map((one) => ({ kind: one.url.startsWith("data:video") ? "video" : "image", name: String(one.name ?? ""), url: one.url })),
    });
  }
  const ids = new Set(messages.map((message) => message.id));
  if (ids.size !== messages.length || messages.some((message, index) => message.parent !== null && !messages.slice(0, index).some((other) => other.id === message.parent))) return null;
  return { id: value.id, created: Number(value.created) || Date.now(), title: String(value.title ?? ""), messages, leaf: ids.has(value.leaf) ? value.leaf : (messages.at(-1)?.id ?? null) };
}

function saveFile(name, value) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function readSettings() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem("jvlm.settings") ?? "{}");
  } catch {
    localStorage.removeItem("jvlm.settings");
  }
  for (const name of FIELDS) $(name).value = typeof kept[name] === "string" ? kept[name] : "";
  $("key").value = sessionStorage.getItem("jvlm.key") ?? "";
}

function keepSettings() {
  localStorage.setItem("jvlm.settings", JSON.stringify(Object.fromEntries(FIELDS.map((name) => [name, $(name).value]))));
  if ($("key").value) sessionStorage.setItem("jvlm.key", $("key").value);
  else sessionStorage.removeItem("jvlm.key");
}
