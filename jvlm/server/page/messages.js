// One message of a conversation on the screen.

const number = new Intl.NumberFormat("en");

/** Return thinking and answer of a text that begins with <think>, where the server has not told them apart. */
function apart(message) {
  const opened = /^\s*<think>/.exec(message.text);
  if (!opened || message.reasoning) return { reasoning: message.reasoning, text: message.text };
  const [thought, ...rest] = message.text.slice(opened[0].length).split("</think>");
  return { reasoning: thought.trim(), text: rest.join("</think>").trimStart() };
}

/** Shows a message, and again whenever it has changed. */
class MessageView {
  /** actions: {pictures, regenerate, edit, siblings, move} of the conversation. */
  constructor(message, actions) {
    [this.message, this.actions] = [message, actions];
    this.body = make("div", { className: "text" });
    this.foot = make("div", { className: "foot" });
    this.element = make("article", { className: message.role, "aria-label": message.role === "user" ? "You" : "Model" });
    if (message.role === "user") this.asQuestion();
    else this.asAnswer();
    this.update();
  }

  asQuestion() {
    this.body.textContent = this.message.text;
    const pictures = this.message.media.map((media) =>
      media.kind === "video"
        ? make("li", { className: "chip", textContent: `Video: ${media.name}` })
        : make("li", {}, make("button", { type: "button", className: "thumb", "aria-label": `Draw a box on ${media.name || "the picture"}`, onclick: () => openViewer(media) }, make("img", { src: media.url, alt: media.name }))),
    );
    if (pictures.length) this.element.append(make("ul", { className: "media" }, ...pictures));
    if (this.message.text) this.element.append(this.body);
    this.element.append(this.foot);
  }

  asAnswer() {
    this.thinking = make("div", { className: "thinking-text" });
    this.summary = make("summary");
    this.details = make("details", { className: "thinking", hidden: true }, this.summary, this.thinking);
    this.figure = new RegionFigure();
    this.figure.onpick = (index) => {
      this.message.picture = index;
      this.update();
    };
    this.problem = make("p", { className: "error", role: "alert", hidden: true });
    this.element.append(this.details, this.figure.element, this.body, this.problem, this.foot);
  }

  /** Show the message as it is now. */
  update() {
    const { message } = this;
    if (message.role === "assistant") {
      const { reasoning, text } = apart(message);
      this.details.hidden = !reasoning;
      if (reasoning) {
        if (this.thinking.textContent !== reasoning) this.thinking.textContent = reasoning;
        const seconds = message.thought >= 0.05 ? ` for ${message.thought.toFixed(1)} s` : "";
        this.summary.textContent = message.running && !text ? "Thinking…" : `Thought${seconds}`;
      }
      renderMarkdown(this.body, text);
      this.showRegions(text);
      this.problem.hidden = !message.error;
      this.problem.textContent = message.error;
      this.element.setAttribute("aria-busy", String(Boolean(message.running)));
    }
    this.showFoot();
  }

  showRegions(text) {
    const { message } = this;
    const pictures = this.actions.pictures(message);
    if (!message.sizes?.length || pictures.length !== message.sizes.length) return;
    const chosen = Math.min(message.picture ?? pictures.length - 1, pictures.length - 1);
    const [original, processed] = [message.sizes[chosen], message.processed[chosen]];
    const space = $("space").value || message.space || "resized";
    const regions = findRegions(text).map((region) => ({ ...region, pixels: toOriginal(region.values, space, original, processed) }));
    this.figure.show(regions, pictures, chosen, original);
  }

  showFoot() {
    const { message, actions } = this;
    if (message.running) {
      this.foot.replaceChildren(make("span", { className: "pulse", textContent: message.text || message.reasoning ? "" : "Reading…" }));
      return;
    }
    const { all, index } = actions.siblings(message);
    const parts = [];
    if (all.length > 1) {
      parts.push(button("‹", "Version before", () => actions.move(message, -1)), make("span", { textContent: `${index + 1} / ${all.length}` }), button("›", "Next version", () => actions.move(message, 1)));
    }
    if (message.role === "user") {
      parts.push(button("Edit", "Edit and send again", () => actions.edit(message)));
    } else {
      const press = button("Copy", "Copy answer", () => copy(apart(message).text, press));
      parts.push(press, button("Regenerate", "Regenerate", () => actions.regenerate(message)));
      if (message.note) parts.push(make("span", { className: "note", textContent: message.note }));
    }
    this.foot.replaceChildren(...parts);
  }
}

/** Return the line about an answer's tokens and time. */
function usageNote(usage, times, finish) {
  const parts = [];
  if (usage) {
    const seconds = (times.end - times.first) / 1000;
    parts.push(`${number.format(usage.completion_tokens)} tokens`);
    if (times.first && usage.completion_tokens > 1 && seconds > 0) parts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
    if (times.first) parts.push(`first after ${((times.first - times.begin) / 1000).toFixed(2)} s`);
    const seen = usage.prompt_tokens_details?.image_tokens;
    parts.push(`prompt ${number.format(usage.prompt_tokens)}${seen ? `, ${number.format(seen)} of them pictures` : ""}`);
  }
  if (finish === "length") parts.push("cut at the most tokens");
  if (finish === "abort") parts.push("stopped");
  return parts.join(" · ");
}
