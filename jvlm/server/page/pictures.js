// Pictures: read from files, shown with the regions of an answer, and drawn on.

const MOST_SIDE = 4096; // of a canvas; larger pictures are drawn on at a smaller scale

function readAsUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

function loadImage(url) {
  return new Promise((resolve, reject) => {
    const image = make("img", { src: url });
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("not a picture that this browser can read"));
  });
}

/** Return the media of a file; a picture is made smaller only where the settings say so. */
async function readMedia(file) {
  if (file.type.startsWith("video/")) return { kind: "video", name: file.name, url: await readAsUrl(file) };
  if (!file.type.startsWith("image/")) throw new Error("neither a picture nor a video");
  const url = await readAsUrl(file);
  const image = await loadImage(url);
  const most = Number($("shrink").value);
  const longest = Math.max(image.naturalWidth, image.naturalHeight);
  if (!most || longest <= most) return { kind: "image", name: file.name, url };
  const scale = most / longest;
  const canvas = make("canvas", { width: Math.round(image.naturalWidth * scale), height: Math.round(image.naturalHeight * scale) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return { kind: "image", name: file.name, url: canvas.toDataURL("image/png") };
}

/** Set a canvas to the pixels of a picture; returns its context, in those pixels. */
function prepared(canvas, [width, height]) {
  const scale = Math.min(1, MOST_SIDE / Math.max(width, height));
  const sides = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== sides[0] || canvas.height !== sides[1]) [canvas.width, canvas.height] = sides;
  const context = canvas.getContext("2d");
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.setTransform(scale, 0, 0, scale, 0, 0);
  return context;
}

/** Draw regions, whose values are pixels of the original; the chosen one stands out. */
function drawRegions(canvas, size, regions, chosen) {
  const context = prepared(canvas, size);
  const unit = Math.max(size[0], size[1]) / Math.max(canvas.clientWidth, canvas.clientHeight, 320);
  context.font = `600 ${13 * unit}px system-ui, sans-serif`;
  context.textBaseline = "top";
  regions.forEach(({ pixels, label }, index) => {
    const colour = COLOURS[index % COLOURS.length];
    context.strokeStyle = context.fillStyle = colour;
    context.globalAlpha = chosen >= 0 && chosen !== index ? 0.35 : 1;
    context.lineWidth = Math.max(2, (index === chosen ? 4 : 2.5) * unit);
    const [x, y] = pixels;
    if (pixels.length === 2) {
      context.beginPath();
      context.arc(x, y, 6 * unit, 0, 2 * Math.PI);
      context.fill();
      context.strokeStyle = "#fff";
      context.stroke();
    } else {
      context.strokeRect(x, y, pixels[2] - x, pixels[3] - y);
      if (index === chosen) {
        context.globalAlpha = 0.18;
        context.fillRect(x, y, pixels[2] - x, pixels[3] - y);
        context.globalAlpha = 1;
      }
    }
    if (!label) return;
    const width = context.measureText(label).width + 8 * unit;
    const height = 18 * unit;
    const left = Math.max(0, Math.min(pixels.length === 2 ? x + 9 * unit : x - context.lineWidth / 2, size[0] - width));
    const top = pixels.length === 2 ? y - height / 2 : y >= height ? y - height : y;
    context.fillRect(left, top, width, height);
    context.fillStyle = "#fff";
    context.fillText(label, left + 4 * unit, top + 2.5 * unit);
  });
  context.globalAlpha = 1;
}

/** The picture of an answer with its regions, and a list of them; each finds the other. */
class RegionFigure {
  constructor() {
    this.image = make("img", { alt: "Picture with the regions of the answer" });
    this.canvas = make("canvas", { className: "regions", "aria-hidden": "true" });
    this.list = make("ol", { className: "region-list", "aria-label": "Regions" });
    this.pick = make("select", { "aria-label": "Picture that the regions are on", onchange: () => this.onpick?.(this.pick.selectedIndex) });
    this.element = make("figure", { className: "found", hidden: true }, make("div", { className: "picture" }, this.image, this.canvas), make("figcaption", {}, this.pick, this.list));
    this.regions = [];
    this.chosen = -1;
    this.canvas.onmousemove = (event) => this.choose(this.at(event));
    this.canvas.onmouseleave = () => this.choose(-1);
    new ResizeObserver(() => this.draw()).observe(this.image);
  }

  /** Show regions on one of the pictures of a conversation. */
  show(regions, pictures, number, size) {
    this.element.hidden = !regions.length;
    if (!regions.length) return;
    if (this.image.src !== pictures[number].url) this.image.src = pictures[number].url;
    if (this.pick.length !== pictures.length) this.pick.replaceChildren(...pictures.map((one, index) => make("option", { textContent: `Picture ${index + 1}: ${one.name || "pasted"}` })));
    this.pick.selectedIndex = number;
    this.pick.hidden = pictures.length < 2;
    [this.regions, this.size] = [regions, size];
    const line = ({ label, pixels }, index) => {
      const mark = make("span", { className: "swatch" });
      mark.style.background = COLOURS[index % COLOURS.length];
      const text = `${label || (pixels.length === 2 ? "point" : "box")} (${pixels.map(Math.round).join(", ")})`;
      return make("li", { tabIndex: 0, onmouseenter: () => this.choose(index), onmouseleave: () => this.choose(-1), onfocus: () => this.choose(index), onblur: () => this.choose(-1) }, mark, text);
    };
    const kept = this.list.childElementCount;
    if (kept > regions.length || [...this.list.children].some((item, index) => item.textContent !== line(regions[index], index).textContent)) {
      this.list.replaceChildren(...regions.map(line));
    } else {
      this.list.append(...regions.slice(kept).map((region, index) => line(region, kept + index)));
    }
    this.draw();
  }

  draw() {
    if (this.size) drawRegions(this.canvas, this.size, this.regions, this.chosen);
  }

  choose(index) {
    if (index === this.chosen) return;
    this.chosen = index;
    [...this.list.children].forEach((item, number) => item.classList.toggle("chosen", number === index));
    this.draw();
  }

  /** Return the smallest region under the mouse. */
  at(event) {
    const frame = this.canvas.getBoundingClientRect();
    const [x, y] = [((event.clientX - frame.left) / frame.width) * this.size[0], ((event.clientY - frame.top) / frame.height) * this.size[1]];
    const reach = (12 * this.size[0]) / frame.width;
    const area = ({ pixels }) => {
      if (pixels.length === 2) return Math.hypot(x - pixels[0], y - pixels[1]) <= reach ? 0 : Infinity;
      return x >= pixels[0] && y >= pixels[1] && x <= pixels[2] && y <= pixels[3] ? (pixels[2] - pixels[0]) * (pixels[3] - pixels[1]) : Infinity;
    };
    const areas = this.regions.map(area);
    const least = Math.min(...areas);
    return least === Infinity ? -1 : areas.indexOf(least);
  }
}

/** Show a picture; a box that is dragged over it is written into the prompt, in the model's coordinates. */
async function openViewer(media) {
  const [image, canvas] = [$("viewer-image"), $("viewer-canvas")];
  image.src = media.url;
  image.alt = media.name;
  $("viewer").showModal();
  await image.decode();
  const size = [image.naturalWidth, image.naturalHeight];
  prepared(canvas, size);
  let from = null;
  const at = (event) => {
    const frame = canvas.getBoundingClientRect();
    const share = (value, start, length) => Math.min(1, Math.max(0, (value - start) / length));
    return [share(event.clientX, frame.left, frame.width) * size[0], share(event.clientY, frame.top, frame.height) * size[1]];
  };
  const box = (event) => {
    const to = at(event);
    return [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
  };
  canvas.onpointerdown = (event) => {
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    from = at(event);
  };
  canvas.onpointermove = (event) => from && drawRegions(canvas, size, [{ pixels: box(event), label: "" }], -1);
  canvas.onpointerup = async (event) => {
    if (!from) return;
    const pixels = box(event);
    from = null;
    if (pixels[2] - pixels[0] < 2 || pixels[3] - pixels[1] < 2) return;
    try {
      const told = await sizesOf(media);
      // the browser's pixels, where the picture is turned or the server's word differs
      const scaled = toOriginal(pixels, "original", told.original, told.processed).map((value, index) => (value * told.original[index % 2]) / size[index % 2]);
      insertText(boxText(scaled, $("space").value || told.space, told.original, told.processed));
      $("viewer").close();
      $("prompt").focus();
    } catch (error) {
      say(error.message);
      $("viewer").close();
    }
  };
}

/** Write a text where the prompt's cursor is. */
function insertText(text) {
  const prompt = $("prompt");
  const before = prompt.value.slice(0, prompt.selectionStart);
  const space = before && !/\s$/.test(before) ? " " : "";
  prompt.setRangeText(`${space}${text} `, prompt.selectionStart, prompt.selectionEnd, "end");
  prompt.dispatchEvent(new Event("input"));
}
