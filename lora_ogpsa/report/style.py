"""The looks of the page: light and dark, narrow and wide."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --page: #ffffff;
  --card: #f6f8fa; --line: #d1d9e0; --good: #1a7f37; --mixed: #9a6700; --bad: #cf222e;
  --open: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b3; --page: #0d1117; --card: #161b22; --line: #3d444d;
    --good: #3fb950; --mixed: #d29922; --bad: #f85149; --open: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
h4 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 48rem; }
.about, .caption { color: var(--soft); overflow-wrap: anywhere; }
.caption { font-size: .875rem; }
.verdict { border: 1px solid var(--line); border-left: 6px solid var(--open); border-radius: 6px;
  background: var(--card); padding: .5rem 1rem; margin: 1rem 0; }
.verdict p { font-size: 1.1rem; max-width: 60rem; }
.verdict p.cost { font-size: 1rem; color: var(--soft); }
.verdict.good { border-left-color: var(--good); }
.verdict.mixed { border-left-color: var(--mixed); }
.verdict.bad { border-left-color: var(--bad); }
.pictures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure h3 { margin-top: .5rem; }
svg { display: block; width: 100%; height: auto; max-width: 32rem; }
svg image { image-rendering: pixelated; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .875rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
tbody th { font-weight: 400; }
tbody th.part { padding-left: 1.75rem; color: var(--soft); }
thead th { border-bottom: 1px solid var(--line); background: var(--card); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tr.section th { font-weight: 600; background: var(--card); }
article { border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem;
  margin: .75rem 0; }
.answers { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); }
.answer { background: var(--card); border-radius: 6px; padding: .5rem .75rem; min-width: 0; }
.answer p { margin: 0; }
.who { font-size: .875rem; font-weight: 600; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9375rem; }
.badge { font-weight: 400; color: var(--soft); border: 1px solid var(--line); border-radius: 1em;
  padding: 0 .6em; margin-left: .25em; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem 1rem; }
summary { cursor: pointer; }
pre { overflow: auto; max-height: 40rem; font-size: .8125rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; }
:focus-visible { outline: 2px solid var(--open); outline-offset: 2px; }
@media print { details { display: none; } }
"""
