// Runs tests of web/test in a headless Chromium. usage: node test.mjs package [FILTER] | table [all|KERNEL], the table whole for
// all kernels or for one, else as far as a few minutes go
import fs from "node:fs";
import os from "node:os";
import path from "node:path";

import { Browser, serve } from "./browser.mjs";

const web = path.resolve(path.dirname(new URL(import.meta.url).pathname), "..");
const at = (folder) => path.join(web, folder);
const [what, filter] = process.argv.slice(2);
const server = await serve({
  "/test/": at("test"), "/pkg/": at("pkg"), "/page/": at("page"), "/golden/": at("../tests/golden"), "/table/": at("table/pkg"), "/": at("test"),
});
const browser = await Browser.open();
const problems = [];

async function package_() {
  // the list of kinds stands in Rust, in JavaScript and in the types
  const read = (file) => fs.readFileSync(at(file), "utf8");
  const types = new Set(/export type ErrorKind =([^;]*);/.exec(read("js/index.d.ts"))[1].match(/\w+/g));
  const rust = ["src/fail.rs", "src/lib.rs", "src/data.rs", "src/elements.rs", "src/calls.rs", "src/context.rs", "src/request.rs", "src/gradients.rs", "src/backward.rs"].map(read).join("\n");
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

/** Cases of each kernel. A software driver takes seconds to compile a shader of the last two, so each has every eighth case; plain shares
 * its terms with fused, and has every fourth. */
const turns = { fused: () => true, plain: (n) => n % 4 === 1, split: (n) => n % 8 === 2, tiled: (n) => n % 8 === 5 };

/** The case table, shared out among browsers as they come to an end of a case: one compiles on one core. */
async function table() {
  const start = Date.now();
  const kernels = Object.keys(turns);
  if (filter && filter !== "all" && !kernels.includes(filter)) throw new Error(`there is no ${filter}; possible: all, ${kernels.join(", ")}`);
  const others = Math.min(os.availableParallelism(), 4) - 1;
  const browsers = [browser, ...(await Promise.all(Array.from({ length: others }, () => Browser.open())))];
  try {
    const pages = await Promise.all(browsers.map((browser) => browser.page(`${server.origin}/test/table.html`)));
    const { error, title, plan, names } = (await Promise.all(pages.map((page) => page.until("globalThis.table"))))[0];
    if (error) throw new Error(error);
    const asked = kernels.filter((kernel) => !filter || filter === "all" || filter === kernel);
    const cases = asked.flatMap((kernel) => names.map((name, n) => ({ kernel, name, n })).filter(({ n }) => filter || turns[kernel](n)));
    const counts = Object.fromEntries(asked.map((kernel) => [kernel, { passed: 0, refused: 0, known: 0, failed: 0, seconds: 0 }]));
    await Promise.all(
      pages.map(async (page) => {
        for (let next = cases.shift(); next; next = cases.shift()) {
          const { kernel, name, n } = next;
          const began = Date.now();
          const late = new Promise((_, reject) => setTimeout(() => reject(new Error("no end within 400 s")), 400_000).unref());
          const verdict = await Promise.race([page.evaluate(`table.run("${kernel}", ${n})`), late]).catch((error) => error);
          const [word] = /^(passed|refused|known)/.exec(verdict) ?? ["failed"];
          if (word === "failed") problems.push(`${kernel}/${name}: ${verdict}`);
          counts[kernel][word] += 1;
          counts[kernel].seconds += (Date.now() - began) / 1000;
          // of such a page nothing more is to be had
          if (verdict instanceof Error) break;
        }
        problems.push(...page.errors.map((error) => `console: ${error}`));
      }),
    );
    if (cases.length > 0) problems.push(`${cases.length} cases were left when the browsers had ended`);
    if (!plan.includes("wgpu does not reach the subgroups of browsers")) problems.push(`the plan says nothing of subgroups:\n${plan}`);
    console.log(`table: ${title}; ${names.length} cases, ${browsers.length} browsers, ${((Date.now() - start) / 1000).toFixed(0)} s`);
    for (const [kernel, { passed, refused, known, failed, seconds }] of Object.entries(counts)) {
      console.log(`  ${kernel}: ${passed} passed, ${failed} failed, ${refused} refused, ${known} known faults of the driver, ${seconds.toFixed(0)} s of a browser`);
      if (passed === 0) problems.push(`no case ran with ${kernel}`);
    }
  } finally {
    await Promise.all(browsers.slice(1).map((browser) => browser.close()));
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
