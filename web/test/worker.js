// The package in a worker: one attention, sent back.
import { open } from "/pkg/index.js";

self.onmessage = async ({ data }) => {
  try {
    const device = await open({ prefer: data.prefer });
    const { output, lse } = await device.attention(data.options);
    self.postMessage({ kind: device.kind, output, lse });
    device.free();
  } catch (error) {
    self.postMessage({ error: `${error.kind}: ${error.message}` });
  }
};
