"""The live page: one document without anything from elsewhere, so that it works on a device without the Internet.

It asks `/status` twice a second and shows `/stream/NAME`. Texts go in as text, never as markup: labels and names come
from files.
"""

from __future__ import annotations

__all__ = ["CONTENT_SECURITY_POLICY", "PAGE"]

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mgg-edge</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: dark; --ground: #0e1216; --card: #161c22; --line: #26303a; --text: #e8edf2; --quiet: #8b98a5;
        --adapted: #40d68a; --source: #a8b2be; --entropy: #ffbe54; --bad: #ff6b6b; }
* { box-sizing: border-box; margin: 0; }
body { background: var(--ground); color: var(--text); font: 15px/1.45 system-ui, "Segoe UI", Roboto, sans-serif;
       max-width: 1280px; margin: 0 auto; padding: 20px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 6px 18px; margin-bottom: 18px; }
h1 { font-size: 19px; font-weight: 650; letter-spacing: .01em; }
header span, footer, .quiet { color: var(--quiet); font-size: 13px; }
header .state { margin-left: auto; display: flex; align-items: center; gap: 8px; }
.dot { width: 9px; height: 9px; border-radius: 50%; background: var(--quiet); flex: none; display: inline-block; }
.dot.good { background: var(--adapted); } .dot.bad { background: var(--bad); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden;
          display: grid; grid-template-columns: minmax(0, 1.55fr) minmax(320px, 1fr); margin-bottom: 18px; }
