/** src, onnxruntime's WebAssembly and the model → one folder of static files, which any file server serves. */

import { cp, mkdir, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = process.argv[2] ?? join(here, "dist");
const model = process.argv[3] ?? join(here, "model");
const runtime = dirname(createRequire(import.meta.url).resolve("onnxruntime-web/wasm"));

await rm(out, { recursive: true, force: true });
await mkdir(out, { recursive: true });
await build({
  absWorkingDir: here,
  entryPoints: ["src/page.js", "src/worker.js"],
  outdir: out,
  bundle: true,
  format: "esm",
  minify: true,
  target: "es2022",
  legalComments: "linked",
  logLevel: "warning",
});
for (const name of ["index.html", "style.css", "icon.svg"]) await cp(join(here, name), join(out, name));
await cp(join(runtime, "ort-wasm-simd-threaded.wasm"), join(out, "ort-wasm-simd-threaded.wasm"));
for (const name of ["model.onnx", "model.json"]) await cp(join(model, name), join(out, name));
console.log(`${out}: built; serve it with python -m http.server --directory ${out}`);
