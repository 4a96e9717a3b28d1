"""The report's part on folders of `apt-jax evaluate`: their tables and their samples."""

import html

from apt_jax.eval import evaluations
from apt_jax.eval.evaluations import Evaluation
from apt_jax.eval.report_pictures import image, spread

PICTURES = 24


def table(found: Evaluation) -> str:
    """HTML of one evaluation's table and remarks; a bar shows each FD against the largest."""
    headings, body, distances = evaluations.table(found.result, found.label)
    largest = max(distances) or 1
    best = found.result["train"]["fd"]
    lines = []
    for cells, distance in zip(body, distances):
        style = (' class="floor"' if cells[0] == "real against real" else
                 ' class="main"' if distance == best else "")
        lines.append(f"<tr{style}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
                     + f'<td class="bar"><div style="width:{100 * distance / largest:.1f}%">'
                     "</div></td></tr>")
    heads = "".join(f"<th>{heading}</th>" for heading in headings)
    remarks = "".join(f'<p class="soft">{html.escape(text)}</p>'
                      for text in evaluations.remarks(found.result))
    return (f'<div class="wide"><h3>{html.escape(found.name)}</h3>'
            f"<table><thead><tr>{heads}<th></th></tr></thead>"
            f'<tbody>{"".join(lines)}</tbody></table></div>{remarks}')


def pictures(all_found: list[Evaluation]) -> str:
    """HTML of every evaluation's samples, spread over the captions, each with its caption."""
    parts = []
    for found in all_found:
        if found.samples is None:
            continue
        frames, captions = found.samples
        figures = "".join(
            f"<figure>{image(frames[i], captions[i])}"
            f'<figcaption class="distance">{html.escape(captions[i])}</figcaption></figure>'
            for i in spread(len(frames), PICTURES))
        count, height, width = frames.shape[1:4]
        size = f"{width} × {height} px" + (f", {count} frames, looping" if count > 1 else "")
        parts.append(f"<h3>{html.escape(found.name)}: {html.escape(found.label)}</h3>"
                     f'<p class="soft">{size}, enlarged without smoothing; of {len(frames):,}, '
                     f'spread evenly and not picked.</p><div class="shelf">{figures}</div>')
    return "\n".join(parts)
