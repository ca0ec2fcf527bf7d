// Puts the page together with the package and the data that it shows, in web/site: any server of files can serve that.

import { execFileSync } from "node:child_process";
import fs from "node:fs";
import path from "node:path";

const web = path.resolve(import.meta.dirname ?? path.dirname(new URL(import.meta.url).pathname), "..");
const root = path.dirname(web);
const site = path.join(web, "site");
const data = {
  "whisper.safetensors": "examples/data/whisper.safetensors",
  "whisper-exact.safetensors": "tests/golden/whisper/layer3.safetensors",
  "transcript.json": "examples/data/whisper-tiny-en/transcript.json",
  "two_cities.wav": "examples/data/two_cities.wav",
  "keypoints.safetensors": "examples/data/lightglue/keypoints.safetensors",
  "lightglue.safetensors": "tests/golden/lightglue/layer4.safetensors",
  "matches.json": "examples/data/lightglue/matches.json",
  "left.jpg": "examples/data/lightglue/left.jpg",
  "right.jpg": "examples/data/lightglue/right.jpg",
  "README.md": "examples/data/README.md",
  "LICENSE": "examples/data/LICENSE",
  "LICENSE-lightglue": "examples/data/lightglue/LICENSE",
};

fs.rmSync(site, { recursive: true, force: true });
fs.cpSync(path.join(web, "page"), site, { recursive: true });
fs.cpSync(path.join(web, "pkg"), path.join(site, "pkg"), { recursive: true });
fs.mkdirSync(path.join(site, "data"));
for (const [name, from] of Object.entries(data)) fs.copyFileSync(path.join(root, from), path.join(site, "data", name));

/** What a command prints, or null where there is no such command, or it refuses. */
function told(command, ...args) {
  try {
    return execFileSync(command, args, { cwd: root, encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim();
  } catch {
    return null;
  }
}
const commit = told("git", "rev-parse", "HEAD");
// as the program says it: with + where the sources may differ from the commit
const changed = told("git", "status", "--porcelain", "--", "src", "shaders", "web", "Cargo.toml", "Cargo.lock");
const built = { commit: commit && `${commit}${changed === "" ? "" : "+"}`, rustc: told("rustc", "-V") };
fs.writeFileSync(path.join(site, "built.json"), JSON.stringify(built));
console.log(`${path.relative(root, site)}: ${fs.readdirSync(site, { recursive: true }).length} files`);
