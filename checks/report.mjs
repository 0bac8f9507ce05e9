// Drives a headless Chromium over pages of `phalanx report`; see checks/report.
//   node report.mjs PHALANX RUN STORED NEW NAME=PAGE.html...
// STORED holds the screenshots that the pages are compared with; those of this run go to NEW. RUN is
// the folder of a run that PHALANX serves live.
import { createRequire } from "node:module";
import { spawn } from "node:child_process";
import { cpSync, existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const modules = createRequire(`${process.cwd()}/`);
const { chromium } = modules("playwright-core");
const { PNG } = modules("pngjs");
const { default: pixelmatch } = await import(pathToFileURL(modules.resolve("pixelmatch")));
const axe = readFileSync(modules.resolve("axe-core/axe.min.js"), "utf8");

const WIDTHS = [390, 1280];
const SCHEMES = ["light", "dark"];
/// Share of pixels that may differ: fonts are drawn a little differently from machine to machine.
const TOLERANCE = 0.02;

const [phalanx, run, stored, fresh, ...pages] = process.argv.slice(2);
const faults = [];
const fault = (what) => { faults.push(what); console.log(`  WRONG: ${what}`); };

function compare(name, picture) {
  const path = `${stored}/${name}.png`;
  writeFileSync(`${fresh}/${name}.png`, picture);
  if (!existsSync(path)) return fault(`${name}: nothing is stored to compare with`);
  const [before, now] = [PNG.sync.read(readFileSync(path)), PNG.sync.read(picture)];
  if (before.width !== now.width || Math.abs(before.height - now.height) > 0.02 * before.height)
    return fault(`${name}: was ${before.width} x ${before.height}, is ${now.width} x ${now.height}`);
  const height = Math.min(before.height, now.height);
  const rows = (png) => png.data.subarray(0, 4 * png.width * height);
  const different = pixelmatch(rows(before), rows(now), null, now.width, height, { threshold: 0.2 });
  const share = different / (now.width * height);
  if (share > TOLERANCE) fault(`${name}: ${(100 * share).toFixed(1)} % of the pixels differ`);
}

async function look(browser, name, file, width, scheme) {
  const label = `${name}-${width}-${scheme}`;
  const context = await browser.newContext({
    viewport: { width, height: 900 }, colorScheme: scheme, reducedMotion: "reduce", bypassCSP: true,
  });
  const page = await context.newPage();
  page.on("console", (message) => { if (message.type() === "error") fault(`${label}: ${message.text()}`); });
  page.on("pageerror", (error) => fault(`${label}: ${error.message}`));
  page.on("request", (request) => {
    if (!/^(file|data):/.test(request.url())) fault(`${label}: asks for ${request.url()}`);
  });
  await page.goto(pathToFileURL(resolve(file)).href);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  if (wide > width) fault(`${label}: ${wide} pixels wide`);
  compare(label, await page.screenshot({ fullPage: true }));
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => globalThis.axe.run());
  for (const { id, help, nodes } of violations) fault(`${label}: ${id}: ${help}: ${nodes[0].html.slice(0, 120)}`);
  if (width === WIDTHS[1] && scheme === SCHEMES[0]) await handle(page, label);
  await context.close();
}

/// The timeline answers to keys, buttons, the wheel and dragging.
async function handle(page, label) {
  const drawing = page.locator(".drawing");
  if (await drawing.count() === 0) return;
  const seen = () => drawing.evaluate((svg) => [svg.viewBox.baseVal.x, svg.viewBox.baseVal.width]);
  const expect = async (what, right) => {
    const [from, width] = await seen();
    if (!right(from, width)) fault(`${label}: ${what} shows ${from} and ${width} further`);
  };
  await drawing.focus();
  await page.keyboard.press("+");
  await expect("plus", (from, width) => from === 2500 && width === 5000);
  await page.keyboard.press("ArrowRight");
  await expect("the right arrow", (from) => from === 3750);
  await drawing.hover();
  await page.mouse.wheel(0, -100);
  await expect("the wheel", (_, width) => width === 4000);
  const [before] = await seen();
  await page.mouse.down();
  await page.mouse.move(500, 500, { steps: 2 });
  await page.mouse.up();
  await expect("dragging", (from) => from !== before);
  await page.getByRole("button", { name: "Whole step" }).click();
  await expect("the button", (from, width) => from === 0 && width === 10000);
}

/// A page that is served follows what the run writes.
async function live(browser) {
  const folder = "live";
  rmSync(folder, { recursive: true, force: true });
  cpSync(run, folder, { recursive: true });
  const metrics = readFileSync(`${run}/metrics.jsonl`, "utf8");
  writeFileSync(`${folder}/metrics.jsonl`, metrics.slice(0, metrics.length / 2));
  const server = spawn(phalanx, ["report", folder, "--live"]);
  try {
    const address = await new Promise((done) => server.stdout.once("data", (line) => done(String(line).trim())));
    const page = await browser.newPage();
    page.on("pageerror", (error) => fault(`live: ${error.message}`));
    page.on("console", (message) => { if (message.type() === "error") fault(`live: ${message.text()}`); });
    await page.goto(address);
    const told = () => page.locator(".facts").innerText();
    const before = await told();
    writeFileSync(`${folder}/metrics.jsonl`, metrics);
    await page.waitForFunction((text) => document.querySelector(".facts").innerText !== text, before, { timeout: 20000 });
    const steps = metrics.trim().split("\n").map(JSON.parse).filter((record) => record.event === "step");
    const last = steps.at(-1).step;
    if (!(await told()).includes(`step ${last} of`)) fault(`live: ${await told()}`);
    await page.close();
    console.log("live: the page follows the run");
  } finally {
    server.kill();
  }
}

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
for (const one of pages) {
  const [name, file] = one.split("=");
  for (const width of WIDTHS) for (const scheme of SCHEMES) await look(browser, name, file, width, scheme);
  if (faults.length === 0)
    console.log(`${name}: ${WIDTHS.join(" and ")} pixels, ${SCHEMES.join(" and ")}: no errors, no requests, accessible, as stored`);
}
await live(browser);
await browser.close();
process.exit(faults.length ? 1 : 0);
