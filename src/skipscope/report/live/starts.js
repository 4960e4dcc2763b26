// Six starting points that tell the lecture in order.

export const STARTS = [
  {
    name: "A product of small quantities",
    words: "On its way back the gradient is multiplied once by every layer. Thirty factors below one leave next to nothing for the first.",
    tryThis: "drag depth from 30 to 2 and back",
    settings: {},
  },
  {
    name: "Add the shortcuts",
    words: "A shortcut adds what comes into a layer to what comes out. The gradient gets a second path, on which nothing is multiplied.",
    tryThis: "drag strength from 0 to 1",
    settings: { shortcut: "identity" },
  },
  {
    name: "Too much of a good thing",
    words: "Now each of sixty layers adds its branch to what it was given. A factor a little above one, sixty times over, and the gradient explodes.",
    tryThis: "drag gain up, or depth down",
    settings: { shortcut: "identity", depth: 60 },
  },
  {
    name: "Scaled: just right",
    words: "The same sixty layers, with each branch divided by the square root of their number. The sum stays of a size, at any depth.",
    tryThis: "train both, then choose “identity” and train again",
    settings: { shortcut: "scaled", depth: 60 },
  },
  {
    name: "Good initialisation does it too",
    words: "Orthogonal weights keep the length of a gradient, and tanh is nearly straight around zero. No shortcut is needed, while the weights stay so.",
    tryThis: "drag gain a little below and above 1",
    settings: { activation: "tanh", init: "orthogonal" },
  },
  {
    name: "The lecture’s five layers",
    words: "Five layers of three units, one input, seed 123: torch’s own generator and its default initialisation, redone here. Below are the ten numbers that the lecture prints.",
    tryThis: "change the seed, and see how much was chance",
    settings: { data: "lecture", depth: 5, width: 3, shortcut: "identity", batch: 1 },
  },
];
