// torch's random numbers on the CPU: the generator (mt19937) and the draws that initialise a network, bit for bit.
// Only logarithm, sine and cosine may differ from torch's in the last bit.

const LENGTH = 624, MIDDLE = 397;

export class Generator {
  // The state that torch.manual_seed(seed) sets.
  constructor(seed) {
    this.state = new Uint32Array(LENGTH);
    this.state[0] = seed >>> 0;
    for (let i = 1; i < LENGTH; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, before) + i;
    }
    this.at = LENGTH;
    this.spare = null; // the second of a pair of normal numbers
  }

  // 32 random bits.
  bits() {
    const s = this.state;
    if (this.at === LENGTH) {
      for (let i = 0; i < LENGTH; i++) {
        const next = s[(i + 1) % LENGTH];
        const mixed = (s[i] & 0x80000000) | (next & 0x7fffffff);
        s[i] = s[(i + MIDDLE) % LENGTH] ^ (mixed >>> 1) ^ (next & 1 ? 0x9908b0df : 0);
      }
      this.at = 0;
    }
    let y = s[this.at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  // A float64 in [0, 1) from 53 random bits.
  unit() {
    const high = this.bits(), low = this.bits();
    return ((high & 0x1fffff) * 4294967296 + low) / 9007199254740992;
  }
}

// tensor.uniform_(from, to) of a float32 tensor; the numbers are stored in float64.
export function uniformFloat32(generator, out, from, to) {
  const low = Math.fround(from), width = Math.fround(Math.fround(to) - low);
  // Rounded once, as by the fused multiply-add that torch is compiled to; in float64 both operations are exact here.
  for (let i = 0; i < out.length; i++) out[i] = Math.fround(((generator.bits() & 0xffffff) / 16777216) * width + low);
}

// tensor.uniform_(from, to) of a float64 tensor.
export function uniform(generator, out, from, to) {
  for (let i = 0; i < out.length; i++) out[i] = multiplyAdd(generator.unit(), to - from, from);
}

// a * b + c rounded once: the errors of the product and of the sum are found exactly (Dekker, Knuth) and added last.
function multiplyAdd(a, b, c) {
  const split = (v) => {
    const high = 134217729 * v - (134217729 * v - v);
    return [high, v - high];
  };
  const [aHigh, aLow] = split(a), [bHigh, bLow] = split(b), product = a * b, sum = product + c;
  const productError = aLow * bLow - (product - aHigh * bHigh - aLow * bHigh - aHigh * bLow);
  const back = sum - product, sumError = product - (sum - back) + (c - back);
  return sum + (productError + sumError);
}

// tensor.normal_(0, std) of a float64 tensor: sixteen numbers at a time, or pair by pair where there are fewer.
export function normal(generator, out, std = 1) {
  if (out.length < 16) {
    for (let i = 0; i < out.length; i++) out[i] = oneNormal(generator) * std;
    return;
  }
  for (let i = 0; i < out.length; i++) out[i] = generator.unit();
  for (let i = 0; i + 16 <= out.length; i += 16) sixteenNormal(out, i, std);
  if (out.length % 16) {
    const last = out.length - 16;
    for (let i = last; i < out.length; i++) out[i] = generator.unit();
    sixteenNormal(out, last, std);
  }
}

function sixteenNormal(out, start, std) {
  for (let i = start; i < start + 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - out[i])), angle = 2 * Math.PI * out[i + 8];
    out[i] = radius * Math.cos(angle) * std;
    out[i + 8] = radius * Math.sin(angle) * std;
  }
}

function oneNormal(generator) {
  if (generator.spare !== null) {
    const spare = generator.spare;
    generator.spare = null;
    return spare;
  }
  const angle = 2 * Math.PI * generator.unit(), radius = Math.sqrt(-2 * Math.log1p(-generator.unit()));
  generator.spare = radius * Math.sin(angle);
  return radius * Math.cos(angle);
}

// torch.randperm(count): a random order.
export function permutation(generator, count) {
  const order = Int32Array.from({ length: count }, (_, i) => i);
  for (let i = 0; i < count - 1; i++) {
    const other = i + (generator.bits() % (count - i));
    [order[i], order[other]] = [order[other], order[i]];
  }
  return order;
}
