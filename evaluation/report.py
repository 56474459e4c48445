"""A page about an evaluation that needs nothing but itself: figures, plots, best and worst answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from PIL import Image

from ..places_panorama import draw_bfov
from ..reading_panorama import read_panorama
from .answers import places_of
from .asking import UNREADABLE
from .items import Item
from .plots import bars, by_direction

_WIDTH = 512  # of a panorama in the page
_LONGEST = 1200  # characters of a text in the page
_CASES = 6  # of the best, and of the worst
_MOST_DRAWN = 20  # places of an answer
_MOST_ERRORS = 50
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}svg{font:12px system-ui,sans-serif}"
    ".bar{fill:#4a7fb5}.interval{stroke:#222;stroke-width:2}.chance{stroke:#c33;stroke-width:2;stroke-dasharray:4 2}"
    ".ring{fill:none;stroke:#ccc}.cases{display:grid;grid-template-columns:repeat(auto-fill,minmax(460px,1fr));gap:1em}"
    ".case{border:1px solid #ddd;padding:.7em;overflow-wrap:anywhere}.case img{max-width:100%}.wrong{color:#b00}"
    ".right{color:#070}pre{white-space:pre-wrap;background:#f6f6f6;padding:.6em;overflow-wrap:anywhere}"
)


def rows_of(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """The table of metrics: what, value, interval, chance, count."""
    rows = []
    scores: list[tuple[str, Mapping[str, Any]]] = [("headline", metrics["headline"])] if "headline" in metrics else []
    groups, kinds = metrics.get("groups", {}), metrics.get("kinds", {})
    scores += [(f"group {name}", score) for name, score in groups.items()] if set(groups) != set(kinds) else []
    scores += list(kinds.items())
    for name, score in scores:
        edges = "" if not score["interval"] else " – ".join(percent(edge) for edge in score["interval"])
        rows.append((name, percent(score["accuracy"]), edges, percent(score["chance"]), str(score["count"])))
    for kind, score in metrics.get("places", {}).items():
        error = "" if score["centre_error"] is None else f"{score['centre_error']:.1f}°"
        rows.append((f"{kind}: mean IoU", f"{score['mean_iou']:.3f}", "", "", str(score["count"])))
        rows.append((f"{kind}: IoU ≥ 0.5", percent(score["iou_50"]), "", "", str(score["count"])))
        rows.append((f"{kind}: error of the centre", error, "", "", str(score["matched"])))
    for kind, score in metrics.get("captions", {}).items():
        for name, each in score.items():
            if name != "count":
                value = each["why"] if each["value"] is None else f"{each['value']:.3f}"
                rows.append((f"{kind}: {name}", value, "", "", str(score["count"])))
    for name, each in metrics.get("baselines", {}).items():
        if "headline" in each:
            edges = "" if not each["headline"]["interval"] else " – ".join(map(percent, each["headline"]["interval"]))
            rows.append((f"baseline {name}", percent(each["headline"]["accuracy"]), edges, "", str(each["count"])))
    return [*rows, *_turned_rows(metrics)]


def _turned_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    rows = []
    if turn := metrics.get("turn"):
        count = str(turn["count"])
        rows += [(f"turned by {name}°", percent(value), "", "", count) for name, value in turn["accuracy"].items()]
        rows.append(("the answer of most headings", percent(turn.get("vote")), "", "", count))
        rows.append(("spread over headings", percent(turn["spread"]), "", "", count))
        rows.append(("answers that turn along", percent(turn["consistency"]), "", "", str(turn["pairs"])))
        rows += [(f"left out: {why}", "", "", "", str(number)) for why, number in turn["left_out"].items()]
    if tilt := metrics.get("tilt"):
        for name, value in tilt["accuracy"].items():
            label = "not tilted" if name == "0" else f"tilted: {name}°"
            rows.append((label, percent(value), "", "", str(tilt["count"])))
    return rows


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def write_report(
    title: str,
    metrics: Mapping[str, Any],
    items: Sequence[Item],
    judged: Mapping[str, Mapping[str, Any]],
) -> str:
    """The page.

    Args:
        title: of the page.
        metrics: as `summarise` gives them, with baselines, turns and tilts where there are any.
        items: the questions.
        judged: by id, the answers to them as they were given.
    """
    rows = "".join(
        f"<tr><td>{escape(row[0])}</td>{''.join(f'<td class=n>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows_of(metrics)
    )
    head = "<tr><th></th><th>value</th><th>95 %</th><th>chance</th><th>count</th></tr>"
    parts = [f"<h1>{escape(title)}</h1><table>{head}{rows}</table>"]
    if metrics.get("kinds"):
        parts.append(f"<h2>By kind</h2><p>Line: 95 % interval. Dashes: chance.</p>{bars(metrics['kinds'])}")
    ordered = [judged[item.id] for item in sorted(items, key=lambda item: item.id)]
    if plot := by_direction(ordered):
        parts.append(f"<h2>By direction around the observer</h2><p>Seen from above.</p>{plot}")
    parts += _case_parts(items, ordered)
    if errors := metrics.get("errors"):
        shown = "".join(f"<li>{_text(each['id'])}: {_text(each['error'])}</li>" for each in errors[:_MOST_ERRORS])
        parts.append(f"<h2>{len(errors)} questions without an answer</h2><ul>{shown}</ul>")
    parts.append(f"<h2>Settings</h2><pre>{escape(json.dumps(metrics.get('settings', {}), indent=1))}</pre>")
    allowed = "default-src 'none';img-src data:;style-src 'unsafe-inline'"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'
    start = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{policy}<title>{escape(title)}</title>'
    return f"{start}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def _case_parts(items: Sequence[Item], ordered: Sequence[Mapping[str, Any]]) -> list[str]:
    by_id = {item.id: item for item in items}
    scored = [each for each in ordered if each["right"] is not None]
    best = sorted((each for each in scored if each["right"]), key=lambda each: -each.get("iou", 1.0))
    worst = sorted((each for each in scored if not each["right"]), key=lambda each: each.get("iou", 0.0))
    chosen = [("Best answers", _spread(best)), ("Worst answers", _spread(worst))]
    captions = [each for each in ordered if each["right"] is None]
    chosen.append(("Captions", _spread(captions)))
    return [
        f'<h2>{name}</h2><div class="cases">{"".join(_case(by_id[each["id"]], each) for each in own)}</div>'
        for name, own in chosen
        if own
    ]


def _spread(judged: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first cases, of as many kinds as there are."""
    seen: dict[str, int] = {}
    turns = []
    for place, each in enumerate(judged):
        seen[each["kind"]] = seen.get(each["kind"], 0) + 1
        turns.append((seen[each["kind"]], place))
    return [judged[place] for _, place in sorted(turns)[:_CASES]]


