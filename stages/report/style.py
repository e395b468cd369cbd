"""The style sheet of the report.

The colours of sources can be read on their backgrounds, in both schemes, and told apart by who sees no red, no green or no blue; tests measure both.
"""

COLOURS = 8
"""Colours of sources; further sources begin again, and every curve also carries its name."""

STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf9; --card: #ffffff; --ink: #1f2328; --soft: #646a73;
  --line: #e6e4df; --track: #eeece7;
  --good: #1a7350; --bad: #b23a1e; --c0: #2272d4; --c1: #731509; --c2: #15844e; --c3: #5b358c; --c4: #855800;
    --c5: #b44e8d; --c6: #15454e;
  --c7: #656161; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1b1e23; --ink: #e8e7e3;
  --soft: #9da3ad; --line: #2d3138;
  --track: #2a2e35; --good: #5cc592; --bad: #f08a6c; --c0: #5b88e9; --c1: #e68b61; --c2: #51dcab; --c3: #d0b0ff;
    --c4: #ffcd63; --c5: #bc6b9f;
  --c6: #b2dbe2; --c7: #95938b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; overflow-wrap: break-word; background: var(--paper); color: var(--ink); font: 15px/1.55 -apple-system, BlinkMacSystemFont,
  "Segoe UI", Roboto, Inter,
  "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1204px; margin: 0 auto; padding: 52px 24px 72px; }
h1 { font-size: 38px; line-height: 1.15; letter-spacing: -.022em; font-weight: 650; margin: 2px 0 8px;
  overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; font-weight: 640; margin: 0 0 4px; }
h3 { font-size: 14px; font-weight: 620; margin: 0; overflow-wrap: anywhere; }
p { margin: 0 0 10px; max-width: 92ch; }
.soft, .note { color: var(--soft); }
.note { font-size: 13.5px; max-width: 100ch; }
.over { font-size: 12px; letter-spacing: .09em; text-transform: uppercase; color: var(--soft); margin: 0; }
header .soft { margin-bottom: 0; overflow-wrap: anywhere; }
section { margin-top: 52px; }
section > .note { margin-bottom: 18px; }
section > h2 + :not(.note) { margin-top: 14px; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 3px; }
nav { margin-top: 26px; padding: 10px 0; border-top: 1px solid var(--line); border-bottom: 1px solid var(--line);
  font-size: 13.5px; display: flex;
  flex-wrap: wrap; gap: 2px 18px; color: var(--soft); }
nav a { text-decoration: none; }
nav a:hover { color: var(--ink); text-decoration: underline; }
.what { font-size: 17px; margin: 0 0 4px; overflow-wrap: anywhere; }
.what b { font-weight: 600; }
.over + ol, .over + ul { margin-top: 10px; }
h2.over { margin: 30px 0 0; font-weight: 500; }
.score { margin-top: 26px; }
.score h2.over { margin: 0; }
.score ul { list-style: none; margin: 8px 0 0; padding: 0; }
.score li { display: grid; grid-template-columns: minmax(0, 15em) minmax(60px, 1fr) 9em 9.5em; gap: 0 18px; align-items: center;
  padding: 5px 0; border-bottom: 1px solid var(--line); }
.score .name { font-weight: 600; overflow-wrap: anywhere; }
.score .was { text-align: right; white-space: nowrap; }
.score li > :last-child { white-space: nowrap; font-weight: 620; }
.score .note { margin: 8px 0 0; }
.verdict { overflow-wrap: anywhere; font-size: 18px; line-height: 1.5; margin: 22px 0 0; max-width: 70ch; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 18px 24px;
  margin: 26px 0 0; }
