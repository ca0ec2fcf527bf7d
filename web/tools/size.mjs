// How large the package is, and whether that is what was promised.
import fs from "node:fs";
import path from "node:path";
import zlib from "node:zlib";

const pkg = path.resolve(path.dirname(new URL(import.meta.url).pathname), "../pkg");
const limits = { "cross_attention_web_bg.wasm": [1_500_000, 550_000] };
let wrong = false;
for (const name of ["cross_attention_web_bg.wasm", "cross_attention_web.js", "index.js", "ledger.js"]) {
  const bytes = fs.readFileSync(path.join(pkg, name));
  const sizes = [bytes.length, zlib.gzipSync(bytes, { level: 9 }).length];
  const most = limits[name];
  const over = most?.some((limit, n) => sizes[n] > limit);
  wrong ||= over ?? false;
  console.log(`${name}: ${sizes[0]} bytes, ${sizes[1]} gzipped${over ? `; at most ${most.join(" and ")} were promised` : ""}`);
}
process.exit(wrong ? 1 : 0);