def _case(item: Item, judged: Mapping[str, Any]) -> str:
    options = "".join(f"<br>{_text(key)}. {_text(text)}" for key, text in item.options)
    right = item.key if item.options else "; ".join(item.references)
    if not right and item.places is not None:
        right = "nothing" if not item.places else ", ".join(str(place.rounded()) for place in item.places)
    mark = {None: "", True: '<b class="right">right</b>', False: '<b class="wrong">wrong</b>'}[judged["right"]]
    said = f"<i>{_text(judged['error'])}</i>" if "error" in judged else _text(judged["answer"]) or "<i>nothing</i>"
    overlap = f" IoU {judged['iou']:.2f}" if "iou" in judged else ""
    return (
        f'<div class="case">{_picture(item, str(judged["answer"]))}<p><b>{_text(item.question)}</b> '
        f"<small>{_text(item.kind)}, {_text(item.id)}</small>{options}</p>"
        f"<p>Expected: {_text(right or '')}<br>Answer: {said} {mark}{overlap}</p></div>"
    )


def _picture(item: Item, answer: str) -> str:
    """The panorama, small, with what was expected in green and what was said in red."""
    try:
        if isinstance(item.image, str) and item.image.startswith(("http://", "https://", "data:")):
            raise ValueError("an address, not a file")
        pixels = read_panorama(item.image, needed_width=2 * _WIDTH).pixels
        pixels = pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().to(torch.uint8)
        image = Image.fromarray(pixels.numpy()).resize((_WIDTH, _WIDTH // 2), Image.Resampling.BOX)
    except UNREADABLE:
        return "<p><i>The panorama cannot be read.</i></p>"
    for place in (item.places or [])[:_MOST_DRAWN]:
        image = draw_bfov(image, place, "lime", width=2)
    if item.places is not None:
        for place in places_of(answer)[:_MOST_DRAWN]:
            image = draw_bfov(image, place, "red", width=2)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _text(words: Any) -> str:
    """What comes from outside: escaped, and not endless."""
    words = str(words)
    return escape(words if len(words) <= _LONGEST else f"{words[:_LONGEST]}… ({len(words)} characters)")
