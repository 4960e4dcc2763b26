// The settings in the page's address, so that they can be linked to. Only settings that differ from the defaults are written.

import { DEFAULTS, valid } from "./settings.js";

export function readAddress(hash) {
  return valid(Object.fromEntries(new URLSearchParams(hash.replace(/^#/, ""))));
}

export function writeAddress(settings) {
  const changed = Object.entries(settings).filter(([name, value]) => value !== DEFAULTS[name]);
  return changed.length ? `#${new URLSearchParams(changed)}` : "#";
}
