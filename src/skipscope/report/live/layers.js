// The parts of a network: linear maps, activations with their slopes, layer norm, losses.
// Matrices are Float64Arrays, row after row; a batch has one row for each sample.

import { normal, uniform, uniformFloat32 } from "./random.js";

const GELU_SCALE = Math.sqrt(2 / Math.PI), GELU_CUBIC = 0.044715;

function gelu(x) {
  return 0.5 * x * (1 + Math.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x)));
}

function geluSlope(x) {
  const t = Math.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x);
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));

// Each activation and its slope.
export const ACTIVATIONS = {
  gelu: [gelu, geluSlope],
  relu: [(x) => (x > 0 ? x : x === x ? 0 : x), (x) => (x > 0 ? 1 : 0)],
  tanh: [Math.tanh, (x) => 1 - Math.tanh(x) ** 2],
  sigmoid: [sigmoid, (x) => sigmoid(x) * (1 - sigmoid(x))],
  linear: [(x) => x, () => 1],
};

// y = x W^T + b, for each of the rows of x.
export function linear(x, { weight, bias, inputs, outputs }, rows) {
  const y = timesTransposed(x, weight, rows, inputs, outputs);
  for (let r = 0, k = 0; r < rows; r++) for (let o = 0; o < outputs; o++, k++) y[k] += bias[o];
  return y;
}

// dL/dx = dL/dy W, for each of the rows.
export function linearBack(gradient, { weight, inputs, outputs }, rows) {
  const transposed = new Float64Array(weight.length);
  for (let o = 0; o < outputs; o++) for (let i = 0; i < inputs; i++) transposed[i * outputs + o] = weight[o * inputs + i];
  return timesTransposed(gradient, transposed, rows, outputs, inputs);
}

// a b^T of a [rows, inner] and b [columns, inner]. Two rows and four columns at a time, so that what is read is used often.
function timesTransposed(a, b, rows, inner, columns) {
  const product = new Float64Array(rows * columns);
  let r = 0;
  for (; r + 2 <= rows; r += 2) {
    const one = r * inner, two = one + inner;
    let c = 0;
    for (; c + 4 <= columns; c += 4) {
      let p = 0, q = 0, s = 0, t = 0, u = 0, v = 0, w = 0, x = 0;
      for (let i = 0, k = c * inner; i < inner; i++, k++) {
        const first = a[one + i], second = a[two + i];
        const b1 = b[k], b2 = b[k + inner], b3 = b[k + 2 * inner], b4 = b[k + 3 * inner];
        p += first * b1;
        q += first * b2;
        s += first * b3;
        t += first * b4;
        u += second * b1;
        v += second * b2;
        w += second * b3;
        x += second * b4;
      }
      const to = r * columns + c;
      product[to] = p;
      product[to + 1] = q;
      product[to + 2] = s;
      product[to + 3] = t;
      product[to + columns] = u;
      product[to + columns + 1] = v;
      product[to + columns + 2] = w;
      product[to + columns + 3] = x;
    }
    for (; c < columns; c++) {
      product[r * columns + c] = dot(a, one, b, c * inner, inner);
      product[(r + 1) * columns + c] = dot(a, two, b, c * inner, inner);
    }
  }
  for (; r < rows; r++) for (let c = 0; c < columns; c++) product[r * columns + c] = dot(a, r * inner, b, c * inner, inner);
  return product;
}

function dot(a, fromA, b, fromB, length) {
  let sum = 0;
  for (let i = 0; i < length; i++) sum += a[fromA + i] * b[fromB + i];
  return sum;
}

// dL/dW = (dL/dy)^T x and dL/db, summed over the samples.
export function weightGradient(gradient, x, { inputs, outputs }, rows) {
  const weight = new Float64Array(outputs * inputs), bias = new Float64Array(outputs);
  for (let r = 0; r < rows; r++) {
    for (let o = 0; o < outputs; o++) {
      const g = gradient[r * outputs + o];
      bias[o] += g;
      for (let i = 0, w = o * inputs, v = r * inputs; i < inputs; i++, w++, v++) weight[w] += g * x[v];
    }
  }
  return { weight, bias };
}

const NORM_EPSILON = 1e-5;

// Layer norm of each row: mean 0, variance 1, then times weight plus bias.
export function layerNorm(x, { weight, bias, inputs: size }, rows) {
  const normal = new Float64Array(rows * size), y = new Float64Array(rows * size), inverse = new Float64Array(rows);
  for (let r = 0; r < rows; r++) {
    const at = r * size;
    let mean = 0, variance = 0;
    for (let i = 0; i < size; i++) mean += x[at + i] / size;
    for (let i = 0; i < size; i++) variance += (x[at + i] - mean) ** 2 / size;
    inverse[r] = 1 / Math.sqrt(variance + NORM_EPSILON);
    for (let i = 0; i < size; i++) {
      normal[at + i] = (x[at + i] - mean) * inverse[r];
      y[at + i] = normal[at + i] * weight[i] + bias[i];
    }
  }
  return { y, normal, inverse };
}

