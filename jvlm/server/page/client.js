// Requests to the server, relative to where the page is, so that it works under any prefix.

const BASE = location.pathname.replace(/\/?$/, "/");

class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body, signal) {
  const headers = { accept: "application/json" };
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  if (body) headers["content-type"] = "application/json";
  const answer = await fetch(BASE + path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, credentials: "same-origin" });
  if (answer.ok) return answer;
  let message = `The server answered with status ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    if (signal?.aborted) throw new DOMException("stopped", "AbortError");
  }
  throw new ServerError(message, answer.status);
}

/** Yield the events of a stream. Characters and events may be cut anywhere between pieces. */
async function* events(answer) {
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    text += done ? decoder.decode() : decoder.decode(value, { stream: true });
    for (let end; (end = text.search(/\r?\n\r?\n/)) >= 0; ) {
      const event = text.slice(0, end);
      text = text.slice(end).replace(/^\r?\n\r?\n/, "");
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
    if (done) throw new ServerError("The connection ended before the answer did.", 0);
  }
}

/** Yield the chunks of an answer. */
async function* chatChunks(body, signal) {
  const answer = await ask("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  for await (const chunk of events(answer)) {
    if (chunk.error) throw new ServerError(chunk.error.message, 0);
    yield chunk;
  }
}

/** Return the part of a message for a picture or video. */
function mediaPart({ kind, url }) {
  return kind === "video" ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } };
}

/** Return what the model sees of a picture: {original, processed, space}. */
async function sizesOf(media) {
  const messages = [{ role: "user", content: [mediaPart(media), { type: "text", text: "?" }] }];
  const found = await (await ask("tokenize", { model: $("model").value || undefined, messages })).json();
  return { original: found.images_size[0], processed: found.jvlm_processed_size[0], space: found.jvlm_box_space };
}
