// The page: opens a device, and runs the four sections on it one after another.

import { open } from "./pkg/index.js";
import { benchmark } from "./bench.js";
import { file } from "./file.js";
import { isDark } from "./heat.js";
import { photographs } from "./photographs.js";
import { speech } from "./speech.js";

export const $ = (id) => document.getElementById(id);

/** What a script that looks at the page can wait for. */
const state = { ready: false, device: undefined, sections: {} };
globalThis.page = state;

let device;
let sections = [];

async function start() {
  const prefer = $("prefer").value;
  state.ready = false;
  device?.free();
  $("lost").hidden = true;
  const began = performance.now();
  const options = prefer === "cpu" ? { prefer } : { prefer: "gpu", powerPreference: prefer === "gpu" ? undefined : prefer };
  try {
    device = await open(options);
  } catch (error) {
    $("device").textContent = `No device: ${error.message}`;
    return;
  }
  const deviceMs = performance.now() - began;
  state.device = { kind: device.kind, name: device.name, reason: device.reason, software: device.software };
  const kind = device.kind === "gpu" ? "Computing on WebGPU" : "Computing on the CPU, with WebAssembly's vector instructions, on one thread";
  $("device").textContent = `${kind}: ${device.name} (${device.reason}).`;
  const current = device;
  current.gpuDevice?.lost.then((info) => {
    if (current !== device || info.reason === "destroyed") return;
    $("lost").textContent = `The device was lost: ${info.message}. Choose another above, or load the page again.`;
    $("lost").hidden = false;
  });
  for (const section of sections) {
    try {
      state.sections[section.name] = await section.run(current, deviceMs);
    } catch (error) {
      // the next start goes on
      if (error.kind === "freed") return;
      section.failed(error);
      state.sections[section.name] = { error: `${error.kind}: ${error.message}` };
    }
  }
  state.ready = true;
}

sections = [speech(), photographs(), benchmark(), file()];
$("prefer").addEventListener("change", start);
const redraw = () => sections.forEach((section) => section.redraw?.());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  redraw();
});
document.documentElement.dataset.scheme = isDark() ? "dark" : "light";
start();
