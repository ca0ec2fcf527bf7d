// Runs tests of web/test in a headless Chromium. usage: node test.mjs package [FILTER] | table [all|KERNEL]
import fs from "node:fs";
import path from "node:path";

import { Browser, serve } from "./browser.mjs";

const web = path.resolve(path.dirname(new URL(import.meta.url).pathname), "..");
const at = (folder) => path.join(web, folder);
const [what, filter] = process.argv.slice(2);
const server = await serve({ "/test/": at("test"), "/pkg/": at("pkg"), "/table/": at("table/pkg"), "/": at("test") });
const browser = await Browser.open();
const problems = [];

async function package_() {
  // the list of kinds stands in Rust, in JavaScript and in the types
  const read = (file) => fs.readFileSync(at(file), "utf8");
  const types = new Set(/export type ErrorKind =([^;]*);/.exec(read("js/index.d.ts"))[1].match(/\w+/g));
  const rust = ["src/fail.rs", "src/lib.rs", "src/data.rs", "src/elements.rs", "src/calls.rs", "src/context.rs", "src/request.rs"].map(read).join("\n");
  const used = new Set([
    ...[...rust.matchAll(/=> "(\w+)",/g)].map(([, kind]) => kind),
    ...[...rust.matchAll(/Fail::new\(\s*"(\w+)"/g)].map(([, kind]) => kind),
    ...[...read("js/index.js").matchAll(/new AttentionError\(\s*"(\w+)"/g)].map(([, kind]) => kind),
    "option",
  ]);
  const missing = [...used].filter((kind) => !types.has(kind) && !["topLeft", "bottomRight", "endOfKeys"].includes(kind));
  const unused = [...types].filter((kind) => !used.has(kind));
  if (missing.length + unused.length > 0) problems.push(`kinds of errors: not in the types: ${missing}; in the types alone: ${unused}`);

  const page = await browser.page(`${server.origin}/test/index.html${filter ? `?only=${filter}` : ""}`);
  const outcome = await page.until("globalThis.outcome?.done && globalThis.outcome", 900);
  problems.push(...outcome.failed, ...page.errors.map((error) => `console: ${error}`));
  // what the README shows runs as it stands there
  for (const [, block] of read("README.md").matchAll(/```js\n([^]*?)```/g)) {
    const opens = block.includes("await open(") ? "" : "const device = await open();";
    const text = `const { open } = await import("/pkg/index.js"); ${opens} ${block.replace(/^import .*$/m, "")}; return output.length`;
    const length = await page.evaluate(`(async () => { ${text} })()`).catch((error) => error);
    if (!(length > 0)) problems.push(`an example of README.md: ${length}`);
  }
  const notes = Object.entries(outcome.notes).map(([name, value]) => `${name} ${value.toFixed(3)}`);
  console.log(`package: ${outcome.passed.length} tests passed, ${outcome.failed.length} failed; ${notes.join(", ")}`);
}

async function table() {
  const asked = filter === "all" ? "?all" : filter ? `?kernel=${filter}` : "";
  const page = await browser.page(`${server.origin}/test/table.html${asked}`);
  const verdicts = await page.until("globalThis.verdicts?.done && globalThis.verdicts", filter === "all" ? 7200 : 1500);
  problems.push(...verdicts.failed, ...page.errors.map((error) => `console: ${error}`));
  if (!verdicts.plan.includes("wgpu does not reach the subgroups of browsers")) problems.push(`the plan says nothing of subgroups:\n${verdicts.plan}`);
  console.log(`table: ${verdicts.title}; ${verdicts.cases} cases`);
  for (const [kernel, seconds] of Object.entries(verdicts.seconds)) {
    const count = (what) => verdicts[what][kernel] ?? 0;
    console.log(`  ${kernel}: ${count("passed")} passed, ${count("refused")} refused, ${count("known")} known faults of the driver, ${seconds.toFixed(0)} s`);
    if (count("passed") === 0) problems.push(`no case ran with ${kernel}`);
  }
}

try {
  await { package: package_, table }[what]();
} catch (error) {
  problems.push(error.stack);
} finally {
  await browser.close();
  server.close();
}
for (const problem of problems) console.log(`FAILED ${problem}`);
process.exit(problems.length > 0 ? 1 : 0);
