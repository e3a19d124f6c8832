"""Style sheet of the report, the live page and comparisons: light and dark, wide and narrow, no external asset."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #ffffff; --ink: #1d1f24; --soft: #646872; --edge: #e4e2dd;
  --good: #0b7a4b; --bad: #b3261e; --one: #c2571a; --two: #7a4fb5; --three: #0b7a4b; --shade: rgba(20, 20, 24, .82);
  --s0: #3457d5; --s1: #c2571a; --s2: #0b7a4b; --s3: #7a4fb5; --s4: #b3261e; --s5: #0f7c8a;
  --s6: #8a6d0f; --s7: #b0397f; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171b; --card: #1d2026; --ink: #e8e8ea; --soft: #a2a8b2;
  --edge: #31353d; --good: #5fd3a0; --bad: #ff8a80; --one: #f0a06a; --two: #c3a3f2; --three: #5fd3a0;
  --s0: #86a0ff; --s1: #f0a06a; --s2: #5fd3a0; --s3: #c3a3f2; --s4: #ff8a80; --s5: #62cbd8;
  --s6: #d9bd5a; --s7: #f08cc4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; }
main { max-width: 1480px; margin: 0 auto; padding: 32px clamp(12px, 2.5vw, 40px) 80px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 44px 0 4px; }
h3 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 20px 0 8px; }
.note { color: var(--soft); margin: 0 0 14px; max-width: 80ch; }
.warning { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 14px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--edge); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px; }
tbody tr:last-child td { border-bottom: 0; }
td.best { color: var(--good); font-weight: 700; }
td.best::after { content: " ★"; font-size: 12px; }
td .half { color: var(--soft); font-weight: 400; font-size: 13px; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.tables { columns: 370px; column-gap: 14px; }
.tables .card { break-inside: avoid; margin-bottom: 14px; }
.tables td { padding: 4px 8px; }
.tables td:first-child { white-space: normal; overflow-wrap: anywhere; }
.tables h3 { margin: 0 0 4px; }
.up { color: var(--good); } .down { color: var(--bad); }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 14px; }
.chart { display: block; width: 100%; background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  touch-action: pan-y; }
.chart text { font: 10px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
.chart .title { font-size: 12.5px; font-weight: 600; fill: var(--ink); }
.chart .grid { stroke: var(--edge); stroke-width: 1; }
.chart .axis { stroke: var(--soft); stroke-width: 1; }
.chart polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.chart .raw { stroke-width: 1; stroke-opacity: .35; }
.chart .line { stroke-width: 2; }
.chart .cursor { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 2; }
.chart .level { stroke-width: 1.4; stroke-dasharray: 5 4; }
.chart .level-0 { stroke: var(--one); }
.chart .level-1 { stroke: var(--two); } .chart .level-2 { stroke: var(--three); }
.series-0 { --c: var(--s0); } .series-1 { --c: var(--s1); } .series-2 { --c: var(--s2); } .series-3 { --c: var(--s3); }
.series-4 { --c: var(--s4); } .series-5 { --c: var(--s5); } .series-6 { --c: var(--s6); } .series-7 { --c: var(--s7); }
polyline[class*=series-] { stroke: var(--c); } circle[class*=series-] { fill: var(--c); }
.swatch[class*=series-] { background: var(--c); }
.tip { position: fixed; z-index: 3; pointer-events: none; background: var(--ink); color: var(--ground);
  border-radius: 6px; padding: 5px 9px; font-size: 12.5px; line-height: 1.4; font-variant-numeric: tabular-nums;
  max-width: 90vw; }
.tip b { font-weight: 600; }

.gallery { display: grid; gap: 14px; }
.prompt { font-weight: 600; margin: 0 0 10px; overflow-wrap: anywhere; max-width: 100ch; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 180px), 1fr)); gap: 14px;
  max-width: calc(var(--n) * 394px); }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; }
.enlarge { display: block; width: 100%; padding: 0; border: 1px solid var(--edge); border-radius: 6px; overflow: hidden;
  background: var(--ground); cursor: zoom-in; }
.enlarge:focus-visible, .group:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
img.small, .tile.small { image-rendering: pixelated; }
.tile { background-repeat: no-repeat; }
figcaption { font-size: 13px; margin-top: 6px; }
figcaption > b { font-weight: 600; overflow-wrap: anywhere; }
figcaption dl { display: grid; grid-template-columns: 1fr auto; margin: 2px 0 0; color: var(--soft); font-size: 12.5px;
  font-variant-numeric: tabular-nums; }
figcaption dt { overflow: hidden; text-overflow: ellipsis; }
figcaption dd { margin: 0; padding-left: 8px; text-align: right; color: var(--ink); }
dialog { border: 0; border-radius: 10px; padding: 0; background: var(--card); color: var(--ink); max-width: 96vw;
  max-height: 94vh; }
dialog::backdrop { background: var(--shade); }
#large { overflow: hidden; cursor: zoom-out; }
#large .view { display: block; }
#large p { margin: 0; padding: 8px 14px; font-size: 13.5px; max-width: 90ch; overflow-wrap: anywhere; }

.timeline { display: grid; grid-template-columns: max-content 1fr; gap: 6px 12px; align-items: center;
  font-size: 13px; }
.timeline .lane { position: relative; height: 22px; background: var(--ground); border-radius: 5px; }
.timeline .span { position: absolute; top: 3px; bottom: 3px; min-width: 3px; border-radius: 4px; overflow: hidden;
  white-space: nowrap; font-size: 11.5px; line-height: 16px; padding-left: 5px; color: #fff; background: #3457d5; }
.timeline .span.alignment { background: #0b7a4b; }
.timeline .mark { position: absolute; top: 3px; bottom: 3px; width: 4px; margin-left: -2px; border-radius: 2px;
  background: var(--s0); }
.timeline .mark.restart { background: var(--s1); } .timeline .mark.outage { background: var(--s6); }
.timeline .mark.alarm { background: var(--s4); } .timeline .mark.session { background: var(--s3); }
.timeline .ends { display: flex; justify-content: space-between; color: var(--soft); font-size: 12px; gap: 12px; }
.events td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.events td:first-child, .events td:nth-child(2) { white-space: nowrap; }
pre { margin: 10px 0 0; font-size: 12.5px; overflow-x: auto; }
summary { cursor: pointer; font-weight: 600; }

progress { width: 100%; height: 10px; accent-color: var(--s0); margin: 0 0 14px; }
.groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px; }
.group { display: flex; flex-direction: column; align-items: stretch; text-align: left; font: inherit; color: inherit;
  cursor: pointer; width: 100%; }
.group:hover { border-color: var(--s0); }
.strip { display: grid; grid-template-columns: repeat(4, 1fr); gap: 4px; }
.strip .tile { border-radius: 4px; width: 100%; }
#group { width: min(1100px, 96vw); padding: 18px; overflow-y: auto; }
#group .close { float: right; }
.steps { display: flex; gap: 8px; flex-wrap: wrap; margin: 10px 0 16px; padding: 0; list-style: none; font-size: 13px; }
.steps li { border: 1px solid var(--edge); border-radius: 8px; padding: 5px 10px; color: var(--soft); }
.steps li.trained { border-color: var(--good); color: var(--ink); }
.left-out figcaption { opacity: .65; }
.left-out .enlarge { border-style: dashed; }
label, button.plain { font: inherit; }
select, input, button.plain { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--edge);
  border-radius: 6px; padding: 4px 10px; }
.jump { display: flex; gap: 4px 16px; flex-wrap: wrap; margin: 10px 0 14px; }
.jump a { color: var(--s0); }
@media (max-width: 600px) { th, td { padding: 6px 8px; } h1 { font-size: 24px; } h2 { margin-top: 34px; }
  .timeline { grid-template-columns: 1fr; gap: 2px; } .timeline .lane { margin-bottom: 8px; } }
"""
