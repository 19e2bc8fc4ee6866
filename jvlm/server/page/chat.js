// The conversation: what is sent, what comes back, and which version of it is shown.

let conversations = [];
let conversation = null;
let attached = [];
let running = null; // AbortController of the answer that is coming
let views = new Map();
let edited = null; // the last message that was shown before one is edited

const byId = (id) => conversation.messages.find((message) => message.id === id);

/** Return the messages from the first to the one shown last. */
function path(leaf = conversation.leaf) {
  const found = [];
  for (let message = byId(leaf); message; message = byId(message.parent)) found.unshift(message);
  return found;
}

const actions = {
  pictures: (message) => path(message.id).flatMap((one) => one.media ?? []).filter((media) => media.kind === "image"),
  siblings(message) {
    const all = conversation.messages.filter((other) => other.parent === message.parent && other.role === message.role);
    return { all, index: all.indexOf(message) };
  },
  move(message, by) {
    const { all, index } = actions.siblings(message);
    let next = all[(index + by + all.length) % all.length];
    for (let child; (child = conversation.messages.findLast((other) => other.parent === next.id)); ) next = child;
    if (running) return;
    conversation.leaf = next.id;
    keep(conversation);
    showMessages();
  },
  regenerate(message) {
    if (!running) answer(message.parent);
  },
  edit(message) {
    if (running) return;
    cancelEdit();
    setEdited(conversation.leaf);
    conversation.leaf = message.parent;
    attached = [...message.media];
    $("prompt").value = message.text;
    showMessages();
    showAttached();
    grow();
    $("prompt").focus();
  },
};

function setEdited(leaf) {
  edited = leaf;
  $("cancel-edit").hidden = leaf === null;
}

/** Go back to what was shown before a message was edited. */
function cancelEdit() {
  if (edited === null) return;
  conversation.leaf = edited;
  setEdited(null);
  clearPrompt();
  showMessages();
}

function clearPrompt() {
  attached = [];
  $("prompt").value = "";
  grow();
  showAttached();
}

function showMessages() {
  const shown = path();
  views = new Map(shown.map((message) => [message.id, views.get(message.id)?.message === message ? views.get(message.id) : new MessageView(message, actions)]));
  for (const view of views.values()) view.update();
  $("messages").replaceChildren(...[...views.values()].map((view) => view.element));
  $("empty").hidden = shown.length > 0;
  toEnd(true);
}

let follows = true; // whether the end of the conversation stays in sight

function toEnd(always) {
  const thread = $("thread");
  follows ||= always;
  if (follows) thread.scrollTop = thread.scrollHeight;
}

function showConversations() {
  const sorted = [...conversations].sort((a, b) => b.created - a.created);
  const item = (one) => {
    const open = make("button", { type: "button", className: "open", textContent: one.title || "Untitled", onclick: () => openConversation(one) });
    if (one === conversation) open.setAttribute("aria-current", "true");
    return make("li", {}, open, button("✕", `Delete ${one.title || "Untitled"}`, () => removeConversation(one)));
  };
  $("conversations").replaceChildren(...sorted.filter((one) => one.messages.length).map(item));
}

function openConversation(one) {
  if (running) running.abort();
  cancelEdit();
  conversation = one;
  views = new Map();
  attached = [];
  showAttached();
  showMessages();
  showConversations();
  showSidebar(false);
}

function newConversation() {
  const empty = conversations.find((one) => !one.messages.length) ?? { id: newId(), created: Date.now(), title: "", messages: [], leaf: null };
  empty.created = Date.now();
  if (!conversations.includes(empty)) conversations.push(empty);
  openConversation(empty);
  $("prompt").focus();
}

async function removeConversation(one) {
  if (one === conversation && running) running.abort();
  conversations = conversations.filter((other) => other !== one);
  await forget(one.id);
  if (one === conversation) newConversation();
  else showConversations();
}

