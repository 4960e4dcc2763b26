// The settings in the page's address, so that they can be linked to; only what differs from the defaults is written.

import { DEFAULTS, valid } from "./settings.js";

export function readAddress(hash) {
  return valid(Object.fromEntries(new URLSearchParams(hash.replace(/^#/, ""))));
}

export function writeAddress(settings) {
  const changed = Object.entries(settings).filter(([name, value]) => value !== DEFAULTS[name]);
  return changed.length ? `#${new URLSearchParams(changed)}` : "#";
}
