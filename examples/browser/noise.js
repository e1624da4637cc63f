// The noise that a seed means: the same numbers as those of the runtime's coherent noise, so that a
// seed draws one picture at every size, here as there. What the formulas are is explained in
// runtime/sampling/noise.py. Letters: C channels, H × W cells.

const DEPTH = 10;
const HEAP_BITS = 16;

/** Standard normal noise [C, H, W] of a seed, as a Float32Array. */
export function noise(seed, channels, height, width) {
  const key = wordsOf(seed, 0);
  const unit = Math.min(height, width);
  const rows = haarAxis(height, unit);
  const columns = haarAxis(width, unit);
  const out = new Float32Array(channels * height * width);
  for (let group = 0; group < channels; group += 4) {
    const normals = rows.names.map((row) =>
      columns.names.map((column) => normal(philox([column, row, group / 4, 0], key))),
    );
    for (let channel = group; channel < Math.min(group + 4, channels); channel++) {
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++) {
          let sum = 0;
          for (const [i, down] of rows.cells[y]) {
            for (const [j, across] of columns.cells[x]) {
              sum += down * across * normals[i][j][channel - group];
            }
          }
          out[(channel * height + y) * width + x] = sum;
        }
      }
    }
  }
  return out;
}

/** Cells of an axis in Haar functions: their names, and per cell pairs of a place and a weight. */
function haarAxis(count, unit) {
  const depth = Math.min(Math.max(DEPTH, bitLength(unit - 1) + 2), HEAP_BITS - 1);
  const edges = [];
  for (let i = 0; i <= count; i++) edges.push(upTo(2 * i + unit - count, unit, depth));
  const first = Math.floor((unit - count) / (2 * unit));
  const last = Math.floor((unit + count) / (2 * unit));
  for (const edge of edges) {
    for (let own = first; own <= last; own++) {
      edge.functions.set(named(own, 0), Math.min(Math.max(edge.place - own, 0), 1));
    }
  }
  const places = new Map();
  const cells = [];
  for (let i = 0; i < count; i++) {
    const cell = [];
    for (const name of new Set([...edges[i].functions.keys(), ...edges[i + 1].functions.keys()])) {
      const upper = edges[i + 1].functions.get(name) ?? 0;
      const weight = (upper - (edges[i].functions.get(name) ?? 0)) * Math.sqrt(unit);
      if (weight === 0) continue;
      if (!places.has(name)) places.set(name, places.size);
      cell.push([places.get(name), weight]);
    }
    cells.push(cell);
  }
  return { names: [...places.keys()], cells };
}

/** The integrals of the Haar functions up to an edge at `edge` / (2 · unit). */
function upTo(edge, unit, depth) {
  const whole = Math.floor(edge / (2 * unit));
  const rest = edge - whole * 2 * unit;
  const functions = new Map();
  for (let level = 0; level <= depth; level++) {
    const scaled = rest * 2 ** level;
    const place = Math.floor(scaled / (2 * unit));
    const inside = scaled - place * 2 * unit;
    if (inside === 0) continue;
    const f = inside / (2 * unit);
    const tip = level === depth ? Math.sqrt(f * (1 - f)) : Math.min(f, 1 - f);
    functions.set(named(whole, 2 ** level + place), tip * 2 ** (-level / 2));
  }
  return { place: whole + rest / (2 * unit), functions };
}

const named = (unit, heap) => ((unit << HEAP_BITS) + heap) >>> 0;
const bitLength = (number) => (number ? 32 - Math.clz32(number) : 0);

/** The low and high 32 bits of a product of two words. */
function product(a, b) {
  const [a1, a0, b1, b0] = [a >>> 16, a & 0xffff, b >>> 16, b & 0xffff];
  const middle = a1 * b0 + ((a0 * b0) >>> 16);
  const carried = a0 * b1 + (middle & 0xffff);
  const high = a1 * b1 + Math.floor(middle / 0x10000) + Math.floor(carried / 0x10000);
  return [Math.imul(a, b) >>> 0, high >>> 0];
}

/** Philox4x32-10. Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3". */
function philox([a, b, c, d], [first, second]) {
  for (let turn = 0; turn < 10; turn++) {
    const keyA = (first + Math.imul(turn, 0x9e3779b9)) >>> 0;
    const keyB = (second + Math.imul(turn, 0xbb67ae85)) >>> 0;
    const [lowA, highA] = product(0xd2511f53, a);
    const [lowC, highC] = product(0xcd9e8d57, c);
    [a, b, c, d] = [(highC ^ b ^ keyA) >>> 0, lowC, (highA ^ d ^ keyB) >>> 0, lowA];
  }
  return [a, b, c, d];
}

/** Four words as four normal numbers. Source: Box and Muller, 1958. */
function normal(words) {
  const [a, b, c, d] = words.map((word) => (word + 0.5) * 2 ** -32);
  const pair = (u, v) => {
    const radius = Math.sqrt(-2 * Math.log(u));
    return [radius * Math.cos(2 * Math.PI * v), radius * Math.sin(2 * Math.PI * v)];
  };
  return [...pair(a, b), ...pair(c, d)];
}

/** Two words of a seed (a BigInt) and an image's index, as numpy's SeedSequence makes them. */
function wordsOf(seed, index) {
  const entropy = [Number(seed & 0xffffffffn), Number(seed >> 32n), 0, 0, index];
  let constant = 0x43b0d7e5;
  const hashed = (value) => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    value = Math.imul(value, constant);
    return value ^ (value >>> 16);
  };
  const mixed = (x, y) => {
    const value = Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y);
    return value ^ (value >>> 16);
  };
  const pool = entropy.slice(0, 4).map(hashed);
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) {
      if (from !== to) pool[to] = mixed(pool[to], hashed(pool[from]));
    }
  }
  for (let to = 0; to < 4; to++) pool[to] = mixed(pool[to], hashed(entropy[4]));
  constant = 0x8b51f9dd;
  return pool.slice(0, 2).map((word) => {
    word ^= constant;
    constant = Math.imul(constant, 0x58f38ded);
    word = Math.imul(word, constant);
    return (word ^ (word >>> 16)) >>> 0;
  });
}
