"""What the next stage could draw, as a section of the report: the table that `--advise` prints."""

from __future__ import annotations

from html import escape

from stages.report.page import count, percent, section, table
from stages.report.paired import decimals, said_change
from stages.report.record import Record
from stages.report.suggestion import BAND, WORDS, advice_of


def next_shares(record: Record) -> str:
    """The section; empty where no stage was measured twice."""
    advice = advice_of(record)
    if advice is None:
        return ""
    digits = decimals(each.moved for each in advice.suggestions)
    slopes = decimals(each.per_thousand for each in advice.suggestions)
    rows = [
        [
            escape(each.source),
            percent(each.share),
            f"<b>{percent(each.suggested)}</b>",
            said_change(each.moved, digits),
            count(each.images),
            said_change(each.per_thousand, slopes),
        ]
        for each in advice.suggestions
    ]
    reasons = "".join(f"<li><b>{escape(each.source)}</b> {WORDS[each.word]}: {escape(each.why)}.</li>" for each in advice.suggestions)
    note = (
        f"From the held-out losses between step {count(advice.first)} and step {count(advice.last)} of <b>{escape(advice.stage)}</b>. {escape(advice.verdict)}"
        + (f" The plan's next stage is {escape(advice.planned)}." if advice.planned else "")
        + f" A rule of thumb: what clearly gained more per draw gets more, by a factor of {BAND:g} at most; every source counts alike."
    )
    head = ["Source", "Share", "Could be", "Held-out loss moved", "Images", "Per 1,000 images"]
    body = f'{table(head, rows, range(1, 6))}<p class="note below"><code>{escape(advice.line)}</code></p><div class="card"><ul class="plain">{reasons}</ul></div>'
    return section("advice", "What the next stage could draw", note, body)
