"""The web page: gradio's components, and the functions behind its buttons."""

from __future__ import annotations

import html
import logging
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from clipdense.data.shapes.records import draw_scene
from clipdense.data.shapes.world import CLASSES
from clipdense.run.boundary import describe_error
from clipdense.run.memory import is_out_of_memory
from clipdense.run.web.limits import Limits, RequestError
from clipdense.run.web.models import ServedModel
from clipdense.run.web.predictions import (
    Prediction,
    parse_words,
    predict,
    read_uploads,
    save_json,
    save_png,
)

__all__ = ["build_page"]

logger = logging.getLogger(__name__)

_COLUMNS = ["image", "line", "class", "found", "area %", "pixels", "mean score", "best score"]
_TYPES = ["str", "number", "str", "str", "number", "number", "number", "number"]

CSS = """
.gradio-container { max-width: 1280px !important; }
footer { display: none !important; }
#pictures .grid-wrap, #scores .grid-wrap { max-height: none !important; height: auto !important; }
#summary .failed { color: #b91c1c; }
"""


class _Handlers:
    """Functions behind the buttons of one page.

    Args:
        models: models by their names on the page.
        limits: of a request.
        folder: folder for the files to download.
    """

    def __init__(self, models: dict[str, ServedModel], limits: Limits, folder: Path) -> None:
        self._models, self._limits, self._folder = models, limits, folder
        # a model holds one vocabulary at a time
        self._lock = threading.Lock()

    def segment(
        self,
        name: str,
        files: Sequence[tuple[str, str | None]] | None,
        words: str,
        background: str,
        progress: Any = gr.Progress(),  # noqa: B008  (gradio finds it by its default)
    ) -> tuple[Any, ...]:
        """Predict, and return what the page shows: the results, or why there are none."""
        try:
            return self._segment(name, [path for path, _ in files or ()], words, background, progress)
        except RequestError as error:
            message = str(error)
        except Exception as error:
            known = describe_error(error)
            if is_out_of_memory(error):
                known = "There is not enough memory for this request: use fewer or smaller images."
            if known is None:
                logger.exception("Error while predicting with %s", name)
            message = known or "An unexpected error occurred; the log of the server has the details."
        message = html.escape(message)
        gr.Warning(message)
        off = gr.DownloadButton(value=None, interactive=False)
        return f'<span class="failed">{message}</span>', None, off, off, None, None

    def _segment(
        self, name: str, files: list[str], words: str, background: str, progress: Any
    ) -> tuple[Any, ...]:
        if name not in self._models:
            raise RequestError("Choose one of the models of the list.")
        model = self._models[name]
        vocabularies = parse_words(words or "", background or "", self._limits)
        uploads = read_uploads(files, self._limits)
        if vocabularies[0][1] is None and not model.own_classes:
            raise RequestError("Type at least one word, such as: red heart, blue star")
        predictions: list[Prediction] = []
        total = len(uploads) * len(vocabularies)
        progress((0, total), desc="Predicting", unit="pictures")
        with self._lock:
            for prediction in predict(model, uploads, vocabularies):
                predictions.append(prediction)
                progress((len(predictions), total), desc="Predicting", unit="pictures")
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        png, file = folder / "segmentation.png", folder / "segmentation.json"
        save_png(predictions, len(vocabularies), png)
        save_json(name, background or "", predictions, file)
        columns = len(vocabularies) if len(vocabularies) > 1 else min(2, len(uploads))
        maps = [picture for p in predictions for picture in p.score_maps]
        return (
            _summary(name, predictions),
            gr.Gallery(value=[p.picture for p in predictions], columns=columns),
            gr.DownloadButton(value=str(png), interactive=True),
            gr.DownloadButton(value=str(file), interactive=True),
            _table(predictions),
            gr.Gallery(value=maps),
        )

    def example(self, number: int) -> tuple[Any, ...]:
        """Draw a scene of the `shapes` world, with the words for its things."""
        scene = draw_scene("val", number)
        things = dict.fromkeys(CLASSES[thing.category].replace("_", " ") for thing in scene.things)
        return [(scene.image, f"scene {number}")], ", ".join(things), number + 1

    def background(self, name: str) -> str:
        """Return the suggested background words of a model."""
        return self._models[name].background if name in self._models else ""


