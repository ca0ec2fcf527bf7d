// A headless Chromium, driven over a pipe by the DevTools protocol, and a server of files for it. Nothing but Node is needed.

import { spawn } from "node:child_process";
import fs from "node:fs";
import http from "node:http";
import os from "node:os";
import path from "node:path";

const TYPES = {
  ".html": "text/html; charset=utf-8", ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css",
  ".wasm": "application/wasm", ".json": "application/json", ".jpg": "image/jpeg", ".png": "image/png", ".wav": "audio/wav",
  ".safetensors": "application/octet-stream", ".md": "text/plain; charset=utf-8",
};

/** Serves folders: `{ "/": folder, "/pkg/": folder }`, the longest prefix first. Returns the origin and a way to stop. */
export function serve(folders, port = 0) {
  const prefixes = Object.keys(folders).sort((a, b) => b.length - a.length);
  const asked = [];
  const server = http.createServer((request, response) => {
    const { pathname } = new URL(request.url, "http://localhost");
    asked.push(pathname);
    const prefix = prefixes.find((prefix) => pathname.startsWith(prefix));
    const root = path.resolve(folders[prefix]);
    let file = path.join(root, decodeURIComponent(pathname.slice(prefix.length)));
    if (file !== root && !file.startsWith(root + path.sep)) return void response.writeHead(403).end();
    if (fs.existsSync(file) && fs.statSync(file).isDirectory()) file = path.join(file, "index.html");
    if (!fs.existsSync(file)) return void response.writeHead(404).end(`no file ${pathname}`);
    const size = fs.statSync(file).size;
    const headers = { "content-type": TYPES[path.extname(file)] ?? "application/octet-stream", "accept-ranges": "bytes" };
    // players of sound ask for parts
    const range = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? "");
    if (range) {
      const [from, to] = [Number(range[1]), Math.min(range[2] ? Number(range[2]) : size - 1, size - 1)];
      response.writeHead(206, { ...headers, "content-range": `bytes ${from}-${to}/${size}`, "content-length": to - from + 1 });
      return void fs.createReadStream(file, { start: from, end: to }).pipe(response);
    }
    response.writeHead(200, { ...headers, "content-length": size });
    fs.createReadStream(file).pipe(response);
  });
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, "127.0.0.1", () =>
      resolve({ origin: `http://127.0.0.1:${server.address().port}`, asked, close: () => (server.closeAllConnections(), server.close()) }));
  });
}

/** SwiftShader as the adapter of WebGPU: what there is without a GPU, and the same everywhere. */
export const SWIFTSHADER = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];

export class Browser {
  static async open(flags = SWIFTSHADER) {
    const profile = fs.mkdtempSync(path.join(os.tmpdir(), "cross-attention-web-"));
    const command = process.env.CHROMIUM ?? "chromium";
    const child = spawn(
      command,
      [
        "--headless", "--no-sandbox", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-quic", "--disable-dev-shm-usage", "--mute-audio", "--autoplay-policy=no-user-gesture-required", "--hide-scrollbars", "--remote-debugging-pipe", `--user-data-dir=${profile}`, ...flags,
        "about:blank",
      ],
      { stdio: ["ignore", "ignore", process.env.VERBOSE ? "inherit" : "ignore", "pipe", "pipe"] },
    );
    const browser = new Browser();
    Object.assign(browser, { child, profile, last: 0, waiting: new Map(), pages: new Map() });
    await new Promise((resolve, reject) => {
      child.once("error", (error) => reject(new Error(`${command}: ${error.message}; set CHROMIUM to a Chromium or Chrome`)));
      child.once("spawn", resolve);
    });
    child.once("exit", (code) => {
      for (const { reject } of browser.waiting.values()) reject(new Error(`the browser ended (${code})`));
    });
    let text = "";
    child.stdio[4].setEncoding("utf8");
    child.stdio[4].on("data", (chunk) => {
      const parts = (text + chunk).split("\0");
      text = parts.pop();
      for (const part of parts) browser.#hear(JSON.parse(part));
    });
    child.stdio[3].on("error", () => {});
    await browser.send("Browser.getVersion");
    return browser;
  }