/** Return the fields of a request that the settings fill. */
function requestFields() {
  const body = {};
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  const stops = $("stops").value.split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  if ($("thinking").value) body.chat_template_kwargs = { enable_thinking: $("thinking").value === "on" };
  if ($("schema").value.trim()) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse($("schema").value), strict: true } };
  if ($("model").value) body.model = $("model").value;
  return body;
}

/** Return the messages of a request: those up to one of the conversation. */
function requestMessages(leaf) {
  const said = path(leaf).filter((message) => message.role === "user" || apart(message).text);
  const messages = said.map((message) =>
    message.role === "user"
      ? { role: "user", content: [...message.media.map(mediaPart), ...(message.text ? [{ type: "text", text: message.text }] : [])] }
      : { role: "assistant", content: apart(message).text },
  );
  return $("system").value.trim() ? [{ role: "system", content: $("system").value }, ...messages] : messages;
}

function send() {
  const text = $("prompt").value.trim();
  if (running || (!text && !attached.length)) return;
  const message = { id: newId(), parent: conversation.leaf, role: "user", text, media: attached };
  conversation.messages.push(message);
  if (!conversation.title) conversation.title = (text || attached[0].name || "Picture").slice(0, 60);
  conversation.leaf = message.id;
  setEdited(null);
  clearPrompt();
  showConversations();
  answer(message.id);
}

/** Ask for an answer to a message, and show it while it comes. */
async function answer(parent) {
  const asked = conversation;
  const message = { id: newId(), parent, role: "assistant", text: "", reasoning: "", thought: 0, media: [], sizes: [], processed: [], space: "", note: "", error: "", running: true };
  asked.messages.push(message);
  asked.leaf = message.id;
  running = new AbortController();
  const { signal } = running;
  setRunning(true);
  keep(asked);
  showMessages();
  say("Answering");
  const view = views.get(message.id);
  const times = { begin: performance.now(), first: 0, end: 0 };
  let [usage, finish, waiting] = [null, "", false];
  const refresh = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (!message.running) return;
      view.update();
      toEnd(false);
    });
  };
  try {
    for await (const chunk of chatChunks({ ...requestFields(), messages: requestMessages(parent) }, signal)) {
      times.end = performance.now();
      if (chunk.usage) usage = chunk.usage;
      if (chunk.images_size) [message.sizes, message.processed, message.space] = [chunk.images_size, chunk.jvlm_processed_size, chunk.jvlm_box_space];
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const { content, reasoning } = choice.delta;
      if (content || reasoning) times.first ||= performance.now();
      if (reasoning) message.reasoning += reasoning;
      if (content) message.text += content;
      const thinks = apart(message);
      if (thinks.reasoning && !thinks.text) message.thought = (performance.now() - times.first) / 1000;
      finish = choice.finish_reason ?? finish;
      refresh();
    }
    say("Answered");
  } catch (error) {
    if (error.name === "AbortError") {
      finish = "abort";
      say("Stopped");
    } else {
      message.error = error instanceof SyntaxError ? `The JSON schema in the settings is no JSON: ${error.message}` : error.message;
      say("");
      if (error.status === 401) {
        $("settings").showModal();
        $("key").focus();
      }
    }
  }
  delete message.running;
  message.note = usageNote(usage, times, finish);
  running = null;
  setRunning(false);
  if (conversations.includes(asked)) keep(asked);
  if (asked === conversation) {
    view.update();
    toEnd(false);
  }
}

function setRunning(is) {
  $("send").hidden = is;
  $("halt").hidden = !is;
  $("new").disabled = $("clear").disabled = is;
}

function showAttached() {
  const item = (media, index) =>
    make(
      "li",
      {},
      media.kind === "video" ? make("span", { className: "chip", textContent: media.name }) : make("button", { type: "button", className: "thumb", "aria-label": `Draw a box on ${media.name || "the picture"}`, onclick: () => openViewer(media) }, make("img", { src: media.url, alt: media.name })),
      make("button", { type: "button", className: "remove", textContent: "✕", "aria-label": `Remove ${media.name || "picture"}`, onclick: () => (attached.splice(index, 1), showAttached()) }),
    );
  $("attachments").replaceChildren(...attached.map(item));
}