def build_page(models: Sequence[ServedModel], limits: Limits, folder: Path) -> gr.Blocks:
    """Build the page.

    Args:
        models: models to choose from; the first is chosen at the start.
        limits: of a request.
        folder: folder for the files to download.

    Returns:
        The page with its queue, to be launched.
    """
    handlers = _Handlers({model.name: model for model in models}, limits, folder)
    with gr.Blocks(title="clipdense", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# clipdense\nType words, and find them in your images.")
        with gr.Row():
            with gr.Column(scale=2):
                model, images, words, background, example, start = _inputs(models, limits)
            with gr.Column(scale=3):
                outputs = _outputs()
        scene = gr.State(0)
        private: Any = {"api_visibility": "private"}
        model.change(handlers.background, model, background, **private)
        example.click(handlers.example, scene, [images, words, scene], **private)
        start.click(
            handlers.segment,
            [model, images, words, background],
            outputs,
            concurrency_limit=1,
            show_progress_on=outputs[1],
            **private,
        )
    page.queue(max_size=limits.waiting, api_open=False)
    return page


def _inputs(models: Sequence[ServedModel], limits: Limits) -> tuple[Any, ...]:
    model = gr.Dropdown([m.name for m in models], value=models[0].name, label="Model", elem_id="model")
    images = gr.Gallery(
        label="Images",
        file_types=["image"],
        type="filepath",
        interactive=True,
        columns=3,
        height=260,
        buttons=[],
        elem_id="images",
    )
    gr.Markdown(
        f"At most {limits.images} images, each of {limits.megabytes} MB and {limits.megapixels} megapixels."
    )
    example = gr.Button("Example scene", size="sm", elem_id="example")
    words = gr.Textbox(
        label="Words",
        info="Commas separate classes, bars separate synonyms (cat|kitten, red car). Each line is a "
        "vocabulary of its own; the results stand side by side.",
        lines=3,
        max_lines=limits.vocabularies + 2,
        max_length=limits.characters,
        elem_id="words",
    )
    background = gr.Textbox(
        label="Background words",
        info="Pixels where one of these has the highest score stay clear.",
        value=models[0].background,
        max_length=limits.characters,
        elem_id="background",
    )
    start = gr.Button("Segment", variant="primary", elem_id="segment")
    return model, images, words, background, example, start


def _outputs() -> list[Any]:
    summary = gr.Markdown("", elem_id="summary")
    look: dict[str, Any] = {
        "height": "auto",
        "object_fit": "contain",
        "buttons": ["fullscreen"],
        "show_label": False,
    }
    pictures = gr.Gallery(label="Segmentation", elem_id="pictures", **look)
    with gr.Row():
        png = gr.DownloadButton("Download PNG", size="sm", interactive=False, elem_id="png")
        file = gr.DownloadButton("Download JSON", size="sm", interactive=False, elem_id="json")
    with gr.Tab("Areas and scores"):
        table = gr.Dataframe(
            headers=_COLUMNS, datatype=_TYPES, interactive=False, wrap=True, show_label=False, elem_id="areas"
        )
    with gr.Tab("Score maps"):
        gr.Markdown("Scores from 0 (blue) to 1 (red), for models that score every pixel.")
        maps = gr.Gallery(label="Score maps", columns=3, elem_id="scores", **look)
    return [summary, pictures, png, file, table, maps]


def _summary(name: str, predictions: Sequence[Prediction]) -> str:
    """Return one line for each prediction: what was found."""
    lines, several = [], len({p.line for p in predictions}) > 1
    for p in predictions:
        found = sorted((row for row in p.classes if _found(row)), key=lambda row: -row["pixels"])
        content = ", ".join(f"{row['name']} {row['share']:.1f} %" for row in found) or "nothing found"
        place = f"{p.image}, line {p.line}" if several else p.image
        lines.append(f"- {html.escape(place)}: {html.escape(content)}")
    return "\n".join([f"**{html.escape(name)}**", "", *lines])


def _found(row: dict[str, Any]) -> bool:
    return bool(row["pixels"] or row.get("instances"))


def _table(predictions: Sequence[Prediction]) -> list[list[Any]]:
    """Return the rows of the table, one for each class of each prediction."""
    return [
        [
            p.image,
            p.line,
            row["name"],
            (str(row["instances"]) if row.get("instances") else "yes") if _found(row) else "no",
            round(row["share"], 2),
            row["pixels"],
            None if row["mean_score"] is None else round(row["mean_score"], 3),
            None if row["max_score"] is None else round(row["max_score"], 3),
        ]
        for p in predictions
        for row in p.classes
    ]