@media (max-width: 860px) { article { grid-template-columns: minmax(0, 1fr); } }
figure { background: #07090b; position: relative; min-height: 220px; display: flex; align-items: center; }
figure img { width: 100%; max-height: 70vh; object-fit: contain; display: block; }
figcaption { position: absolute; left: 12px; top: 12px; background: #0e1216d9; border-radius: 7px; padding: 4px 10px;
             font-size: 13px; display: flex; gap: 8px; align-items: center; }
section { padding: 18px 20px; display: flex; flex-direction: column; gap: 16px; }
.opinions { display: grid; gap: 14px; }
.opinion .head { display: flex; justify-content: space-between; gap: 10px; font-size: 12px; color: var(--quiet);
                 text-transform: uppercase; letter-spacing: .06em; }
.opinion .label { font-size: 21px; font-weight: 620; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.opinion.frozen .label { font-size: 17px; font-weight: 500; color: var(--source); }
.bar { height: 5px; border-radius: 3px; background: var(--line); margin-top: 5px; overflow: hidden; }
.bar i { display: block; height: 100%; width: 0; background: var(--source); transition: width .25s; }
.adapted .bar i { background: var(--adapted); }
.badge { color: var(--source); } .adapted .badge { color: var(--adapted); }
.chart { display: flex; justify-content: space-between; font-size: 13px; color: var(--quiet); }
.chart b { color: var(--entropy); font-weight: 600; font-variant-numeric: tabular-nums; }
canvas { width: 100%; height: 64px; display: block; margin-top: 4px; }
dl { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1px; background: var(--line);
     border: 1px solid var(--line); border-radius: 9px; overflow: hidden; }
dl div { background: var(--card); padding: 8px 10px; min-width: 0; }
dt { font-size: 12px; color: var(--quiet); white-space: nowrap; }
dd { font-size: 17px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; overflow: hidden;
     text-overflow: ellipsis; }
.note { font-size: 13px; color: var(--quiet); overflow-wrap: anywhere; }
.note.bad { color: var(--bad); }
footer { display: flex; flex-wrap: wrap; gap: 4px 18px; } a { color: inherit; }
</style>
<header><h1>mgg-edge</h1><span id="bundle"></span><span id="engine"></span>
<span class="state"><i class="dot" id="dot"></i><span id="state">connecting</span></span></header>
<main id="cameras"></main>
<footer><a href="/metrics">metrics</a><a href="/healthz">health</a><a href="/readyz">readiness</a>
<a href="/status">status as JSON</a></footer>
<template id="camera"><article>
<figure><img alt="">
<figcaption><i class="dot"></i><span class="name"></span><span class="quiet rate"></span></figcaption></figure>
<section>
<div class="opinions">
<div class="opinion now"><div class="head"><span>Now</span><span class="badge"></span></div>
<div class="label">waiting for a picture</div><div class="bar"><i></i></div></div>
<div class="opinion frozen"><div class="head"><span>Frozen source model</span><span class="agreement"></span></div>
<div class="label">–</div><div class="bar"><i></i></div></div>
</div>
<div><div class="chart"><span>Entropy, latest predictions</span><b class="entropy"></b></div><canvas></canvas></div>
<dl></dl>
<div class="note"></div>
</section></article></template>
<script>
"use strict";
const cards = new Map();
const number = (value, digits = 1, unit = "") =>
  value === null || value === undefined ? "–" : value.toFixed(digits) + unit;
const total = (counts) => Object.values(counts).reduce((sum, count) => sum + count, 0);

function card(name) {
  if (cards.has(name)) return cards.get(name);
  const part = document.importNode(document.getElementById("camera").content, true).firstElementChild;
  const picture = part.querySelector("img");
  const open = () => { picture.src = "/stream/" + encodeURIComponent(name) + "?" + Date.now(); };
  picture.alt = "live picture of " + name;
  picture.onerror = () => setTimeout(open, 2000);
  part.querySelector(".name").textContent = name;
  part.dataset.camera = name;
  document.getElementById("cameras").append(part);
  open();  // not before it belongs to the document: pictures of others are not loaded
  cards.set(name, part);
  return part;
}

function opinion(part, value) {
  part.querySelector(".label").textContent = value.label + "  " + (value.probability * 100).toFixed(0) + " %";
  part.querySelector(".bar i").style.width = (value.probability * 100) + "%";
}

function curve(canvas, values) {
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale; canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = "#26303a"; pen.fillRect(0, height - 1, width, 1);
  if (values.length < 2) return;
  const top = Math.max(.5, ...values), step = width / (240 - 1), left = width - step * (values.length - 1);
  const place = (value, index) => [left + index * step, height - 2 - (height - 6) * value / top];
  pen.beginPath(); values.forEach((value, index) => pen.lineTo(...place(value, index)));
  pen.strokeStyle = "#ffbe54"; pen.lineWidth = 1.6; pen.lineJoin = "round"; pen.stroke();
  pen.lineTo(width, height); pen.lineTo(left, height); pen.closePath(); pen.fillStyle = "#ffbe5424"; pen.fill();
}

function figures(part, rows) {
  const list = part.querySelector("dl");
  while (list.children.length < rows.length) {
    const cell = document.createElement("div");
    cell.append(document.createElement("dt"), document.createElement("dd"));
    list.append(cell);
  }
  rows.forEach(([name, value, hint], index) => {
    const cell = list.children[index];
    cell.children[0].textContent = name;
    cell.children[1].textContent = value;
    cell.title = hint || "";
    cell.dataset.figure = name;
  });
}

function show(camera) {
  const part = card(camera.name), now = part.querySelector(".now"), connection = camera.connection;
  const lost = camera.ended || connection.connected === false;
  part.querySelector("figcaption .dot").className = "dot " + (lost ? "bad" : camera.prediction ? "good" : "");
  if (camera.prediction) {
    opinion(now, camera.prediction);
    now.classList.toggle("adapted", camera.prediction.adapted);
    now.querySelector(".badge").textContent =
      camera.prediction.adapted ? "● adapted, step " + camera.prediction.step : "● source model";
    part.querySelector(".entropy").textContent = camera.prediction.entropy.toFixed(2) + " nats";
  }
  part.querySelector(".frozen").hidden = !camera.frozen;
  if (camera.frozen) {
    opinion(part.querySelector(".frozen"), camera.frozen);
    part.querySelector(".agreement").textContent = "agrees on " + (camera.frozen.agreement * 100).toFixed(0) + " %";
  }
  part.querySelector(".rate").textContent = number(camera.rate, 1, " frames/s");
  curve(part.querySelector("canvas"), camera.entropies);
  const reasons = Object.entries(camera.dropped).map(([reason, count]) => reason + ": " + count).join(", ");
  figures(part, [
    ["updates", camera.adapt_steps], ["rejected", camera.adapt_rejected, camera.last_rejection],
    ["drift", number(camera.drift, 2), "distance of the features from the source's, in its standard deviations"],
    ["moved", number(camera.moved * 100, 0, " %"), "distance of θ from the source model over the largest allowed"],
    ["frames", camera.inferred], ["dropped", total(camera.dropped), reasons],
    ["inference p99", number(camera.infer_ms.p99, 1, " ms")],
    ["frame age p99", number(camera.frame_age_ms.p99, 0, " ms")],
    ["reconnects", connection.reconnects ?? "–", "decoders killed: " + (connection.kills ?? 0)],
  ]);
  const note = part.querySelector(".note");
  note.classList.toggle("bad", lost);
  note.textContent = camera.ended ? "ended" : connection.connected === false ? "connection lost, trying again"
    : camera.last_rejection ? "last rejection: " + camera.last_rejection : "";
}

async function refresh() {
  let good = false, said = "no answer from the device";
  try {
    const answer = await fetch("/status", { cache: "no-store" });
    const status = await answer.json();
    document.getElementById("bundle").textContent = status.info.bundle + " · " + status.info.bundle_id.slice(0, 12);
    document.getElementById("engine").textContent = status.info.engine;
    status.cameras.forEach(show);
    good = status.ready;
    said = good ? "running" : status.reason;
  } catch (error) { console.debug(error); }
  document.getElementById("dot").className = "dot " + (good ? "good" : "bad");
  document.getElementById("state").textContent = said;
  setTimeout(refresh, 500);
}
refresh();
</script>
</html>
"""