async function attach(files) {
  for (const file of files) {
    try {
      attached.push(await readMedia(file));
      say("");
    } catch (error) {
      say(`${file.name}: ${error.message}`);
    }
  }
  showAttached();
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, innerHeight / 3)}px`;
}

function showSidebar(is) {
  document.body.classList.toggle("with-sidebar", is);
  $("menu").setAttribute("aria-expanded", String(is));
}

async function showModels() {
  try {
    const { data } = await (await ask("v1/models")).json();
    const before = $("model").value;
    $("model").replaceChildren(...data.map(({ id, parent }) => make("option", { value: id, textContent: parent ? `${id} (adapter)` : id })));
    if (data.some(({ id }) => id === before)) $("model").value = before;
    say("");
  } catch (error) {
    say(error.status === 401 ? "The server wants a key: Settings, API key." : error.message);
  }
}

async function importFile(file) {
  const value = JSON.parse(await file.text());
  const given = Array.isArray(value?.conversations) ? value.conversations : [];
  const good = given.map(checkedConversation).filter(Boolean);
  for (const one of good) {
    conversations = [...conversations.filter((other) => other.id !== one.id), one];
    await keep(one);
  }
  const left = given.length - good.length;
  say(`Imported ${good.length} conversations${left ? `; ${left} were not in the form of an export` : ""}.`);
  if (good.length) openConversation(good[0]);
}

function checkSchema() {
  let problem = "";
  try {
    if ($("schema").value.trim()) JSON.parse($("schema").value);
  } catch (error) {
    problem = `No JSON: ${error.message}`;
  }
  $("schema-error").textContent = problem;
}

function listen() {
  $("composer").onsubmit = (event) => (event.preventDefault(), send());
  $("prompt").oninput = grow;
  $("prompt").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  };
  $("prompt").onpaste = (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    attach(files);
  };
  $("attach").onclick = () => $("files").click();
  $("files").onchange = () => {
    attach([...$("files").files]);
    $("files").value = "";
  };
  const main = $("main");
  const shade = (is) => main.classList.toggle("dropping", is);
  main.ondragover = (event) => (event.preventDefault(), shade(true));
  main.ondragleave = (event) => main.contains(event.relatedTarget) || shade(false);
  main.ondrop = (event) => {
    event.preventDefault();
    shade(false);
    attach([...event.dataTransfer.files]);
  };
  const thread = $("thread");
  let height = 0;
  thread.onscroll = () => {
    // growth is no wish of the reader's
    if (thread.scrollHeight === height) follows = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
    height = thread.scrollHeight;
  };
  new ResizeObserver(() => toEnd(false)).observe($("messages"));
  $("halt").onclick = () => running?.abort();
  $("cancel-edit").onclick = cancelEdit;
  $("new").onclick = newConversation;
  $("clear").onclick = () => removeConversation(conversation);
  $("menu").onclick = () => showSidebar(!document.body.classList.contains("with-sidebar"));
  $("export").onclick = () => saveFile("jvlm-conversations.json", { format: "jvlm-conversations", version: 1, conversations: conversations.filter((one) => one.messages.length) });
  $("import").onclick = () => $("import-file").click();
  $("import-file").onchange = () => {
    const [file] = $("import-file").files;
    $("import-file").value = "";
    if (file) importFile(file).catch((error) => say(`${file.name}: ${error.message}`));
  };
  $("open-settings").onclick = () => $("settings").showModal();
  $("settings").oninput = () => {
    keepSettings();
    checkSchema();
    document.documentElement.dataset.theme = $("theme").value;
  };
  $("settings").onclose = () => {
    keepSettings();
    showModels();
    for (const view of views.values()) view.update();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
  });
}

async function begin() {
  readSettings();
  document.documentElement.dataset.theme = $("theme").value;
  listen();
  try {
    conversations = await readConversations();
    for (const one of conversations) for (const message of one.messages) delete message.running;
  } catch (error) {
    say(`This browser keeps nothing: ${error.message}`);
  }
  newConversation();
  await showModels();
}

begin();
