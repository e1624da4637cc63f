// The picture that is edited, and strokes over it: what they cover is white in the mask, drawn anew.

export class Brush {
  constructor(canvas, width) {
    this.canvas = canvas;
    this.width = width; // of a stroke: gives its share of the shorter side, in percent
    this.image = null;
    this.mask = document.createElement("canvas");
    this.spot = null; // of the keyboard's brush
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.last = this.place(event);
      this.stroke(this.last, this.last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.last) return;
      const next = this.place(event);
      this.stroke(this.last, next);
      this.last = next;
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (this.last = null));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => { this.spot = null; this.show(); });
  }

  async open(blob) {
    this.blob = blob;
    this.image = await createImageBitmap(blob);
    for (const own of [this.canvas, this.mask]) {
      own.width = this.image.width;
      own.height = this.image.height;
    }
    this.wipe();
  }

  wipe() {
    this.context.clearRect(0, 0, this.mask.width, this.mask.height);
    this.painted = false;
    this.show();
  }

  get context() {
    return this.mask.getContext("2d");
  }

  get radius() {
    return Math.max(0.5, (Math.min(this.mask.width, this.mask.height) * this.width()) / 200);
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.canvas.width;
    return { x, y: ((event.clientY - box.top) / box.height) * this.canvas.height };
  }

  stroke(from, to) {
    const { context } = this;
    context.strokeStyle = "white";
    context.lineCap = "round";
    context.lineWidth = 2 * this.radius;
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x + 0.01, to.y);
    context.stroke();
    this.painted = true;
    this.show();
  }

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const middle = { x: this.canvas.width / 2, y: this.canvas.height / 2 };
    const spot = this.spot ?? middle;
    if (event.key in moves) {
      const [x, y] = moves[event.key].map((way) => way * Math.max(1, this.radius / 2));
      const inside = (value, most) => Math.min(Math.max(value, 0), most);
      this.spot = { x: inside(spot.x + x, this.canvas.width), y: inside(spot.y + y, this.canvas.height) };
      this.show();
    } else if (event.key === " ") {
      this.spot = spot;
      this.stroke(spot, spot);
    } else return;
    event.preventDefault();
  }

  show() {
    if (!this.image) return;
    const context = this.canvas.getContext("2d");
    context.drawImage(this.image, 0, 0);
    context.globalAlpha = 0.55;
    context.drawImage(this.filled("source-in", "#ff3060"), 0, 0);
    context.globalAlpha = 1;
    if (!this.spot) return;
    context.strokeStyle = "#f0f";
    context.lineWidth = Math.max(0.5, this.canvas.width / 200);
    context.beginPath();
    context.arc(this.spot.x, this.spot.y, this.radius, 0, 2 * Math.PI);
    context.stroke();
  }

  // The strokes with a colour in them ("source-in") or behind them ("destination-over").
  filled(way, colour) {
    const made = document.createElement("canvas");
    made.width = this.mask.width;
    made.height = this.mask.height;
    const context = made.getContext("2d");
    context.drawImage(this.mask, 0, 0);
    context.globalCompositeOperation = way;
    context.fillStyle = colour;
    context.fillRect(0, 0, made.width, made.height);
    return made;
  }

  // What is sent: the file as it is, and the mask where there is a stroke.
  async edit() {
    const edit = { image: this.blob, mask: null };
    if (this.painted) {
      const whole = this.filled("destination-over", "black");
      edit.mask = await new Promise((done) => whole.toBlob(done, "image/png"));
    }
    return edit;
  }
}