  send(method, params = {}, sessionId = undefined) {
    this.last += 1;
    const id = this.last;
    this.child.stdio[3].write(`${JSON.stringify({ id, method, params, sessionId })}\0`);
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject, method }));
  }

  #hear(message) {
    if (message.id !== undefined) {
      const { resolve, reject, method } = this.waiting.get(message.id);
      this.waiting.delete(message.id);
      if (message.error) reject(new Error(`${method}: ${message.error.message}`));
      else resolve(message.result);
      return;
    }
    this.pages.get(message.sessionId)?.hear(message);
  }

  /** A page of its own on a URL. */
  async page(url, { width = 1100, height = 900, dark = false } = {}) {
    const { targetId } = await this.send("Target.createTarget", { url: "about:blank", newWindow: true, width, height });
    const { sessionId } = await this.send("Target.attachToTarget", { targetId, flatten: true });
    const page = new Page(this, targetId, sessionId);
    this.pages.set(sessionId, page);
    for (const domain of ["Page", "Runtime", "Log", "Network"]) await page.send(`${domain}.enable`);
    await page.send("Emulation.setDeviceMetricsOverride", { width, height, deviceScaleFactor: 1, mobile: false });
    await page.send("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: dark ? "dark" : "light" }] });
    await page.send("Page.navigate", { url });
    return page;
  }

  async close() {
    const ended = new Promise((resolve) => this.child.once("exit", resolve));
    this.send("Browser.close").catch(() => {});
    const late = setTimeout(() => this.child.kill("SIGKILL"), 3000);
    await ended;
    clearTimeout(late);
    fs.rmSync(this.profile, { recursive: true, force: true, maxRetries: 5 });
  }
}

export class Page {
  constructor(browser, targetId, sessionId) {
    Object.assign(this, { browser, targetId, sessionId, errors: [], requests: [] });
  }

  hear({ method, params }) {
    if (method === "Runtime.exceptionThrown") {
      const { text, exception } = params.exceptionDetails;
      this.errors.push(`${text} ${exception?.description ?? ""}`);
    }
    if (method === "Runtime.consoleAPICalled" && ["error", "warning", "assert"].includes(params.type)) {
      this.errors.push(params.args.map((value) => value.value ?? value.description).join(" "));
    }
    if (method === "Log.entryAdded" && params.entry.level === "error") this.errors.push(`${params.entry.text} ${params.entry.url ?? ""}`);
    if (method === "Network.requestWillBeSent") this.requests.push(params.request.url);
  }

  send(method, params) {
    return this.browser.send(method, params, this.sessionId);
  }

  /** The value of an expression; promises are awaited. */
  async evaluate(expression) {
    const { result, exceptionDetails } = await this.send("Runtime.evaluate", { expression, awaitPromise: true, returnByValue: true });
    if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
    return result.value;
  }

  /** Waits until an expression is true, and gives its value; four times as long as a machine takes that does nothing else. */
  async until(expression, idleSeconds = 60) {
    const seconds = 4 * idleSeconds;
    const end = Date.now() + seconds * 1000;
    for (;;) {
      const value = await this.evaluate(expression).catch((error) => {
        if (Date.now() > end) throw error;
      });
      if (value) return value;
      if (Date.now() > end) throw new Error(`not so within ${seconds} s: ${expression}; errors of the page: ${this.errors.join("; ") || "none"}`);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  async screenshot(file, selector = undefined) {
    let clip;
    if (selector) {
      clip = await this.evaluate(`(() => { const e = document.querySelector(${JSON.stringify(selector)}); const r = e.getBoundingClientRect();
        return { x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height, scale: 1 }; })()`);
    }
    const { data } = await this.send("Page.captureScreenshot", { format: "png", clip, captureBeyondViewport: true });
    fs.writeFileSync(file, Buffer.from(data, "base64"));
  }

  async close() {
    await this.browser.send("Target.closeTarget", { targetId: this.targetId });
    this.browser.pages.delete(this.sessionId);
  }
}
