"""Style sheet of report.html: light and dark, no external asset."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #ffffff; --ink: #1d1f24; --soft: #6c7079; --edge: #e4e2dd;
  --accent: #3457d5; --raw: #b9c5f2; --good: #0b7a4b; --one: #c2571a; --two: #7a4fb5; --three: #0b7a4b; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171b; --card: #1d2026; --ink: #e8e8ea; --soft: #9aa0aa;
  --edge: #31353d; --accent: #86a0ff; --raw: #3d4a7d;
  --good: #5fd3a0; --one: #f0a06a; --two: #c3a3f2; --three: #5fd3a0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 48px 0 4px; }
h3 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 20px 0 8px; }
.note { color: var(--soft); margin: 0 0 14px; max-width: 75ch; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 14px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--edge); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px; }
tbody tr:last-child td { border-bottom: 0; }
td.best { color: var(--good); font-weight: 700; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px; }
.chart { display: block; width: 100%; background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.chart text { font: 10px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
.chart .title { font-size: 12.5px; font-weight: 600; fill: var(--ink); }
.chart .grid { stroke: var(--edge); stroke-width: 1; }
.chart .axis { stroke: var(--soft); stroke-width: 1; }
.chart polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.chart .raw { stroke: var(--raw); stroke-width: 1; }
.chart .line { stroke: var(--accent); stroke-width: 2; }
.chart .dot { fill: var(--accent); }
.chart .level { stroke-width: 1.4; stroke-dasharray: 5 4; }
.chart .level-0 { stroke: var(--one); }
.chart .level-1 { stroke: var(--two); } .chart .level-2 { stroke: var(--three); }
.gallery { display: grid; gap: 14px; }
.gallery .prompt { font-weight: 600; margin: 0 0 10px; overflow-wrap: anywhere; }
.pictures { display: flex; gap: 16px; flex-wrap: wrap; }
figure { margin: 0; width: 176px; }
figure img { width: 176px; height: 176px; object-fit: contain; border-radius: 6px; border: 1px solid var(--edge);
  display: block; background: var(--ground); }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: 13px; margin-top: 6px; }
figcaption dl { display: grid; grid-template-columns: 1fr auto; margin: 2px 0 0; color: var(--soft); font-size: 12.5px;
  font-variant-numeric: tabular-nums; }
figcaption dd { margin: 0; text-align: right; }
pre { margin: 10px 0 0; font-size: 12.5px; overflow-x: auto; }
summary { cursor: pointer; font-weight: 600; }
"""