.facts dt { font-size: 12.5px; color: var(--soft); }
.facts dd { margin: 0; font-size: 22px; line-height: 1.3; font-weight: 600; letter-spacing: -.01em; }
.facts dd small { font-size: 13px; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.strip { display: flex; flex-wrap: wrap; gap: 14px; margin: 26px 0 0; padding: 0; list-style: none; }
.strip li { flex: 1 1 220px; min-width: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 14px 16px 15px; }
.strip h3 { font-size: 16px; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 8px; margin-bottom: 8px; }
.strip h3 span { font-weight: 400; font-size: 13px; color: var(--soft); white-space: nowrap; }
h3 b { font-weight: 620; min-width: 0; }
.strip p { font-size: 13.5px; margin: 0; line-height: 1.6; }
.strip .stacked { margin-top: 10px; }
.strip .legend { color: var(--soft); font-size: 12.5px; margin-top: 5px; }
.legend span { display: inline-block; max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  margin-right: 10px; vertical-align: bottom; }
.swatch { display: inline-block; width: 9px; height: 9px; border-radius: 2.5px; margin-right: 6px; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 6px 18px; }
.card + .note, .wide + .note, .below { margin-top: 14px; }
.grid + .note { margin-top: 12px; }
.grid + details, .sheet + details { margin-top: 16px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 318px), 1fr)); gap: 14px; }
.grid.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.panel { padding: 13px 14px 8px; min-width: 0; break-inside: avoid; }
.panel.all { padding-top: 16px; }
.panel h3 { display: flex; justify-content: space-between; align-items: baseline; gap: 10px; margin-bottom: 8px; }
.panel h3 span { font-weight: 400; font-size: 13px; color: var(--soft); white-space: nowrap; }
.chart { overflow: hidden; }
svg { display: block; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); }
svg .label { font-size: 11.5px; font-weight: 600; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .border { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 3; }
svg path { fill: none; stroke-linejoin: round; stroke-linecap: round; vector-effect: non-scaling-stroke; }
svg path.line { stroke-width: 1.8; }
svg path.thin { stroke-width: 1; opacity: .8; }
svg path.faint { stroke-width: 1; opacity: .4; }
svg .tick.wide { display: none; }
svg path.dashed { stroke-width: 1.2; stroke-dasharray: 4 4; }
svg path.band { stroke: none; opacity: .24; }
svg circle { stroke: var(--card); stroke-width: 1; }
.stacked { border-radius: 3px; overflow: hidden; background: var(--track); }
.stacked rect { stroke: var(--card); stroke-width: 1; }
.bullet .track { fill: var(--track); }
.bullet .asked { fill: var(--ink); }
.wide { overflow-x: auto; position: relative; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { font-weight: 600; text-align: left; }
thead th { color: var(--soft); font-weight: 500; font-size: 12.5px; vertical-align: bottom; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
tbody tr:last-child > * { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.n + td:not(.n), th.n + th:not(.n) { padding-left: 12px; }
.grouped td { white-space: nowrap; border-bottom: 0; padding-top: 3px; padding-bottom: 3px; }
.grouped tr.first > * { border-top: 1px solid var(--line); padding-top: 9px; }
.grouped tbody tr.first:first-child > * { border-top: 0; }
.losses thead th:not(:first-child) b { color: var(--ink); font-size: 14px; font-weight: 620; }
.error { color: var(--soft); font-size: .88em; }
.cell { display: flex; flex-wrap: wrap; justify-content: flex-end; gap: 0 6px; font-size: 13.5px; text-align: right;
  white-space: nowrap; align-items: baseline; }
.cell > * { min-width: calc((11.6 + var(--digits)) * 1ch); }
.cell > :first-child { min-width: 3.8em; flex: 1 0 auto; }
.losses th + *, .losses td { border-left: 1px solid var(--line); padding: 9px 10px; }
.losses th[scope=row] { min-width: 9em; max-width: 15em; overflow-wrap: anywhere; }
.losses td:last-child, .losses th:last-child { padding-right: 0; }
.losses thead .head { display: block; text-align: left; min-width: 9em; overflow-wrap: anywhere; margin-bottom: 2px; }
.cell b { font-size: 15px; font-weight: 640; }
.cell .raw { flex: 0 0 100%; grid-column: 1 / -1; font-size: 12.5px; color: var(--soft); }
.cell .lead { display: none; }
.many .cell { flex-direction: column; align-items: flex-end; }
.many .cell > :first-child { flex: none; }
.mark { display: inline-block; width: 1.25em; text-align: center; font-size: 11.5px; }
.better { color: var(--good); } .worse { color: var(--bad); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.mix { display: grid; grid-template-columns: minmax(0, max-content) minmax(60px, 1fr) max-content; gap: 5px 12px;
  align-items: center; font-size: 13px;
  padding-bottom: 6px; }
.mix > :first-child, .mix > :nth-child(3n + 1) { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.mix .n { text-align: right; }
.accuracy td:nth-child(2) { width: 38%; vertical-align: middle; }
.accuracy .card + .card { margin-top: 14px; }
.sampled { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(10em + var(--columns) * (var(--tile) + 8px))), 1fr)); gap: 20px 14px; }
.sampled, .tiles { --tile: clamp(64px, 8.4vw, 116px); }
.sampled.small, .small .tiles { --tile: 58px; }
.samples .card { padding: 6px 14px; }
.samples { min-width: 0; }
.samples h3 { margin-bottom: 8px; }
.tiles { width: auto; }
.tiles th, .tiles td { vertical-align: middle; padding: 6px 8px 6px 0; }
.tiles thead th { vertical-align: bottom; font-size: 11.5px; padding-right: 4px; }
.tiles thead th:not(:first-child) { width: 1px; overflow-wrap: anywhere; min-width: calc(var(--tile) + 8px); hyphens: auto; }
.tiles thead b { color: var(--ink); font-weight: 600; }
.tiles tbody th { font-weight: 400; min-width: 8em; max-width: 30em; overflow-wrap: anywhere; }
.tiles img { display: block; width: var(--tile); height: auto; border-radius: 5px; background: var(--track); }
.tiles img.tiny { image-rendering: pixelated; }
.peaks td:nth-child(2) { min-width: 90px; width: 26%; vertical-align: middle; }
.quality td:nth-child(3) { min-width: 90px; width: 18%; vertical-align: middle; }
.quality h3 { margin: 18px 0 8px; }
.quality h3 .soft { font-weight: 400; margin-left: 6px; }
.sheet { margin: 0 0 22px; break-inside: avoid; }
.handoffs p { font-size: 13.5px; margin: 0; }
.changes { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 14px; margin: 10px 0 6px;
  padding-top: 10px; font-size: 13px;
  border-top: 1px solid var(--line); }
.changes dt { color: var(--soft); }
.changes dd { margin: 0; overflow-wrap: anywhere; }
.sheet img { display: block; max-width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line);
  background: #fff; }
.sheet img.tiny { image-rendering: pixelated; }
.sheet figcaption { font-size: 13.5px; color: var(--soft); margin-bottom: 8px; }
#launches td:nth-child(-n + 2) { white-space: nowrap; }
ul.plain { margin: 0; padding: 0; list-style: none; }
ul.plain li { padding: 7px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
ul.plain li:last-child { border-bottom: 0; }
details { border-top: 1px solid var(--line); }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: 10px 0; font-weight: 600; font-size: 14px; }
pre { margin: 0 0 14px; padding: 14px 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; overflow-x: auto;
  font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; tab-size: 2; }
footer { margin-top: 56px; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
@media (min-width: 900px) { .all svg .tick.wide { display: inline; } .all svg .tick.narrow { display: none; } }
@media (max-width: 1239px) { .cell { flex-direction: column; align-items: flex-end; } .cell > :first-child { flex: none; } }
@media (max-width: 680px) {
  main { padding: 30px 16px 48px; }
  h1 { font-size: 30px; }
  .verdict { font-size: 16.5px; }
  section { margin-top: 42px; }
  .facts { grid-template-columns: repeat(2, 1fr); gap: 14px 18px; }
  .card { padding: 4px 14px; }
  .wide table:not(.losses) { min-width: 560px; }
  .accuracy .wide table { min-width: 0; }
  .accuracy th, .accuracy td { padding-right: 7px; font-size: 12.5px; overflow-wrap: anywhere; }
  .accuracy th:nth-child(2), .accuracy td:nth-child(2) { display: none; }
  .accuracy td:first-child { min-width: 5.6em; }
  .accuracy thead th { font-size: 11px; white-space: normal; hyphens: auto; }
  .quality th:nth-child(3), .quality td:nth-child(3) { display: none; }
  .peaks .wide table { min-width: 0; }
  .peaks th:nth-child(2), .peaks td:nth-child(2) { display: none; }
  .peaks thead th { white-space: normal; }
  #launches td:last-child { min-width: 300px; }
  .sheet img { max-width: none; }
  .what { font-size: 15.5px; }
  .score li { grid-template-columns: minmax(0, 1fr) auto; gap: 2px 12px; padding: 7px 0; }
  .score .name { grid-area: 1 / 1; } .score li > :last-child { grid-area: 1 / 2; }
  .score .bar { grid-area: 2 / 1; } .score .was { grid-area: 2 / 2; font-size: 13px; color: var(--soft); }
  .wide table.tiles { min-width: 0; }
  .tiles thead th:first-child { display: none; }
  .tiles, .tiles thead, .tiles tbody { display: block; width: 100%; }
  .tiles tr { display: grid; grid-template-columns: repeat(var(--columns), minmax(76px, 1fr)); gap: 0 6px; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .small .tiles tr { grid-template-columns: repeat(var(--columns), minmax(44px, 1fr)); }
  .tiles thead tr { padding: 4px 0; align-items: end; }
  .tiles tbody tr:last-child { border-bottom: 0; }
  .tiles th, .tiles td, .tiles thead th:not(:first-child) { padding: 0; border: 0; width: auto; min-width: 0; }
  .tiles thead th { font-size: 11px; line-height: 1.3; hyphens: auto; }
  .tiles tbody th { grid-column: 1 / -1; min-width: 0; max-width: calc(100vw - 62px); padding-bottom: 6px; }
  .tiles img { width: 100%; }
  .losses, .losses tbody, .losses tr, .losses td, .losses tbody th { display: block; width: 100%; }
  .losses thead { display: none; }
  .losses tr { padding: 10px 0; border-bottom: 1px solid var(--line); }
  .losses tr:last-child { border-bottom: 0; }
  .losses tbody th { padding: 0 0 4px; border: 0; font-size: 14.5px; }
  .losses th + *, .losses td { padding: 4px 0; border: 0; }
  .cell, .many .cell { display: grid; grid-template-columns: minmax(0, 1fr) auto auto; font-size: 12.5px; gap: 0 4px; }
  .cell .lead { display: block; font-size: 11.5px; color: var(--soft); font-weight: 400; overflow: hidden;
    text-overflow: ellipsis; }
  .cell > :first-child { text-align: left; min-width: 0; }
}
@media print {
  :root { --paper: #ffffff; }
  @page { size: A4; margin: 14mm 13mm; }
  body { font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  a { text-decoration: none; }
  section { margin-top: 24px; }
  section > h2::after { content: ""; display: block; height: 200px; margin-bottom: -200px; }
  section > h2 { break-inside: avoid; }
  h2, h3, .note, .over, summary, thead { break-after: avoid; }
  tr, .strip li, .score li, .panel, img, svg { break-inside: avoid; }
  .grid, .grid.two { display: block; }
  .grid > .panel { display: inline-block; vertical-align: top; width: 49%; margin: 0 1% 12px 0; }
  .handoffs > .panel { display: block; width: auto; break-inside: auto; margin-right: 0; }
  .card { break-inside: auto; }
  .wide, pre { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 8pt; }
  table { font-size: 8.5pt; }
  th, td, td.n, th.n, .grouped td { white-space: normal; padding-right: 8px; overflow-wrap: anywhere; }
  td.n, .error { white-space: nowrap; }
  .quality td.n { white-space: normal; }
  .columns { font-size: 6pt; }
  .columns th, .columns td, .columns td.n { padding-right: 3px; white-space: normal; overflow-wrap: anywhere; }
  .many, .many tbody, .many td, .many tbody th { display: block; }
  .many thead { display: none; }
  .many tr { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 4px 16px; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .many tbody th { grid-column: 1 / -1; }
  .many th + *, .many td, .many tbody th { border: 0; padding: 0; max-width: none; }
  .many .cell { display: grid; grid-template-columns: minmax(0, 1fr); font-size: 8pt; }
  .many .cell .lead { display: inline; font-weight: 400; color: var(--soft); margin-right: 6px; white-space: normal; overflow-wrap: anywhere; }
  .sampled, .sampled.small, .tiles, .small .tiles { --tile: min(52px, calc(470px / var(--columns))); }
  .tiles th, .tiles td, .tiles thead th { padding: 4px 4px 4px 0; }
  .tiles thead th:not(:first-child) { min-width: calc(var(--tile) + 4px); }
  .sampled { grid-template-columns: minmax(0, 1fr); }
  .tiles tbody th { min-width: 0; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  summary { list-style: none; }
  summary::-webkit-details-marker { display: none; }
}
"""
