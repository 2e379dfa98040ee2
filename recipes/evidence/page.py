"""A comparison as one page: tables and pictures of its raw numbers."""

import base64
import json
from pathlib import Path

from jinja2 import Template

from evidence.figures import draw_curves, draw_sensitivity
from evidence.tables import complete, table

PAGE = Template(
    """<!doctype html><meta charset="utf-8"><title>{{ title }}</title>
<style>body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ccc}
img{max-width:100%}</style>
<h1>{{ title }}</h1><p>{{ note }}</p>
{% for model in models %}<h2>{{ model.name }}</h2>{{ model.table }}
{% for picture in model.pictures %}<img alt="{{ picture.name }}" src="data:image/png;base64,{{ picture.data }}">
{% endfor %}{% endfor %}"""
)


def draw(results: Path, out: Path) -> list[Path]:
    """Write curves, sensitivity, table as Markdown, and one HTML page that holds them all; return the paths."""
    comparison = json.loads(results.read_text())
    out.mkdir(parents=True, exist_ok=True)
    title = f"symlm, bench {comparison['bench']}"
    # Finished runs are stored, so that a run may be older than the comparison.
    dates, commits = (
        ", ".join(sorted({run.get(key, comparison[key]) for run in comparison["runs"]})) for key in ("date", "commit")
    )
    note = (
        f"{comparison['device']}; torch {comparison['torch']}; {dates}; commit {commits}. Intervals: 95 %, Student's t."
    )
    paths, models, text = [], [], f"# {title}\n\n{note}\n"
    for model in dict.fromkeys(run["model"] for run in comparison["runs"]):
        trials = [run for run in comparison["runs"] if run["model"] == model and run["trial"]]
        runs = [run for run in comparison["runs"] if run["model"] == model and not run["trial"]]
        pictures = [out / f"{comparison['bench']}-{model}-curves.png"]
        draw_curves(complete(runs), f"{comparison['bench']}, {model}", pictures[0])
        if trials:
            pictures.append(out / f"{comparison['bench']}-{model}-rates.png")
            draw_sensitivity(trials, f"{comparison['bench']}, {model}", pictures[1])
        frame = table(runs, trials)
        text += (
            f"\n## {model}\n\n{frame.to_markdown()}\n\n" + "\n".join(f"![{p.stem}]({p.name})" for p in pictures) + "\n"
        )
        images = [{"name": p.stem, "data": base64.b64encode(p.read_bytes()).decode()} for p in pictures]
        models.append({"name": model, "table": frame.to_html(), "pictures": images})
        paths += pictures
    page, markdown = out / "report.html", out / "report.md"
    page.write_text(PAGE.render(title=title, note=note, models=models))
    markdown.write_text(text)
    return [*paths, markdown, page]