// dL/dx of layer norm; row r belongs to sample r % samples.
export function layerNormBack(gradient, { weight, inputs: size }, { normal, inverse }, rows, samples) {
  const back = new Float64Array(rows * size);
  for (let r = 0; r < rows; r++) {
    const at = r * size, seen = (r % samples) * size;
    let mean = 0, projection = 0;
    for (let i = 0; i < size; i++) {
      const g = gradient[at + i] * weight[i];
      mean += g / size;
      projection += (g * normal[seen + i]) / size;
    }
    for (let i = 0; i < size; i++) {
      back[at + i] = (gradient[at + i] * weight[i] - mean - projection * normal[seen + i]) * inverse[r % samples];
    }
  }
  return back;
}

// dL/dweight and dL/dbias of layer norm.
export function layerNormGradient(gradient, { normal }, size, rows) {
  const weight = new Float64Array(size), bias = new Float64Array(size);
  for (let k = 0; k < rows * size; k++) {
    weight[k % size] += gradient[k] * normal[k];
    bias[k % size] += gradient[k];
  }
  return { weight, bias };
}

// Mean cross-entropy of classes, or mean squared error; the loss, and its gradient at the output.
export function lossOf(output, target, kind, rows) {
  const gradient = new Float64Array(output.length), size = output.length / rows;
  let loss = 0;
  if (kind === "squared") {
    for (let k = 0; k < output.length; k++) {
      const off = output[k] - target[k];
      loss += (off * off) / output.length;
      gradient[k] = (2 * off) / output.length;
    }
    return { loss, gradient };
  }
  for (let r = 0; r < rows; r++) {
    const at = r * size;
    let most = -Infinity, sum = 0;
    for (let i = 0; i < size; i++) most = Math.max(most, output[at + i]);
    for (let i = 0; i < size; i++) sum += Math.exp(output[at + i] - most);
    loss += (Math.log(sum) + most - output[at + target[r]]) / rows;
    for (let i = 0; i < size; i++) {
      gradient[at + i] = (Math.exp(output[at + i] - most) / sum - (i === target[r] ? 1 : 0)) / rows;
    }
  }
  return { loss, gradient };
}

// What nn.Linear draws: both within 1 / sqrt(inputs), in float32.
export function newLinear(generator, inputs, outputs) {
  const layer = { inputs, outputs, weight: new Float64Array(outputs * inputs), bias: new Float64Array(outputs) };
  // torch computes the bound of the weights as sqrt(3) * (sqrt(2 / (1 + 5)) / sqrt(inputs)).
  const bound = Math.sqrt(3) * (Math.sqrt(2 / (1 + Math.sqrt(5) ** 2)) / Math.sqrt(inputs));
  uniformFloat32(generator, layer.weight, -bound, bound);
  uniformFloat32(generator, layer.bias, -1 / Math.sqrt(inputs), 1 / Math.sqrt(inputs));
  return layer;
}

export function newLayerNorm(size) {
  return { inputs: size, outputs: size, weight: new Float64Array(size).fill(1), bias: new Float64Array(size) };
}

// Other initialisations, drawn in float64 over torch's default, with biases of zero.
export const INITIALISATIONS = {
  xavier(generator, layer) {
    const bound = Math.sqrt(3) * Math.sqrt(2 / (layer.inputs + layer.outputs));
    uniform(generator, layer.weight, -bound, bound);
  },
  he(generator, layer) {
    normal(generator, layer.weight, Math.sqrt(2) / Math.sqrt(layer.inputs));
  },
  orthogonal(generator, layer) {
    normal(generator, layer.weight);
    makeOrthogonal(layer.weight, layer.outputs, layer.inputs);
  },
};

// nn.init.orthogonal_: Q of the QR decomposition, its signs chosen so that R has a positive diagonal.
function makeOrthogonal(matrix, rows, columns) {
  const wide = rows < columns, vectors = Math.min(rows, columns), size = Math.max(rows, columns);
  const at = (v, i) => (wide ? v * columns + i : i * columns + v);
  const product = (u, v) => {
    let sum = 0;
    for (let i = 0; i < size; i++) sum += matrix[at(u, i)] * matrix[at(v, i)];
    return sum;
  };
  // Gram-Schmidt gives that Q directly; a second pass removes what rounding left.
  for (let v = 0; v < vectors; v++) {
    for (let pass = 0; pass < 2; pass++) {
      for (let u = 0; u < v; u++) {
        const projection = product(u, v);
        for (let i = 0; i < size; i++) matrix[at(v, i)] -= projection * matrix[at(u, i)];
      }
    }
    const length = Math.sqrt(product(v, v));
    for (let i = 0; i < size; i++) matrix[at(v, i)] /= length;
  }
}
