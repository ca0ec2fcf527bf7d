// Serves the page. usage: node serve.mjs [PORT]
import path from "node:path";

import { serve } from "./browser.mjs";

const site = path.resolve(path.dirname(new URL(import.meta.url).pathname), "../site");
const { origin } = await serve({ "/": site }, Number(process.argv[2] ?? 8080));
console.log(`${origin}/ (Ctrl-C ends)`);
