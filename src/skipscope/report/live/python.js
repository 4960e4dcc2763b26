// The same experiment as a few lines of skipscope.

import { blocksOf, factors, learningRate, shape } from "./settings.js";

const MODULES = { gelu: 'nn.GELU(approximate="tanh")', relu: "nn.ReLU()", tanh: "nn.Tanh()", sigmoid: "nn.Sigmoid()", linear: "nn.Identity()" };
const INITS = {
  xavier: "nn.init.xavier_uniform_(layer.weight)",
  he: 'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")',
  orthogonal: "nn.init.orthogonal_(layer.weight)",
};
const OPTIMIZERS = {
  sgd: (rate) => `torch.optim.SGD(model.parameters(), lr=${rate})`,
  momentum: (rate) => `torch.optim.SGD(model.parameters(), lr=${rate}, momentum=0.9)`,
  adam: (rate) => `torch.optim.Adam(model.parameters(), lr=${rate})`,
};

// Python that prints the flow, the spectrum and twenty losses of the network shown, and keeps them under those names.
export function asPython(settings, steps = 20) {
  const { outputs, activeOutput } = shape(settings), squared = settings.data === "lecture";
  const { strength, scale } = factors(settings, settings.shortcut !== "none");
  const scaleText = scale === 1 ? "1.0" : `${settings.depth} ** -0.5`;
  return `${[
    "import torch",
    "from torch import nn",
    "import skipscope as ss",
    "",
    "",
    ...networkLines(settings, outputs, activeOutput),
    "",
    "",
    ...dataLines(settings),
    `torch.manual_seed(${settings.seed})`,
    `model = Network(strength=${text(strength)}, scale=${scaleText}).double()  # drawn as torch draws, computed in float64`,
    ...initLines(settings, activeOutput),
    "",
    `batch = inputs[:${settings.batch}], target[:${settings.batch}]`,
    `loss = nn.functional.${squared ? "mse_loss" : "cross_entropy"}`,
    "flow = ss.gradient_flow(model, batch, loss)",
    "paths = ss.path_spectrum(model, batch, loss)",
    "print(flow)",
    "print(paths)",
    "",
    ...trainingLines(settings, steps),
  ].join("\n")}\n`;
}

const text = (value) => (Number.isInteger(value) ? value.toFixed(1) : String(value));

function networkLines(settings, outputs, activeOutput) {
  const act = MODULES[settings.activation], { inputs } = shape(settings), width = settings.width;
  const blocks = blocksOf(settings), plain = blocks.filter((b) => !b.shortcut), around = blocks.filter((b) => b.shortcut);
  const lines = ["class Network(nn.Module):", "    def __init__(self, strength, scale):", "        super().__init__()", "        self.blocks = nn.ModuleList()"];
  if (plain.length) lines.push(`        self.blocks.append(nn.Sequential(nn.Linear(${inputs}, ${width}), ${act}))`);
  const layer = `nn.Linear(${width}, ${width}), ${act}`, norm = settings.norm === "layer" ? `nn.LayerNorm(${width}), ` : "";
  if (around.length && settings.span === 1) {
    lines.push(`        for _ in range(${around.length}):`, `            self.blocks.append(nn.Sequential(${norm}${layer}))`);
  } else if (around.length) {
    const whole = around.filter((b) => b.layers === settings.span).length, rest = around.filter((b) => b.layers !== settings.span);
    lines.push(`        for layers in [${settings.span}] * ${whole}${rest.length ? ` + [${rest[0].layers}]` : ""}:`);
    lines.push(`            branch = [module for _ in range(layers) for module in (${layer})]`);
    lines.push(`            self.blocks.append(nn.Sequential(${norm}*branch))`);
  }
  const last = blocks.length ? width : inputs;
  const head = `nn.Linear(${last}, ${outputs})`;
  lines.push(`        self.head = ${activeOutput ? `nn.Sequential(${head}, ${act})` : head}`);
  lines.push(
    "        self.strength, self.scale = strength, scale",
    "",
    "    def forward(self, x):",
    "        for block in self.blocks:",
    "            y = block(x)",
    "            x = self.strength * x + self.scale * y if x.shape == y.shape else y",
    "        return self.head(x)",
  );
  return lines;
}

function dataLines(settings) {
  if (settings.data === "lecture") return ["inputs, target = torch.tensor([[1.0, 0.0, -1.0]]).double(), torch.zeros(1, 1).double()"];
  if (settings.data === "digits") {
    return [
      'inputs, target = ss.reference.digits(split="train")',
      `order = torch.randperm(len(target), generator=torch.Generator().manual_seed(${settings.seed}))`,
      "inputs, target = inputs.double()[order], target[order]",
    ];
  }
  return [
    `unit = torch.rand(3, 768, generator=torch.Generator().manual_seed(${settings.seed}), dtype=torch.float64)`,
    "target = torch.arange(768) % 2",
    "angle = 3 * torch.pi * unit[0].sqrt() + torch.pi * target.double()",
    "inputs = torch.stack([unit[0].sqrt() * angle.cos(), unit[0].sqrt() * angle.sin()], 1) + 0.1 * (unit[1:] - 0.5).T",
    "inputs, target = inputs[:512], target[:512]  # the others test",
  ];
}

function initLines(settings, activeOutput) {
  const lines = [];
  if (settings.init !== "default") lines.push(`        ${INITS[settings.init]}`, "        nn.init.zeros_(layer.bias)");
  if (settings.gain !== 1) lines.push(`        layer.weight.mul_(${settings.gain})`);
  if (!lines.length) return [];
  const where = activeOutput ? "model.modules()" : "model.blocks.modules()";
  return ["with torch.no_grad():", `    for layer in (m for m in ${where} if isinstance(m, nn.Linear)):`, ...lines];
}

function trainingLines(settings, steps) {
  const rows = settings.data === "lecture" ? null : `(torch.arange(${settings.batch}) + step * ${settings.batch}) % len(target)`;
  return [
    "losses = []",
    `optimizer = ${OPTIMIZERS[settings.optimizer](learningRate(settings))}`,
    `for step in range(${steps}):`,
    ...(rows ? [`    rows = ${rows}`, "    value = loss(model(inputs[rows]), target[rows])"] : ["    value = loss(model(inputs), target)"]),
    "    optimizer.zero_grad()",
    "    value.backward()",
    "    optimizer.step()",
    "    losses.append(value.item())",
    "print(*losses)",
  ];
}
